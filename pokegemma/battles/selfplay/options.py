"""Options of self-play and of PSRO."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pokegemma.errors import PokegemmaError, check_range, check_ranges
from pokegemma.options import option
from pokegemma.provenance import PROJECT_ROOT

DEFAULT_CLONING = PROJECT_ROOT / "training_configs" / "battles.yaml"

_MAY_CHANGE = ("rounds", "num_responses", "num_workers", "concurrency")
"""Options that a run which is continued may have otherwise: more of the same, or the same in another time."""


@dataclass(kw_only=True)
class LearningOptions:
    """Who learns, from which battles, and how."""

    policy_path: str = option(
        ..., "Policy that learns: a whole model of scripts/sft_battles.py or an adapter, or a result of rl_battles.py."
    )
    output_dir: str = option(..., "Folder for everything. An earlier run in it with the same options is continued.")
    trainer: Literal["sft", "rl"] = option(
        "sft", "sft: scripts/sft_battles.py clones actions. rl: scripts/rl_battles.py, with the policy as encoder."
    )
    training_config: str | None = option(
        None, "YAML file with options of training. Default: training_configs/battles.yaml for sft, none for rl."
    )
    won_only: bool | None = option(
        None,
        "Learn from the players that won only. Default: true for sft; false for rl, whose critics need lost battles.",
    )
    trajectories_dir: str | None = option(None, "Trajectory files (FORMAT/NAME.json.lz4) to learn from as well.")
    num_battles: int = option(500, "Battles that are recorded for each training.")
    temperature: float = option(1.0, "Temperature of the actions of the one that learns, where battles are recorded.")
    arena_rounds: int = option(100, "Rounds of two battles that a pair plays in the arena.")
    battle_format: str = option("gen1ou", "Format as Pokémon Showdown names it: gen1ou, gen1randombattle.")
    teams_file: str | None = option(None, "Teams, for formats without random ones. Default: pokegemma's own.")
    max_turns: int = option(1000, "A longer battle ends without a winner.")
    seed: int = option(0, "Seed of battles and training.")
    concurrency: int = option(64, "Battles at once in a process.")
    num_workers: int = option(0, "Processes that play. 0: one for each core.")
    json: bool = option(False, "Print the results as JSON.")

    def __post_init__(self) -> None:
        check_ranges(self, "num_battles", "arena_rounds", "max_turns", "concurrency", at_least=1)
        check_ranges(self, "num_workers", "seed", at_least=0)
        check_range("--temperature", self.temperature, above=0, at_most=100)
        if self.won_only is None:
            self.won_only = self.trainer == "sft"

    def require_inputs(self) -> None:
        """Refuse files and folders that do not exist.

        Raises:
            PokegemmaError: one does not.
        """
        for flag, value in (("--training_config", self.training_config), ("--teams_file", self.teams_file)):
            if value is not None and not Path(value).is_file():
                raise PokegemmaError(f"{flag} {value}: no such file")
        for flag, value in (("--policy_path", self.policy_path), ("--trajectories_dir", self.trajectories_dir)):
            if value is not None and not Path(value).is_dir():
                raise PokegemmaError(f"{flag} {value}: no such folder")

    @property
    def folder(self) -> Path:
        return Path(self.output_dir)

    @property
    def config_file(self) -> Path | None:
        """The file with options of training; None: the trainer's own."""
        if self.training_config is None:
            return DEFAULT_CLONING if self.trainer == "sft" else None
        return Path(self.training_config)

    def fixed(self) -> dict[str, Any]:
        """Return the options that a run which is continued must have as before."""
        return {name: value for name, value in asdict(self).items() if name not in (*_MAY_CHANGE, "json")}


@dataclass(kw_only=True)
class SelfPlayOptions(LearningOptions):
    """Rounds of self-play."""

    rounds: int = option(3, "Rounds of play, training and comparison.")
    accept: Literal["interval", "share"] = option(
        "interval",
        "When a candidate becomes the best. interval: the lower bound of Wilson's interval of its win rate against the "
        "best is above --accept_above. share: the win rate is.",
    )
    accept_above: float = option(0.5, "See --accept; a tie is not a win.")
    compare_with: list[str] = option(
        ["max-base-power", "heuristic"], "Players that every candidate also meets, as in the arena.", nargs="+"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("--rounds", self.rounds, at_least=1, at_most=999)
        check_range("--accept_above", self.accept_above, at_least=0, below=1)


@dataclass(kw_only=True)
class PSROOptions(LearningOptions):
    """The population of PSRO."""

    population: list[str] = option(
        ["random", "max-base-power", "heuristic"], "Players of the first population, next to --policy_path.", nargs="+"
    )
    num_responses: int = option(3, "Best responses to train, one after the other.")
    num_resamples: int = option(1000, "Resamples of the bootstrap.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("--num_responses", self.num_responses, at_least=0, at_most=999)
        check_ranges(self, "num_resamples", at_least=1)
