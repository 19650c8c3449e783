"""Options of behaviour cloning: which decisions to learn from, which model, and how."""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from pokegemma.battles.policy.text_kind import DEFAULT_TEXT, TextKind
from pokegemma.errors import PokegemmaError, check_range, check_ranges
from pokegemma.options import option
from pokegemma.training.options import RunOptions, TrainingOptions, WeightOptions

if TYPE_CHECKING:  # --help works where the packages for battles are not installed
    from pokegemma.battles.cloning.selection import BattleFilter

DEFAULT_POLICY = "google/gemma-3-270m"


def _read_day(flag: str, text: str | None) -> datetime | None:
    try:
        return None if text is None else datetime.strptime(text, "%m-%d-%Y")
    except ValueError as error:
        raise PokegemmaError(f"{flag} {text}: must be MM-DD-YYYY") from error


@dataclass
class BattleOptions:
    """Which battles to learn from."""

    trajectories_dir: str = option(..., "Folder of packed trajectories, as scripts/battles_pack.py writes it.")
    won_only: bool = option(False, "Learn from the players that won.")
    min_rating: int | None = option(None, "Learn from players of at least this rating; one without counts as 1000.")
    formats: list[str] | None = option(None, "Learn from these formats: gen1ou gen9ou. Default: all.", nargs="+")
    since: str | None = option(None, "Learn from battles of this day and later, MM-DD-YYYY.")
    until: str | None = option(None, "Learn from battles of this day and earlier, MM-DD-YYYY.")
    eval_fraction: float = option(0.05, "Share of the battles, both players' views, to evaluate on. 0: none.")
    overwrite: bool = option(False, "Delete an earlier run in --output_dir first.")

    def __post_init__(self) -> None:
        check_range("--eval_fraction", self.eval_fraction, at_least=0, below=1)
        check_range("--min_rating", self.min_rating, at_least=0)
        _read_day("--since", self.since), _read_day("--until", self.until)

    def battle_filter(self) -> "BattleFilter":
        """Return which battles to learn from."""
        from pokegemma.battles.cloning.selection import BattleFilter

        return BattleFilter(
            won_only=self.won_only,
            min_rating=self.min_rating,
            formats=None if self.formats is None else tuple(self.formats),
            since=_read_day("--since", self.since),
            until=_read_day("--until", self.until),
        )

    @property
    def folder(self) -> Path:
        return Path(self.trajectories_dir)


@dataclass
class CloningOptions(BattleOptions):
    """What to learn from battles, and how states are shown."""

    text: TextKind = option(
        DEFAULT_TEXT, "How states are written. short: with effectiveness written out. words: metamon's 87 words."
    )
    max_eval_decisions: int = option(4096, "Evaluate on at most so many decisions, evenly spread.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, "max_eval_decisions", at_least=1)


@dataclass
class PolicyModelOptions(WeightOptions):
    """Which model to train."""

    model_name_or_path: str = option(
        DEFAULT_POLICY,
        "Gemma 3 for text alone: a Hub id or a folder, such as scripts/battles_tiny_model.py writes.",
        aliases=["--model_name"],
    )


@dataclass
class CloningTrainingOptions(TrainingOptions):
    """How to train: the options of training, with other defaults."""

    output_dir: str = option("outputs/battles_policy", "Folder for checkpoints and the result.")
    per_device_train_batch_size: int = option(32, "Decisions on each device in a forward pass.")
    gradient_accumulation_steps: int = option(1, "Forward passes for each optimizer step.")
    num_train_epochs: float = option(1.0, "Passes over the data. --max_steps replaces it.")
    eval_steps: float | None = option(500, "Optimizer steps between evaluations.")
    save_steps: float = option(500, "Optimizer steps between checkpoints.")
    logging_steps: float = option(20, "Optimizer steps between log lines.")
    metric_for_best_model: str | None = option("eval_action_accuracy", "Metric that selects the best checkpoint.")
    dataloader_num_workers: int = option(0, "Processes that make batches, which is little work.")
    max_minutes: float | None = option(
        None, "End training after so many minutes, as after its last step. The learning rate follows the steps."
    )

    def __post_init__(self) -> None:
        check_range("--max_minutes", self.max_minutes, above=0)
        super().__post_init__()


@dataclass(frozen=True)
class CloningRun(RunOptions):
    """All options of a run."""

    data: CloningOptions
    training: CloningTrainingOptions
    model: PolicyModelOptions
