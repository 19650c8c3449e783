"""Where runs are logged (wandb_config.yaml, read here only), under which id, and what an offline run holds."""

import json
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from pokegemma.errors import PokegemmaError
from pokegemma.provenance import PROJECT_ROOT, read_run_record
from pokegemma.training.run_folder import last_checkpoint

logger = logging.getLogger(__name__)

CONFIG_FILE = PROJECT_ROOT / "wandb_config.yaml"
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
    """Give Weights & Biases the settings of wandb_config.yaml, where a run is logged there.

    Raises:
        PokegemmaError: that file or a variable of the environment is at fault.
    """
    if "wandb" not in report_to:
        return
    wandb_timeouts_s()
    if os.environ.get("WANDB_WATCH", "false") != "false":
        logger.warning("WANDB_WATCH=%s is not used: it logs in every backward pass", os.environ["WANDB_WATCH"])
        os.environ["WANDB_WATCH"] = "false"  # an error of W&B would end training there
    if not CONFIG_FILE.is_file():
        return
    settings = read_tracking()
    for name in _SETTINGS:
        if value := settings.get(name):
            text = ",".join(value) if isinstance(value, list) else str(value)
            os.environ.setdefault(f"WANDB_{name.upper()}", text)


def wandb_timeouts_s() -> tuple[float, float]:
    """Return how long W&B may take to begin and to end a run: WANDB_INIT_TIMEOUT and WANDB_FINISH_TIMEOUT, else 60 s.

    W&B's own defaults are 90 s, after which training would end, and no limit.

    Raises:
        PokegemmaError: one of them is not a number of seconds.
    """
    timeouts = []
    for name in ("WANDB_INIT_TIMEOUT", "WANDB_FINISH_TIMEOUT"):
        text = os.environ.get(name) or "60"
        try:
            timeouts.append(float(text))
        except ValueError:
            timeouts.append(math.nan)
        if not 0 < timeouts[-1] < math.inf:
            raise PokegemmaError(f"{name}={text}: must be a number of seconds above 0")
    return timeouts[0], timeouts[1]


def earlier_run_id(folder: Path, checkpoint: Path | None) -> str | None:
    """Return W&B's id of the run in `folder`, which goes on from `checkpoint` (None: from the start).

    None where it goes on from an older checkpoint than its last one, or in another folder: that makes another run, as
    W&B takes no step a second time.
    """
    last = last_checkpoint(folder)
    if checkpoint is not None and (last is None or checkpoint.resolve() != last.resolve()):
        return None
    return (read_run_record(folder) or {}).get("wandb_run_id")


def make_run_id(report_to: list[str], earlier_id: str | None) -> str | None:
    """Return W&B's id of a run: WANDB_RUN_ID (an agent of a sweep sets it), that of the earlier part, or a new one."""
    if "wandb" not in report_to:
        return earlier_id
    from wandb.sdk.lib.runid import generate_id

    return os.environ.get("WANDB_RUN_ID") or earlier_id or generate_id()


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
