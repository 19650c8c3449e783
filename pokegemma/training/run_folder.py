"""The output folder of a training run: what may be overwritten, and what may be continued."""

import contextlib
import logging
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from pokegemma.errors import PokegemmaError, is_disk_full
from pokegemma.outputs import RUN_FILE, refuse_to_replace, require_folder
from pokegemma.provenance import read_run_record
from pokegemma.training.options import LAST_CHECKPOINT

logger = logging.getLogger(__name__)

_MAX_NAMED = 3

COMPLETE_FILE = "complete"
"""A file in a checkpoint-N folder, written once every process has written its part; see `WholeCheckpoints`."""

DATASET_CACHE = "dataset_cache"
"""The folder of a run's rows, in its output folder."""


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint in `folder`; None where there is none."""
    checkpoints = [path.parent for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{COMPLETE_FILE}")]
    return max(checkpoints, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def check_output(folder: Path, *, sources: Sequence[Path], overwrite: bool, resume: str | None) -> Path | None:
    """Return the checkpoint to continue from, or None to start. Nothing is deleted.

    A run that was killed before its first checkpoint starts again when it is resumed.

    Args:
        sources: the files and folders that training reads; `folder` must not contain any of them.

    Raises:
        PokegemmaError: there is no such checkpoint, `folder` is a file, or contains a source, an earlier run or other
            files.
    """
    require_folder(folder)
    refuse_to_replace(folder, *sources)
    last, record = last_checkpoint(folder), read_run_record(folder) or {}
    if resume is not None:
        checkpoint = last if resume in LAST_CHECKPOINT else Path(resume)
        if checkpoint is None and record.get("stage") == "train" and record.get("status") == "running":
            logger.warning("%s: the run was killed before its first checkpoint, so it begins again", folder)
        elif checkpoint is None:
            raise PokegemmaError(f"--resume_from_checkpoint: no checkpoint in {folder}; leave this flag out to begin")
        elif not (checkpoint / COMPLETE_FILE).is_file():
            raise PokegemmaError(f"--resume_from_checkpoint: {checkpoint} is not a complete checkpoint; choose another")
        return checkpoint
    if record and record.get("stage") != "train":
        raise PokegemmaError(f"{folder} contains a result of {record.get('stage')}; choose another --output_dir")
    if (last or record) and not overwrite:
        raise PokegemmaError(
            f"{folder} contains an earlier run; continue it with --resume_from_checkpoint, delete it with "
            "--overwrite, or choose another --output_dir"
        )
    if not (last or record) and (foreign := _foreign_entries(folder)):
        named = ", ".join(foreign[:_MAX_NAMED]) + (" ..." if len(foreign) > _MAX_NAMED else "")
        raise PokegemmaError(
            f"--output_dir {folder} contains files that are not from a training run ({named}); choose an empty folder"
        )
    return None


def _foreign_entries(folder: Path) -> list[str]:
    """Return the names in `folder`, sorted, of files that an interrupted run cannot have left."""
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
    state.wait_for_everyone()  # until all processes have looked for an earlier run
    if state.is_main_process:
        try:
            _delete_checkpoints(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
            entries = folder.iterdir() if folder.is_dir() else []
            for path in sorted(entries, key=lambda path: path.name == RUN_FILE):  # last: it marks the folder as a run's
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PokegemmaError(f"{folder} could not be written: {error.strerror}") from error
    state.wait_for_everyone()


def clear_unfinished(folder: Path) -> None:
    """Delete half-written files of a killed process in `folder`: in the first process, while the others wait.

    The trainer would keep an incomplete checkpoint, and delete a complete one instead.
    """
    state = PartialState()
    state.wait_for_everyone()
    if state.is_main_process:
        checkpoints = sorted(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
        cut_off = [path for path in checkpoints if not (path / COMPLETE_FILE).is_file()]
        for path in cut_off:
            logger.warning("%s is incomplete, since its process was killed; it is deleted", path)
        _delete_checkpoints(cut_off)
        for path in folder.glob(".*.part"):
            path.unlink(missing_ok=True)
    state.wait_for_everyone()


@contextlib.contextmanager
def full_disk_explained(folder: Path) -> Iterator[None]:
    """Report a full disk in a block that writes a run to `folder`, with what is complete and how to continue.

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
        (path / COMPLETE_FILE).unlink(missing_ok=True)  # first, so that the rest no longer counts as complete
        shutil.rmtree(path, ignore_errors=True)


class WholeCheckpoints:
    """Whole or ignored checkpoints, for a trainer: before transformers' Trainer among the bases of a class."""

    def _run_epoch(self, *args: Any, **options: Any) -> None:
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **options)
        else:  # continued from its last step: transformers would train one step more before it checks
            self.control.should_training_stop = True

    def _save_checkpoint(self, *args: Any, **options: Any) -> None:
        """Save a checkpoint, mark it complete once every process has written its part, then delete older ones.

        transformers deletes them as soon as the first process has finished. A run that is killed at that moment could
        have no complete checkpoint.
        """
        folder = Path(self.args.output_dir)
        mark = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}" / COMPLETE_FILE
        if self.args.should_save:
            mark.unlink(missing_ok=True)  # an earlier run may have written this one
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        super()._save_checkpoint(*args, **options)
        self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark.touch()
            rotate_checkpoints(
                folder, save_total_limit=limit, best_model_checkpoint=self.state.best_model_checkpoint, use_mtime=True
            )
