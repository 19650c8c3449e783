"""The options of scripts/improve.py."""

from dataclasses import dataclass
from pathlib import Path

from pokegemma.errors import PokegemmaError, check_range, check_ranges
from pokegemma.options import option
from pokegemma.play.toy.rooms import LEVELS, check_level


@dataclass
class ImproveOptions:
    """What learns from its own play, and what it is compared with."""

    model_path: str = option(..., "Base model; each training starts from it.")
    output_dir: str = option(..., "Folder for everything. An earlier run in it with the same options is continued.")
    level: int = option(5, "Level to learn; its rooms are played with --noise.")
    also_level: int = option(
        1, "Level that must not be forgotten; its rooms are played without noise, and out of loops as play.py does."
    )
    noise: float = option(0.2, "Share of the presses to replace by another button, where play is measured.")
    play_noise: float = option(
        0.5, "The same where play is recorded to learn from: more noise shows more of the screens after a mistake."
    )
    rounds: int = option(3, "Rounds of play, correction and training.")
    seeds: list[int] = option([0, 1, 2], "Each seed is a whole run with data and training of its own.", nargs="+")
    num_sessions: int = option(40, "Sessions of 25 turns that the expert records first, on each of the two levels.")
    rooms_per_round: int = option(80, "Rooms that the model plays in a round; its play is recorded.")
    num_rooms: int = option(100, "Unseen rooms on which each model is measured.")
    max_steps: int = option(300, "Optimizer steps of each training, the same for all.")
    training_config: str = option("training_configs/toy.yaml", "Options of training.")
    samples_per_row: int = option(4, "Samples that share the beginning of their prompts in training.")
    controls: bool = option(True, "Also train on as much data of the expert, with and without noise.")
    num_parallel: int = option(1, "Seeds that run at once, each with its share of the cores.")

    def __post_init__(self) -> None:
        check_ranges(self, "num_sessions", "rooms_per_round", "num_rooms", "max_steps", "num_parallel", at_least=1)
        check_range("--rounds", self.rounds, at_least=0, at_most=20)
        check_range("--noise", self.noise, at_least=0, at_most=1)
        check_range("--play_noise", self.play_noise, at_least=0, at_most=1)
        check_range("--samples_per_row", self.samples_per_row, at_least=1)
        for level in (self.level, self.also_level):
            check_level(level)
            if LEVELS[level].is_privileged:
                raise PokegemmaError(f"level {level}: its expert knows a way that no screen shows, choose another")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise PokegemmaError(f"--seeds {' '.join(map(str, self.seeds))}: must be different numbers")
        if not Path(self.training_config).is_file():
            raise PokegemmaError(f"--training_config {self.training_config}: no such file")
