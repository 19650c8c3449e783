"""Read the metadata of a GGUF file with llama.cpp's own reader."""

import importlib
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pokegemma.errors import PokegemmaError

_DEFAULT_SCALE_FACTOR = 4
"""Patches a side that llama.cpp pools into a token of Gemma 3, unless the file has a number."""

_TOKENS = "tokenizer.ggml.tokens"
_TOKEN_TYPES = "tokenizer.ggml.token_type"


@dataclass(frozen=True)
class GgufFile:
    """Metadata and tensors of a GGUF file; `shapes` and `types` (such as F16, Q4_K) by name of tensor.

    A shape is as GGUF counts it: the length of a row first.
    """

    path: Path
    num_bytes: int
    fields: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    types: dict[str, str]
    control_tokens: frozenset[str] = frozenset()  # entries of the vocabulary that are not text

    @property
    def type_counts(self) -> dict[str, int]:
        """Return how many tensors have each type, the most frequent first."""
        return dict(Counter(sorted(self.types.values())).most_common())

    @property
    def image_size_px(self) -> int | None:
        """Return the side of a picture that a mmproj file takes."""
        return self.fields.get("clip.vision.image_size")

    @property
    def image_tokens(self) -> int | None:
        """Return how many tokens llama.cpp will make of a picture with this mmproj file."""
        if self.image_size_px is None:
            return None
        pooled = self.fields.get("clip.vision.projector.scale_factor", _DEFAULT_SCALE_FACTOR)
        return (self.image_size_px // self.fields["clip.vision.patch_size"] // pooled) ** 2


def read_gguf(path: Path, converter: Path) -> GgufFile:
    """Read the metadata of a GGUF file, without the weights. Of its lists, only the control tokens are read.

    Args:
        converter: folder of llama.cpp's converter, whose reader is used.

    Raises:
        PokegemmaError: it is not a GGUF file, or it was cut off.
    """
    if str(converter / "gguf-py") not in sys.path:
        sys.path.insert(0, str(converter / "gguf-py"))
    gguf = importlib.import_module("gguf")
    try:
        reader = gguf.GGUFReader(path)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise PokegemmaError(f"{path} is not a whole GGUF file: {' '.join(str(error).split())[:200]}") from error
    scalar = {name: field.contents() for name, field in reader.fields.items() if len(field.types) == 1}
    lists = {name: reader.fields[name].contents() for name in (_TOKENS, _TOKEN_TYPES) if name in reader.fields}
    tokens = zip(lists.get(_TOKENS, []), lists.get(_TOKEN_TYPES, []), strict=True)
    return GgufFile(
        path=path,
        num_bytes=path.stat().st_size,
        fields=scalar,
        shapes={tensor.name: tuple(int(length) for length in tensor.shape) for tensor in reader.tensors},
        types={tensor.name: tensor.tensor_type.name for tensor in reader.tensors},
        control_tokens=frozenset(token for token, kind in tokens if kind == gguf.TokenType.CONTROL),
    )
