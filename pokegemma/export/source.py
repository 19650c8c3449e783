"""Check that a checkpoint can be exported, and give its weights to converters under published names."""

import functools
import json
import struct
from collections.abc import Callable, Set
from pathlib import Path
from typing import IO

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from pokegemma.errors import PokegemmaError
from pokegemma.gemma.families import FAMILIES
from pokegemma.gemma.loading import Checkpoint, open_checkpoint
from pokegemma.gemma.text import TEXT_MODEL
from pokegemma.gemma.text.checkpoint import TextCheckpoint
from pokegemma.gemma.weight_files import (
    HEAD,
    StoredTensor,
    has_own_head,
    published_name,
    stored_tensors,
    tensors_by_name,
    weight_files,
)
from pokegemma.provenance import read_run_record

PUBLISHED_HEAD, PUBLISHED_EMBEDDINGS = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"

_TOKENIZER_FILES = (("tokenizer.json",), ("tokenizer_config.json",))
_PROCESSOR_FILES = (*_TOKENIZER_FILES, ("processor_config.json", "preprocessor_config.json"))
_COPY_BYTES = 16 * 2**20


def _renaming(path: Path) -> Callable[[str], str]:
    """Return what gives the tensors of a checkpoint their published names; a model for text alone has others."""
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    return functools.partial(published_name, text_alone=config.get("model_type") == TEXT_MODEL)


def exported_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a checkpoint by their published names, without an LM head that is only a copy.

    Raises:
        PokegemmaError: a file of the weights is missing or damaged.
    """
    tensors = tensors_by_name(path)
    if not has_own_head(tensors):
        tensors.pop(HEAD, None)
    rename = _renaming(path)
    return {rename(name): tensor for name, tensor in tensors.items()}


def staged_bytes(path: Path) -> int:
    """Return the space that `stage_weights` takes: that of copies, or none where links will do.

    Links will do where all tensors have the names that llama.cpp and mlx-vlm read, and all of them are wanted.
    """
    if {tensor.name for tensor in stored_tensors(path)} == exported_tensors(path).keys():
        return 0
    return sum(file.stat().st_size for file in weight_files(path))


def stage_weights(path: Path, folder: Path) -> None:
    """Put the weights of a checkpoint into `folder` for a converter: links, or copies with published names.

    A checkpoint-N of full fine-tuning needs copies: its tensors have the names of transformers 5, which converters do
    not know. https://github.com/ggml-org/llama.cpp/issues/22656
    """
    files = weight_files(path)
    if not staged_bytes(path):
        for file in [*files, *([] if files[0].name == SAFE_WEIGHTS_NAME else [path / SAFE_WEIGHTS_INDEX_NAME])]:
            (folder / file.name).symlink_to(file.resolve())
        return
    wanted, rename = exported_tensors(path).keys(), _renaming(path)
    places = {name: file.name for file in files for name in _copy_renamed(file, folder / file.name, rename, wanted)}
    if files[0].name != SAFE_WEIGHTS_NAME:
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(
            json.dumps({"metadata": {}, "weight_map": places}), encoding="utf-8"
        )


def _copy_renamed(source: Path, target: Path, rename: Callable[[str], str], wanted: Set[str]) -> list[str]:
    """Copy those tensors of a safetensors file that are `wanted`, by the names that `rename` gives, and return these.

    The file is a length of 8 bytes, a JSON header, then the data. It is copied piece by piece: a 4B in float32 has
    16 GB.
    """
    with source.open("rb") as file, target.open("wb") as output:
        (length,) = struct.unpack("<Q", file.read(8))
        stored = json.loads(file.read(length))
        renamed, ranges, end = {"__metadata__": stored.pop("__metadata__", {})}, [], 0
        for name, entry in sorted(stored.items(), key=lambda item: item[1]["data_offsets"]):
            if rename(name) not in wanted:
                continue
            start, stop = entry["data_offsets"]
            renamed[rename(name)] = {**entry, "data_offsets": [end, end + stop - start]}
            ranges.append((8 + length + start, stop - start))
            end += stop - start
        header = json.dumps(renamed).encode()
        header += b" " * (-len(header) % 8)
        output.write(struct.pack("<Q", len(header)) + header)
        for start, size in ranges:
            _copy_range(file, output, start=start, size=size)
    return [name for name in renamed if name != "__metadata__"]


def _copy_range(file: IO[bytes], output: IO[bytes], *, start: int, size: int) -> None:
    file.seek(start)
    while size > 0:
        size -= output.write(file.read(min(size, _COPY_BYTES)))


def open_exportable(
    path: Path, *, target: str, opener: Callable[[Path], Checkpoint | TextCheckpoint] = open_checkpoint
) -> Checkpoint | TextCheckpoint:
    """Open a Gemma 3 in full precision.

    Args:
        target: what it shall become, for the message.
        opener: `open_checkpoint`, or `open_gemma` where a model without vision will do, too.

    Raises:
        PokegemmaError: it is an adapter, quantised, of another family, or lacks a file of its processor.
    """
    if not path.is_dir():
        raise PokegemmaError(f"--model_path {path}: no such folder")
    checkpoint = opener(path)
    if checkpoint.family is not FAMILIES["gemma3"]:
        raise PokegemmaError(f"{path} is a {checkpoint.family.name}; only Gemma 3 is converted to {target} here")
    if checkpoint.is_quantised:
        raise PokegemmaError(f"{path}: its weights are quantised; convert the full-precision checkpoint")
    needed = _TOKENIZER_FILES if isinstance(checkpoint, TextCheckpoint) else _PROCESSOR_FILES
    missing = [names[0] for names in needed if not any((path / name).is_file() for name in names)]
    if missing:
        base = recorded_base(path)
        raise PokegemmaError(
            f"{path}: {', '.join(missing)} not found; copy from the base checkpoint{f', {base}' if base else ''}"
        )
    return checkpoint


def recorded_base(path: Path) -> str | None:
    """Return the base of the training run that wrote a checkpoint, where its run.json exists."""
    return (read_run_record(path) or {}).get("base_model")
