"""The weights of a checkpoint on disk, by names that do not depend on who wrote them or how the files are cut."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import cached_file

EMBEDDINGS, HEAD = "embed_tokens.weight", "lm_head.weight"
"""Plain names of the two weights that a Gemma ties."""

_WRAPPERS = frozenset(("base_model", "model", "language_model", "vision_model"))


def plain_name(name: str) -> str:
    """Return the name of a module or tensor without the wrappers in which spellings differ.

    Example::

        language_model.model.layers.0.mlp.up_proj             published checkpoints, transformers 4.49
        model.language_model.layers.0.mlp.up_proj             transformers 4.52 and newer
        model.layers.0.mlp.up_proj                            the model for text alone
        base_model.model.model.layers.0.mlp.up_proj           its adapter, by PEFT

    all become ``layers.0.mlp.up_proj``; ``vision_tower.vision_model.encoder.layers.0`` (published) and
    ``model.vision_tower.encoder.layers.0`` (transformers 5) become ``vision_tower.encoder.layers.0``.
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, read when it is asked for.

    Attributes:
        name: as the file spells it.
        file: the opened safetensors file.
    """

    name: str
    file: Any

    @property
    def shape(self) -> list[int]:
        return self.file.get_slice(self.name).get_shape()

    def read(self) -> torch.Tensor:
        return self.file.get_tensor(self.name)

    def beginning(self) -> bytes:
        """Return the first row of a matrix, or the whole of a vector, as float32."""
        values = self.read() if len(self.shape) < 2 else self.file.get_slice(self.name)[:1]  # a scalar has no slices
        return values.float().numpy().tobytes()


def stored_tensors(path: str | Path) -> Iterator[StoredTensor]:
    """Yield the tensors of a checkpoint, a folder or a Hub id: file by file, sorted by name in each.

    Raises:
        OSError, ValueError, KeyError, SafetensorError: a file is missing or damaged.
    """
    files = [cached_file(str(path), "model.safetensors", _raise_exceptions_for_missing_entries=False)]
    if files == [None]:  # several files, and an index that names them
        index = cached_file(str(path), "model.safetensors.index.json")
        names = set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values())
        files = [cached_file(str(path), name) for name in sorted(names)]
    for name in files:
        file = safe_open(name, framework="pt")
        for key in sorted(file.keys()):
            yield StoredTensor(key, file)
