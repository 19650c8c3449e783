"""Read the tensors of a checkpoint from its files: their names in every spelling, their values, their fingerprint."""

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from pokegemma.errors import PokegemmaError
from pokegemma.gemma.checkpoint_files import load_part

EMBEDDINGS, HEAD = "embed_tokens.weight", "lm_head.weight"
"""Plain names of the two weights that a Gemma ties."""

FINGERPRINT_VERSION = "2:"

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


def published_name(name: str, *, text_alone: bool = False) -> str:
    """Return what published Gemma 3 checkpoints call a tensor, which is what llama.cpp and mlx-vlm read.

    Args:
        text_alone: of a Gemma 3 for text alone, whose names have no `language_model`.

    transformers 5 saves other names in three cases: a checkpoint-N of full fine-tuning (`model.vision_tower...`), a
    model built from its config (`vision_tower.embeddings...`), and full fine-tuning under DeepSpeed ZeRO-3
    (`language_model.model.model.layers...`).

    Example:
        >>> published_name("model.language_model.layers.0.mlp.up_proj.weight")
        'language_model.model.layers.0.mlp.up_proj.weight'
    """
    plain = plain_name(name)
    if text_alone:
        return plain if plain == HEAD else f"model.{plain}"
    part, _, rest = plain.partition(".")
    if part == "lm_head":
        return f"language_model.{plain}"
    if part == "vision_tower":
        return f"vision_tower.vision_model.{rest}"
    return plain if part == "multi_modal_projector" else f"language_model.model.{plain}"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, which is read only when its values are needed.

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


def weight_files(path: str | Path) -> list[Path]:
    """Return the files of a checkpoint's weights that transformers reads: one file, else those that an index names.

    Args:
        path: a folder or a Hub id, whose files are downloaded.

    Raises:
        PokegemmaError: there are none, one is missing, or the index is damaged.
    """
    find = functools.partial(_find_file, path)
    whole, index = find(SAFE_WEIGHTS_NAME), find(SAFE_WEIGHTS_INDEX_NAME)
    if whole is not None:
        return [whole]
    if index is None:
        raise PokegemmaError(f"{path}: no weights ({SAFE_WEIGHTS_NAME} or {SAFE_WEIGHTS_INDEX_NAME}) in it")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = {name: find(name) for name in names}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PokegemmaError(f"{index} is damaged: {error}") from error
    if missing := [name for name, file in files.items() if file is None]:
        raise PokegemmaError(f"{path}: {', '.join(missing)} not found, which {SAFE_WEIGHTS_INDEX_NAME} names")
    return [file for file in files.values() if file is not None]


def _find_file(path: str | Path, name: str) -> Path | None:
    found = load_part("weights", path, cached_file, filename=name, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


def stored_tensors(path: str | Path) -> Iterator[StoredTensor]:
    """Yield the tensors of a checkpoint (a folder or a Hub id) file by file, sorted by name in each.

    Raises:
        PokegemmaError: a file is missing or damaged.
    """
    for file in weight_files(path):
        try:
            opened = safe_open(file, framework="pt")
        except (OSError, SafetensorError) as error:
            raise PokegemmaError(f"{file}: the weights cannot be read: {error}") from error
        for name in sorted(opened.keys()):
            yield StoredTensor(name, opened)


def tensors_by_name(path: str | Path) -> dict[str, StoredTensor]:
    """Return the tensors of a checkpoint by their plain names.

    Raises:
        PokegemmaError: a file is missing or damaged.
    """
    return {plain_name(tensor.name): tensor for tensor in stored_tensors(path)}


def has_own_head(tensors: Mapping[str, StoredTensor]) -> bool:
    """Return whether a checkpoint stores an LM head that is not a copy of its embeddings.

    transformers (5.23) uses such a head even where config.json says that it is tied, and ties one that is the same.
    """
    if not {HEAD, EMBEDDINGS} <= tensors.keys():
        return HEAD in tensors
    head, embeddings = tensors[HEAD].read(), tensors[EMBEDDINGS].read()
    return head.dtype != embeddings.dtype or not torch.equal(head, embeddings)


def hash_weights(path: str | Path, *, version: str = FINGERPRINT_VERSION) -> str:
    """Return a hash that identifies a checkpoint: of all names, shapes and vectors, and the first row of each matrix.

    It describes what is loaded: the number of files, the spelling of the names, and a copy of the embeddings as LM
    head make no difference. It contains a row of each matrix and not all of it, so that the fingerprint of a 4B takes
    a second and not a minute; merging an adapter changes it.

    Args:
        version: "" for the first one, of which older run.json files contain fingerprints. It depends on the spelling
            of the names and on the files.

    Raises:
        PokegemmaError: the weights cannot be read.
    """
    if version:
        tensors = tensors_by_name(path)
        if not has_own_head(tensors):
            tensors.pop(HEAD, None)
        named = sorted(tensors.items())
    else:
        named = [(tensor.name, tensor) for tensor in stored_tensors(path)]
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(f"{name}{tensor.shape}".encode())
        digest.update(tensor.beginning())
    return version + digest.hexdigest()


@dataclass(frozen=True)
class StoredCheckpoint:
    """What a checkpoint of any kind has.

    Attributes:
        path: a folder or a Hub id.
        config: as its config.json has it.
    """

    path: str
    config: PreTrainedConfig

    @property
    def is_quantised(self) -> bool:
        """Whether the weights are stored quantised."""
        return bool(getattr(self.config, "quantization_config", None) or getattr(self.config, "quantization", None))

    def weights_fingerprint(self) -> str:
        """Return a hash that identifies the stored weights; see `hash_weights`.

        Raises:
            PokegemmaError: they cannot be read.
        """
        return hash_weights(self.path)

    def has_fingerprint(self, fingerprint: str) -> bool:
        """Return whether the stored weights have a fingerprint, which an earlier version may have taken.

        Raises:
            PokegemmaError: they cannot be read.
        """
        version = FINGERPRINT_VERSION if fingerprint.startswith(FINGERPRINT_VERSION) else ""
        return hash_weights(self.path, version=version) == fingerprint
