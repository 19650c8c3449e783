"""The training run that is checked before it is started."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pokegemma.data.checks.records import Split
from pokegemma.data.trajectories import cut_trajectories
from pokegemma.gemma.batches.collator import Example
from pokegemma.training.options import RunOptions, TrainingOptions


@dataclass
class OneProcessOptions(TrainingOptions):
    """The options of training as the checks read them: in one process, which shards nothing."""

    def __post_init__(self) -> None:
        self.deepspeed = self.fsdp = None
        super().__post_init__()


@dataclass(frozen=True)
class PlannedRun:
    """The training run to be checked.

    Attributes:
        num_workers: processes that decode pictures in the checks.
        step_command: starts the training script; None leaves out the one step.
    """

    options: RunOptions
    train: Split
    held_out: Split | None
    contact_sheet: Path
    num_workers: int
    step_command: Sequence[str] | None

    @property
    def splits(self) -> list[Split]:
        return [split for split in (self.train, self.held_out) if split is not None]

    @property
    def eval_batch_size(self) -> int:
        """The batch size of the evaluation; 0 where training does not evaluate."""
        training = self.options.training
        return training.per_device_eval_batch_size if self.held_out and training.evaluates else 0

    @property
    def bytes_per_weight(self) -> int:
        return 2 if self.options.model.dtype == "bfloat16" else 4

    def rows(self, split: Split) -> Iterator[tuple[str, Example]]:
        """Yield each row of training and where it is in the file, such as "train.jsonl:42"."""
        data = self.options.data
        if data.layout != "trajectory":
            yield from split.located()
            return
        cut = cut_trajectories(split.samples(), max_decisions=data.max_decisions, overlap=data.overlap_decisions)
        yield from ((split.path.name, trajectory) for trajectory in cut)
