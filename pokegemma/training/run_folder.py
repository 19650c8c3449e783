"""The output folder of a training run: what may be overwritten, and what may be continued."""

import contextlib
import logging
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from pokegemma.errors import PokegemmaError, is_disk_full
from pokegemma.gemma.loading import open_checkpoint
from pokegemma.outputs import RUN_FILE, refuse_to_replace
from pokegemma.provenance import read_run_record
from pokegemma.training.options import LAST_CHECKPOINT

logger = logging.getLogger(__name__)

_MAX_NAMED = 3

COMPLETE_FILE = "complete"
"""What a checkpoint-N folder holds once every process has written its part of it; see `PokemonTrainer`."""

DATASET_CACHE = "dataset_cache"
"""What a run keeps its rows in, below its output folder."""

_FIXED_OPTIONS = (
    "layout",
    "image_size",
    "image_attention",
    "finetuning",
    "lora_r",
    "lora_alpha",
    "lora_target_modules",
    "train_vision_tower",
    "train_projector",
    "use_dora",
    "use_rslora",
)
_FIXED_TRAJECTORY_OPTIONS = ("max_decisions", "overlap_decisions")


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole checkpoint in `folder`; one that was cut off while it was written does not count."""
    checkpoints = [path.parent for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{COMPLETE_FILE}")]
    return max(checkpoints, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def check_output(folder: Path, *, sources: Sequence[Path], overwrite: bool, resume: str | None) -> Path | None:
    """Return the checkpoint to continue from, or None to begin; delete nothing.

    A run that was killed before its first checkpoint begins again when it is resumed.

    Args:
        sources: the files and folders that training reads; `folder` must hold none of them.

    Raises:
        PokegemmaError: there is no such checkpoint, `folder` holds what training needs, or a run is in the way.
    """
    refuse_to_replace(folder, *sources)
    last, record = last_checkpoint(folder), read_run_record(folder) or {}
    if resume is not None:
        checkpoint = last if resume in LAST_CHECKPOINT else Path(resume)
        if checkpoint is None and record.get("stage") == "train" and record.get("status") == "running":
            logger.warning("%s: killed before its first checkpoint; beginning again", folder)
        elif checkpoint is None:
            raise PokegemmaError(f"--resume_from_checkpoint: no checkpoint in {folder}; leave it out to begin")
        elif not (checkpoint / COMPLETE_FILE).is_file():
            raise PokegemmaError(f"--resume_from_checkpoint: {checkpoint} is no checkpoint, or was cut off")
        return checkpoint
    if record and record.get("stage") != "train":
        raise PokegemmaError(f"{folder} holds the result of another step ({record.get('stage')}); choose another")
    if (last or record) and not overwrite:
        raise PokegemmaError(
            f"{folder} holds an earlier run; continue it with --resume_from_checkpoint, delete it with "
            "--overwrite, or choose another --output_dir"
        )
    if not (last or record) and (foreign := _foreign_entries(folder)):
        raise PokegemmaError(
            f"--output_dir {folder} holds what is no run's ({', '.join(foreign[:_MAX_NAMED])}"
            f"{' ...' if len(foreign) > _MAX_NAMED else ''}), and would be emptied; choose another"
        )
    return None


def _foreign_entries(folder: Path) -> list[str]:
    """Return what is in `folder`, sorted, beside that which a run leaves that is killed before its run.json."""
    if folder.exists() and not folder.is_dir():
        raise PokegemmaError(f"--output_dir {folder} is a file; choose another")
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return [
        name
        for name in names
        if name != DATASET_CACHE
        and not name.startswith(f"{PREFIX_CHECKPOINT_DIR}-")
        and not (name.startswith(".") and name.endswith(".part"))
    ]


def clear_output(folder: Path) -> None:
    """Delete an earlier run in `folder`: in the first process, while the others wait.

    Raises:
        PokegemmaError: the folder cannot be written.
    """
    state = PartialState()
    state.wait_for_everyone()  # until all have looked for an earlier run
    if state.is_main_process:
        try:
            _delete_checkpoints(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
            entries = folder.iterdir() if folder.is_dir() else []
            for path in sorted(entries, key=lambda path: path.name == RUN_FILE):  # last: it says whose folder this is
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PokegemmaError(f"{folder} could not be written: {error.strerror}") from error
    state.wait_for_everyone()


def clear_unfinished(folder: Path) -> None:
    """Delete what a killed process left half-written in `folder`: in the first process, while the others wait.

    The trainer would count a cut-off checkpoint among those to keep, and delete a whole one in its place.
    """
    state = PartialState()
    state.wait_for_everyone()
    if state.is_main_process:
        checkpoints = sorted(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
        cut_off = [path for path in checkpoints if not (path / COMPLETE_FILE).is_file()]
        for path in cut_off:
            logger.warning("%s was cut off while it was written; deleted", path)
        _delete_checkpoints(cut_off)
        for path in folder.glob(".*.part"):
            path.unlink(missing_ok=True)
    state.wait_for_everyone()


@contextlib.contextmanager
def full_disk_explained(folder: Path) -> Iterator[None]:
    """Explain a full disk in a block that writes a run to `folder`: what is complete there, and how to continue.

    Raises:
        PokegemmaError: the disk is full.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not is_disk_full(error):
            raise
        checkpoint = last_checkpoint(folder)
        found = f"{checkpoint.name} is complete" if checkpoint else "no checkpoint is complete yet"
        path = Path(getattr(error, "filename", None) or folder)
        path = path if path.exists() else folder
        raise PokegemmaError(
            f"{path} could not be written, its disk is full ({shutil.disk_usage(path).free / 2**20:.0f} MiB left); "
            f"{found}: free some space, then continue with the same command and --resume_from_checkpoint"
        ) from error


def _delete_checkpoints(paths: Iterable[Path]) -> None:
    for path in paths:
        (path / COMPLETE_FILE).unlink(missing_ok=True)  # first: what is left of it does not count
        shutil.rmtree(path, ignore_errors=True)


def check_resumed(folder: Path, *, options: dict[str, Any], facts: dict[str, Any]) -> None:
    """Refuse to continue a run on another base model, with other data, layout, rows, pictures or adapter.

    Args:
        folder: the output folder, or a checkpoint-N in it.

    Raises:
        PokegemmaError: one of them is not that of the run's run.json.
    """
    record = read_run_record(folder)
    if record is None:
        logger.warning("%s: no run.json beside it; whether model and data are the same is not known", folder)
        return
    names = _FIXED_OPTIONS + (_FIXED_TRAJECTORY_OPTIONS if options["layout"] == "trajectory" else ())
    before = {name: record.get("options", {}).get(name) for name in names}
    trained_on = record.get("base_fingerprint")
    is_other = trained_on and trained_on != facts["base_fingerprint"]
    if is_other and open_checkpoint(facts["base_model"]).has_fingerprint(trained_on):
        trained_on = facts["base_fingerprint"]  # an earlier version took it
    before |= {"base model": trained_on, "dataset": (record.get("dataset") or {}).get("sha256")}
    now = {name: options[name] for name in names}
    now |= {"base model": facts["base_fingerprint"], "dataset": facts["dataset"]["sha256"]}
    changed = [name for name in now if now[name] != before[name]]
    if changed:
        values = ", ".join(f"{name} was {before[name]}, is {now[name]}" for name in changed)
        raise PokegemmaError(f"--resume_from_checkpoint: not the run of {folder}: {values}")
