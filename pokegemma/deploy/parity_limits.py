"""How far the log-probabilities of an export may be from the reference's: what rounding explains, and no more.

The yardstick is the reference itself, computed once more in bfloat16, on the same decisions: it knows how sensitive
this model is. An export may differ by so many times as much as its weights' type says; a fault differs by more.
"""

import json
import re
import struct
from pathlib import Path

from pokegemma.deploy.parity_worker import EngineFailedError, EngineSpec
from pokegemma.errors import PokegemmaError

LIMITS = {"f32": 0.25, "f16": 0.25, "bf16": 2.0, "8 bits": 4.0, "6 bits": 6.0, "5 bits": 8.0, "4 bits": 16.0}
"""Limit by type of the weights, in units of what bfloat16 costs. Measured on the trained toy model: 0.04 for f16, 0.2
to 1 for bf16, 0.9 to 1.3 for q8_0, 2.5 for q5_k_m, 3.7 for q4_k_m, and 1.5 to 17 for two swapped rows of the
projector. So a type of 16 bits shows faults that fewer bits hide; exports of one model share their mmproj: compare an
f16 with them."""

_SAFETENSORS_TYPES = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
_GGUF_TYPE = re.compile(r"(?<![a-z0-9])(bf16|f16|f32|i?q([2-8])(?:_\w+)?)(?![a-z0-9])", re.IGNORECASE)


def gguf_type(name: str) -> str | None:
    """Return the type of weights in the name of a GGUF file, or in llama.cpp's own name for it; None where it has none.

    Example:
        >>> gguf_type("model-q4_k_m")
        '4 bits'
    """
    found = _GGUF_TYPE.findall(name)
    if not found:
        return None
    kind, bits = found[-1]
    return f"{bits} bits" if bits else kind.lower()


def check_loaded(spec: EngineSpec, *, engine: str, weights: str) -> None:
    """Refuse to judge an engine that did not load what its files are named after.

    Args:
        engine: what the engine calls itself.
        weights: what it says of the weights that it loaded.

    Raises:
        EngineFailedError: it is another engine, or the weights have another type.
    """
    if engine.split()[0] != spec.kind:
        raise EngineFailedError(f"{engine} answered instead of {spec.kind}")
    if spec.kind == "transformers":
        return
    named = gguf_type(spec.path.stem) if spec.kind == "llama.cpp" else weights_type(spec)
    loaded = gguf_type(weights) or weights
    if named and loaded and named != loaded:
        raise EngineFailedError(f"{spec.path} is named after {named}, and the loaded weights are {weights}")


def weights_type(spec: EngineSpec) -> str:
    """Return the type of an engine's weights, such as "f16" or "4 bits"; of a GGUF file as its name says.

    Raises:
        PokegemmaError: it cannot be told.
    """
    if spec.kind == "llama.cpp":
        if (named := gguf_type(spec.path.stem)) is None:
            raise PokegemmaError(
                f"{spec.path}: its name says no type, such as f16 or q8_0; pass --max_log_probability_difference"
            )
        return named
    if spec.dtype != "auto":
        return {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[spec.dtype]
    config = json.loads((spec.path / "config.json").read_text(encoding="utf-8"))
    if spec.kind == "mlx" and "quantization" in config:
        return f"{config['quantization']['bits']} bits"
    largest = max((entry for file in spec.files for entry in read_header(file)), default=None)
    if largest is None or largest[1] not in _SAFETENSORS_TYPES:
        raise PokegemmaError(f"{spec.path}: weights of a type that is not known: {largest and largest[1]}")
    return _SAFETENSORS_TYPES[largest[1]]


def limit_of(spec: EngineSpec, *, rounding: float, reference_dtype: str = "float32") -> float:
    """Return the largest mean difference for an engine, given what bfloat16 costs the reference.

    A reference that was itself computed in bfloat16 is no closer to anything than that.

    Raises:
        PokegemmaError: there is none for this type.
    """
    name = weights_type(spec)
    if name not in LIMITS:
        raise PokegemmaError(f"{spec.path}: no limit for weights of {name}; pass --max_log_probability_difference")
    return max(LIMITS[name], LIMITS["bf16"] if reference_dtype == "bfloat16" else 0.0) * rounding


def read_header(file: Path) -> list[tuple[int, str]]:
    """Return (bytes, type) of each tensor of a safetensors file."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        entries = json.loads(stream.read(length))
    return [
        (entry["data_offsets"][1] - entry["data_offsets"][0], entry["dtype"])
        for name, entry in entries.items()
        if name != "__metadata__"
    ]
