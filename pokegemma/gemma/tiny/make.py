"""Make a tiny random checkpoint of any family."""

from pathlib import Path
from typing import Literal

from pokegemma.gemma.tiny.gemma3 import make_tiny_gemma3
from pokegemma.gemma.tiny.gemma3n_gemma4 import make_tiny_gemma3n, make_tiny_gemma4


def make_tiny(family: Literal["gemma3", "gemma3n", "gemma4"], folder: Path, *, seed: int = 0, **sizes: int) -> None:
    """Write a tiny random checkpoint of a family to an existing folder; `sizes` replace its default sizes."""
    makers = {"gemma3": make_tiny_gemma3, "gemma3n": make_tiny_gemma3n, "gemma4": make_tiny_gemma4}
    makers[family](folder, seed=seed, **sizes)
