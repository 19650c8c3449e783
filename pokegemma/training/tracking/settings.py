"""Settings of Weights & Biases (wandb_config.yaml, read here only), ids of runs, and the summary of an offline run."""

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

import yaml

from pokegemma.errors import PokegemmaError
from pokegemma.provenance import PROJECT_ROOT, read_run_record
from pokegemma.training.run_folder import last_checkpoint

logger = logging.getLogger(__name__)

WANDB_CONFIG_FILE = PROJECT_ROOT / "wandb_config.yaml"
SUMMARY_FILE = "wandb-summary.json"
_SETTINGS = ("project", "entity", "tags", "mode")


def read_tracking(path: Path = WANDB_CONFIG_FILE) -> dict[str, Any]:
    """Return the settings of wandb_config.yaml; WANDB_PROJECT, WANDB_ENTITY, WANDB_TAGS and WANDB_MODE override them.

    Raises:
        PokegemmaError: the file is missing, or is not YAML with settings.
    """
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise PokegemmaError(f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise PokegemmaError(f"{path}: must contain settings (project, entity, tags, mode, sweep)")
    for name in _SETTINGS:
        if value := os.environ.get(f"WANDB_{name.upper()}"):
            settings[name] = value
    return settings


def track(report_to: list[str]) -> None:
    """Set the variables of Weights & Biases from wandb_config.yaml, if runs are logged there.

    Raises:
        PokegemmaError: that file or a variable of the environment is not valid.
    """
    if "wandb" not in report_to:
        return
    wandb_timeouts_s()
    if os.environ.get("WANDB_WATCH", "false") != "false":
        logger.warning(
            "WANDB_WATCH=%s is ignored: an error of its backward hooks would end training", os.environ["WANDB_WATCH"]
        )
        os.environ["WANDB_WATCH"] = "false"
    if not WANDB_CONFIG_FILE.is_file():
        return
    settings = read_tracking()
    for name in _SETTINGS:
        if value := settings.get(name):
            text = ",".join(value) if isinstance(value, list) else str(value)
            os.environ.setdefault(f"WANDB_{name.upper()}", text)


def wandb_timeouts_s() -> tuple[float, float]:
    """Return the time limits of W&B to begin and to end a run: WANDB_INIT_TIMEOUT and WANDB_FINISH_TIMEOUT, else 60 s.

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
    """Return W&B's id of the run in `folder`, which continues from `checkpoint` (None: from the start).

    None where it continues from an older checkpoint than its last one, or in another folder: that is another run, since
    W&B ignores steps that a run already has.
    """
    last = last_checkpoint(folder)
    if checkpoint is not None and (last is None or checkpoint.resolve() != last.resolve()):
        return None
    return (read_run_record(folder) or {}).get("wandb_run_id")


def make_run_id(report_to: list[str], earlier_id: str | None) -> str | None:
    """Return W&B's id of a run: WANDB_RUN_ID (set by the agent of a sweep), that of the earlier part, or a new one."""
    if "wandb" not in report_to:
        return earlier_id
    from wandb.sdk.lib.runid import generate_id

    return os.environ.get("WANDB_RUN_ID") or earlier_id or generate_id()


def read_summary(run: Path) -> dict[str, Any]:
    """Return the last value of each metric that training logged to an offline run of W&B; see WandbRun.on_log.

    Raises:
        OSError: nothing was logged.
    """
    return json.loads((run / "files" / SUMMARY_FILE).read_text(encoding="utf-8"))
