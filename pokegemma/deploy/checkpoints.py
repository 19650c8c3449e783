"""Which checkpoints can be exported at all, and which files hold their weights."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import Gemma3Config

from pokegemma.errors import PokegemmaError
from pokegemma.training.families import FAMILIES
from pokegemma.training.models import load_config, read_family

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


def weight_files(path: Path) -> list[Path]:
    """Return the files of a checkpoint's weights that transformers reads: one file, else those that an index names.

    Raises:
        PokegemmaError: there are none, one is missing, or the index is damaged.
    """
    if (path / _WEIGHTS).is_file():
        return [path / _WEIGHTS]
    index = path / _INDEX
    if not index.is_file():
        raise PokegemmaError(f"{path}: no weights ({_WEIGHTS} or {_INDEX}) in it")
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        files = [path / name for name in sorted(names)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PokegemmaError(f"{index} is damaged: {error}") from error
    if missing := [file.name for file in files if not file.is_file()]:
        raise PokegemmaError(f"{path}: {', '.join(missing)} not found, which {_INDEX} names")
    return files


def unread_files(path: Path) -> set[str]:
    """Return the names of *.safetensors and indexes beside `weight_files`: converters would read them, too."""
    read = {file.name for file in weight_files(path)}
    if _WEIGHTS not in read:
        read.add(_INDEX)
    return {
        file.name for pattern in ("*.safetensors", "*.safetensors.index.json") for file in path.glob(pattern)
    } - read


def open_weights(path: Path) -> Iterator[tuple[Path, Any]]:
    """Yield each of `weight_files`, and it opened.

    Raises:
        PokegemmaError: as there, or one cannot be read.
    """
    for file in weight_files(path):
        try:
            with safe_open(file, framework="pt") as weights:
                yield file, weights
        except (OSError, SafetensorError) as error:
            raise PokegemmaError(f"{file}: the weights cannot be read: {error}") from error


def load_exportable_config(path: Path, *, target: str) -> Gemma3Config:
    """Return the config of a Gemma 3 in full precision; `target` is what it shall become, for the error.

    Raises:
        PokegemmaError: it is an adapter, quantised, or of another family.
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
    return config
