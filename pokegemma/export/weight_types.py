"""The types in which exports can store the weights of the language model."""

from collections.abc import Iterable
from typing import Literal, get_args

from pokegemma.errors import PokegemmaError

Quantization = Literal["f16", "bf16", "q8_0", "q5_k_m", "q4_k_m"]
QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)
"""The types of GGUF files."""

MlxBits = Literal[4, 8, 16]
MLX_BITS: tuple[MlxBits, ...] = get_args(MlxBits)
"""Bits of a weight for MLX; 16 is bfloat16."""


def check_quantizations(names: Iterable[str]) -> None:
    """Check the values of --quantization.

    Raises:
        PokegemmaError: one of them is not a type of `QUANTIZATIONS`.
    """
    for name in names:
        if name not in QUANTIZATIONS:
            raise PokegemmaError(f"--quantization: {name!r} is not one of {', '.join(QUANTIZATIONS)}")
