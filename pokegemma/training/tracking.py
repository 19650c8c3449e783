"""Where runs are logged (wandb_config.yaml, read here only), and what an offline run holds."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from pokegemma.errors import PokegemmaError

CONFIG_FILE = Path(__file__).resolve().parents[2] / "wandb_config.yaml"
_BLOCK_BYTES, _FULL, _LAST = 32 * 1024, 1, 4
_SETTINGS = ("project", "entity", "tags", "mode")


def read_tracking(path: Path = CONFIG_FILE) -> dict[str, Any]:
    """Return what wandb_config.yaml says; WANDB_PROJECT, WANDB_ENTITY, WANDB_TAGS and WANDB_MODE win over it.

    Raises:
        PokegemmaError: there is no such file, or it is not YAML of that kind.
    """
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise PokegemmaError(f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise PokegemmaError(f"{path}: holds no settings (project, entity, tags, mode, sweep)")
    for name in _SETTINGS:
        if value := os.environ.get(f"WANDB_{name.upper()}"):
            settings[name] = value
    return settings


def track(report_to: list[str]) -> None:
    """Give Weights & Biases the settings of wandb_config.yaml, where a run is logged there."""
    if "wandb" not in report_to or not CONFIG_FILE.is_file():
        return
    settings = read_tracking()
    for name in _SETTINGS:
        if value := settings.get(name):
            text = ",".join(value) if isinstance(value, list) else str(value)
            os.environ.setdefault(f"WANDB_{name.upper()}", text)


def read_history(run: Path) -> Iterator[dict[str, Any]]:
    """Yield what was logged to an offline run of W&B, entry by entry.

    W&B 0.31 has no Python reader. A run-*.wandb file is a LevelDB log of protobufs: a header of 7 bytes; blocks of
    32 KiB; records of checksum, length, kind and data, where kinds 2, 3 and 4 are first, middle and last parts.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = run.glob("*.wandb")
    content, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(content):
        room = _BLOCK_BYTES - position % _BLOCK_BYTES
        if room < 7:  # too little for a record: padding
            position += room
            continue
        length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (_FULL, _LAST):
            record, parts = Record.FromString(parts), b""
            if record.WhichOneof("record_type") == "history":
                yield {
                    item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }
