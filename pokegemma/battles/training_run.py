"""What all training of battle policies shares: output folder, run.json, resuming, trackers, a stop on a signal."""

import csv
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import Trainer

from pokegemma.battles.policy.checkpoint import PolicyCheckpoint
from pokegemma.battles.trajectories.packed import PackedTrajectories
from pokegemma.outputs import atomic_file
from pokegemma.provenance import read_run_record
from pokegemma.training.options import TrainingOptions
from pokegemma.training.parallel_mode import check_requested_mode, use_one_gpu
from pokegemma.training.run_folder import check_output, clear_output, clear_unfinished, full_disk_explained
from pokegemma.training.run_record import RunRecord, refuse_changes
from pokegemma.training.stop_on_signal import StopOnSignal
from pokegemma.training.tracking.settings import earlier_run_id, make_run_id, track
from pokegemma.training.tracking.trackers import guarded_trackers

logger = logging.getLogger(__name__)


METRICS_CSV = "metrics.csv"


def find_evaluation(trainer: Trainer, name: str) -> dict[str, float] | None:
    """Return the log entry with the value `name` that is of the model to be saved; None where nothing was evaluated."""
    evaluations = [entry for entry in trainer.state.log_history if name in entry]
    if trainer.args.load_best_model_at_end and trainer.state.best_global_step:
        evaluations = [entry for entry in evaluations if entry["step"] == trainer.state.best_global_step]
    return evaluations[-1] if evaluations else None


@dataclass(frozen=True)
class TrainingRun:
    """A run's record, and the checkpoint to continue from; None to start."""

    record: RunRecord
    resume_from: Path | None

    def clear_folder(self) -> None:
        """Delete an earlier run in the output folder, or what a killed one left unfinished."""
        if self.resume_from is None:
            clear_output(self.record.folder)
        else:
            clear_unfinished(self.record.folder)

    def train(self, trainer: Trainer, stop: StopOnSignal, *, finish: Callable[[], dict[str, Any]]) -> bool:
        """Train until the end or a signal, and write the result and the record.

        Args:
            stop: one of the trainer's callbacks.
            finish: saves what was trained to its end, and returns what run.json records of it.

        Returns:
            Whether training finished.
        """
        record = self.record
        record.facts["wandb_run_id"] = make_run_id(trainer.args.report_to, record.earlier_id)
        record.write("running")
        trackers = guarded_trackers(trainer, run_id=record.facts["wandb_run_id"], earlier_id=record.earlier_id)
        with full_disk_explained(record.folder), stop, trackers:
            trainer.train(resume_from_checkpoint=self.resume_from and str(self.resume_from))
            results = {} if stop.stopped else finish()
            if record.is_written:
                write_logged_metrics(record.folder / METRICS_CSV, trainer.state.log_history)
            status = "interrupted" if stop.stopped else "completed"
            record.write(status, global_step=trainer.state.global_step, **results)
        trainer.accelerator.end_training()
        return not stop.stopped


def write_logged_metrics(path: Path, log_history: Sequence[Mapping[str, float]]) -> None:
    """Write the entries of `TrainerState` as CSV, one a line, with a column for each name in them."""
    names = dict.fromkeys(["step", *(name for entry in log_history for name in entry)])
    with atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(names), lineterminator="\n")
        writer.writeheader()
        writer.writerows(log_history)


def describe_inputs(base: PolicyCheckpoint, battles: PackedTrajectories, folder: Path, *, seed: int) -> dict[str, Any]:
    """Return what run.json records of a model and of the battles that were packed in `folder`."""
    return {
        "base_model": base.path,
        "base_fingerprint": base.weights_fingerprint(),
        "seed": seed,
        "dataset": {"path": str(folder.resolve()), "sha256": battles.digest(), "num_battles": len(battles)},
    }


def open_run(
    training: TrainingOptions,
    *,
    options: dict[str, Any],
    read_facts: Callable[[], dict[str, Any]],
    sources: Sequence[Path],
    overwrite: bool,
    fixed: Sequence[str],
) -> TrainingRun:
    """Check the options and the output folder, read the inputs, and compare them with those of a run to continue.

    Args:
        read_facts: returns what run.json records of the inputs; called once the folder can be used.
        sources: what training reads.
        fixed: names of options that a run must have as before to be continued; "base_fingerprint" and the battles'
            hash are compared, too.

    Raises:
        PokegemmaError: the parallel mode is not available, the folder cannot be used, or the earlier run had others.
    """
    check_requested_mode(training)
    track(training.report_to)
    use_one_gpu(training)
    folder = Path(training.output_dir)
    resume_from = check_output(folder, sources=sources, overwrite=overwrite, resume=training.resume_from_checkpoint)
    record = RunRecord(folder, options, read_facts(), is_written=training.process_index == 0)
    if training.resume_from_checkpoint is not None:
        _check_resumed(resume_from or folder, record, fixed)
        record.earlier_id = earlier_run_id(folder, resume_from)
    return TrainingRun(record, resume_from)


def _check_resumed(folder: Path, record: RunRecord, fixed: Sequence[str]) -> None:
    earlier = read_run_record(folder)
    if earlier is None:
        logger.warning("%s: no run.json next to it, so model and battles are not compared", folder)
        return
    before = {name: earlier.get("options", {}).get(name) for name in fixed}
    before |= {"base model": earlier.get("base_fingerprint"), "battles": (earlier.get("dataset") or {}).get("sha256")}
    now = {name: record.options[name] for name in fixed}
    now |= {"base model": record.facts["base_fingerprint"], "battles": record.facts["dataset"]["sha256"]}
    if "encoder" in earlier:  # of offline reinforcement learning; the base model is only a part of it
        before["encoder"], now["encoder"] = earlier["encoder"], record.facts["encoder"]
    refuse_changes(folder, before, now)
