"""run.json of a training run: what it is made from, and whether a resumed run is made from the same."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pokegemma.errors import PokegemmaError
from pokegemma.gemma.loading import open_checkpoint
from pokegemma.provenance import read_run_record, write_run_record

logger = logging.getLogger(__name__)

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
    "learning_rate",  # a checkpoint contains it twice, in the optimizer and in the schedule: another would be ignored
)
_FIXED_TRAJECTORY_OPTIONS = ("max_decisions", "overlap_decisions")


@dataclass
class RunRecord:
    """run.json in the output folder, written again when the status of the run changes.

    Attributes:
        options: as they were resolved before training.
        facts: about the inputs; steps of the run add to them.
        is_written: whether this process writes the file; the first one does.
        earlier_id: the tracker's id of the run that is resumed.
    """

    folder: Path
    options: dict[str, Any]
    facts: dict[str, Any]
    is_written: bool = True
    earlier_id: str | None = None

    def write(self, status: str, **results: Any) -> None:
        """Replace run.json by one with this status ("running", "interrupted" or "completed") and these results."""
        if self.is_written:
            write_run_record(self.folder, stage="train", options=self.options, **self.facts, status=status, **results)


def check_resumed(folder: Path, *, options: dict[str, Any], facts: dict[str, Any]) -> None:
    """Refuse to continue a run with another base model, or other data, layout, pictures or adapter.

    Args:
        folder: the output folder, or a checkpoint-N in it.

    Raises:
        PokegemmaError: one of them differs from run.json.
    """
    record = read_run_record(folder)
    if record is None:
        logger.warning("%s: no run.json next to it, so model and data are not compared", folder)
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
    refuse_changes(folder, before, now)


def refuse_changes(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to continue the run of a folder where a value differs; both dictionaries have the same keys.

    Raises:
        PokegemmaError: some differ; all of them are named.
    """
    changed = [name for name in now if now[name] != before[name]]
    if changed:
        values = ", ".join(f"{name} was {before[name]}, is {now[name]}" for name in changed)
        raise PokegemmaError(f"--resume_from_checkpoint: {folder} is from a run with other options: {values}")
