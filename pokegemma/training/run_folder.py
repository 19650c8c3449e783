"""The output folder of a training run: what may be overwritten, and what may be continued."""

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from pokegemma.errors import PokegemmaError
from pokegemma.provenance import read_run_record
from pokegemma.training.options import LAST_CHECKPOINT

logger = logging.getLogger(__name__)

_FIXED_OPTIONS = (
    "layout",
    "image_size",
    "finetuning",
    "lora_r",
    "lora_alpha",
    "lora_target_modules",
    "train_vision_tower",
    "train_projector",
    "use_dora",
    "use_rslora",
)


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole checkpoint in `folder`; one that was cut off while it was written does not count."""
    checkpoints = [path.parent for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")]
    return max(checkpoints, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def check_output(folder: Path, *, sources: Sequence[Path], overwrite: bool, resume: str | None) -> Path | None:
    """Return the checkpoint to continue from, or None; delete nothing.

    Args:
        sources: the files and folders that training reads; `folder` must hold none of them.

    Raises:
        PokegemmaError: there is no such checkpoint, `folder` holds what training needs, or a run is in the way.
    """
    for source in sources:
        if source.resolve().is_relative_to(folder.resolve()):
            raise PokegemmaError(f"--output_dir {folder} holds {source}, which training reads; choose another")
    last = last_checkpoint(folder)
    if resume is not None:
        checkpoint = last if resume in LAST_CHECKPOINT else Path(resume)
        if checkpoint is None or not (checkpoint / TRAINER_STATE_NAME).is_file():
            raise PokegemmaError(f"--resume_from_checkpoint: no checkpoint in {checkpoint or folder}")
        return checkpoint
    record = read_run_record(folder) or {}
    if record and record.get("stage") != "train":
        raise PokegemmaError(f"{folder} holds the result of another step ({record.get('stage')}); choose another")
    if (last or record) and not overwrite:
        raise PokegemmaError(
            f"{folder} holds an earlier run; continue it with --resume_from_checkpoint, delete it with "
            "--overwrite, or choose another --output_dir"
        )
    return None


def clear_output(folder: Path) -> None:
    """Delete an earlier run in `folder`: in the first process, while the others wait.

    Raises:
        PokegemmaError: the folder cannot be written.
    """
    state = PartialState()
    if state.is_main_process:
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PokegemmaError(f"{folder} could not be written: {error.strerror}") from error
    state.wait_for_everyone()


def check_resumed(checkpoint: Path, *, options: dict[str, Any], facts: dict[str, Any]) -> None:
    """Refuse to continue a run on another base model, with other data, layout, picture size or adapter.

    Raises:
        PokegemmaError: one of them is not that of the run's run.json.
    """
    record = read_run_record(checkpoint)
    if record is None:
        logger.warning("%s: no run.json beside it; whether model and data are the same is not known", checkpoint)
        return
    before = {name: record.get("options", {}).get(name) for name in _FIXED_OPTIONS}
    before |= {"base model": record.get("base_fingerprint"), "dataset": (record.get("dataset") or {}).get("sha256")}
    now = {name: options[name] for name in _FIXED_OPTIONS}
    now |= {"base model": facts["base_fingerprint"], "dataset": facts["dataset"]["sha256"]}
    changed = [name for name in now if now[name] != before[name]]
    if changed:
        values = ", ".join(f"{name} was {before[name]}, is {now[name]}" for name in changed)
        raise PokegemmaError(f"--resume_from_checkpoint: not the run of {checkpoint}: {values}")
