"""Which checkpoints can be exported at all, and which files hold their weights."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from transformers import Gemma3Config
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from pokegemma.errors import PokegemmaError
from pokegemma.gemma.checkpoint_files import open_weights, published_name, read_family, weight_files
from pokegemma.gemma.families import FAMILIES
from pokegemma.gemma.loading import load_config
from pokegemma.provenance import read_run_record

PUBLISHED_HEAD, PUBLISHED_EMBEDDINGS = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"

_PROCESSOR_FILES = (
    ("tokenizer.json",),
    ("tokenizer_config.json",),
    ("processor_config.json", "preprocessor_config.json"),
)
_COPY_BYTES = 16 * 2**20


def _has_head_of_its_own(path: Path) -> bool:
    """Return whether a checkpoint stores an LM head with other values than its embeddings.

    transformers (5.23) uses such a head even where config.json says that it is tied, and ties one that is the same.
    """
    names = {published_name(name) for _, weights in open_weights(path) for name in weights.keys()}  # noqa: SIM118
    if not {PUBLISHED_HEAD, PUBLISHED_EMBEDDINGS} <= names:
        return PUBLISHED_HEAD in names
    head, embeddings = (
        next(
            weights.get_tensor(name)
            for _, weights in open_weights(path)
            for name in weights.keys()  # noqa: SIM118
            if published_name(name) == wanted
        )
        for wanted in (PUBLISHED_HEAD, PUBLISHED_EMBEDDINGS)
    )
    return head.dtype != embeddings.dtype or not torch.equal(head, embeddings)


def open_tensors(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the published name and a slice of each tensor of a checkpoint, without an LM head that is only a copy.

    A slice has `get_shape()`; `[:]` reads it.

    Raises:
        PokegemmaError: as `open_weights`.
    """
    has_head = _has_head_of_its_own(path)
    for _, weights in open_weights(path):
        for stored in weights.keys():  # noqa: SIM118
            if has_head or published_name(stored) != PUBLISHED_HEAD:
                yield published_name(stored), weights.get_slice(stored)


def staged_bytes(path: Path) -> int:
    """Return the space that `stage_weights` takes: that of copies, or none where links will do.

    Links will do where all tensors have the names that llama.cpp and mlx-vlm read, and all of them are wanted.
    """
    stored = {name for _, weights in open_weights(path) for name in weights.keys()}  # noqa: SIM118
    if stored == {name for name, _ in open_tensors(path)}:
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
    wanted = {name for name, _ in open_tensors(path)}
    places = {name: file.name for file in files for name in _copy_renamed(file, folder / file.name, wanted)}
    if files[0].name != SAFE_WEIGHTS_NAME:
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(
            json.dumps({"metadata": {}, "weight_map": places}), encoding="utf-8"
        )


def _copy_renamed(source: Path, target: Path, wanted: set[str]) -> list[str]:
    """Copy those tensors of a safetensors file that are `wanted`, by their published names, and return these.

    The file is a length of 8 bytes, a JSON header, then the data. It is copied piece by piece: a 4B in float32 has
    16 GB.
    """
    with source.open("rb") as file, target.open("wb") as output:
        (length,) = struct.unpack("<Q", file.read(8))
        stored = json.loads(file.read(length))
        renamed, ranges, end = {"__metadata__": stored.pop("__metadata__", {})}, [], 0
        for name, entry in sorted(stored.items(), key=lambda item: item[1]["data_offsets"]):
            if published_name(name) not in wanted:
                continue
            start, stop = entry["data_offsets"]
            renamed[published_name(name)] = {**entry, "data_offsets": [end, end + stop - start]}
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


def load_exportable_config(path: Path, *, target: str) -> Gemma3Config:
    """Return the config of a Gemma 3 in full precision; `target` is what it shall become, for the error.

    Raises:
        PokegemmaError: it is an adapter, quantised, of another family, or lacks a file of its processor.
    """
    if not path.is_dir():
        raise PokegemmaError(f"--model_path {path}: no such folder")
    if (path / "adapter_config.json").is_file():
        raise PokegemmaError(f"{path} is an adapter; merge it first: scripts/merge_qlora.py --lora_path {path}")
    family = read_family(path)
    if family is not FAMILIES["gemma3"]:
        raise PokegemmaError(f"{path} is a {family.name}; only Gemma 3 is converted to {target} here")
    config = load_config(path)
    if getattr(config, "quantization_config", None) or getattr(config, "quantization", None):
        raise PokegemmaError(f"{path}: its weights are quantised; convert the full-precision checkpoint")
    missing = [names[0] for names in _PROCESSOR_FILES if not any((path / name).is_file() for name in names)]
    if missing:
        base = recorded_base(path)
        raise PokegemmaError(
            f"{path}: {', '.join(missing)} not found; copy from the base checkpoint{f', {base}' if base else ''}"
        )
    return config


def recorded_base(path: Path) -> str | None:
    """Return the base of the training run that wrote a checkpoint, where its run.json is there."""
    return (read_run_record(path) or {}).get("base_model")
