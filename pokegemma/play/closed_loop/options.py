"""The options of closed-loop evaluation."""

from dataclasses import dataclass
from typing import Literal

from pokegemma.errors import PokegemmaError, check_range, check_ranges
from pokegemma.options import option
from pokegemma.play.closed_loop.rules import RoomRules
from pokegemma.play.toy.rooms import check_level

FIRST_RECORDED_ROOM = 1_000_000
"""Rooms from this number on are for recordings, those before for measuring."""


@dataclass
class ClosedLoopOptions:
    """How many rooms of the toy game the model plays, and how."""

    closed_loop: int | None = option(
        None, "Let the model play this many rooms of the toy game that no recording contains."
    )
    level: int = option(1, "Level of the rooms, as in record_toy_game.py.")
    noise: float = option(0.0, "Share of the presses to replace by another button.")
    game: Literal["toy", "rom"] = option(
        "toy", "toy: in Python, several rooms at once. rom: in mGBA, one in each process."
    )
    stuck: int = option(
        0, "Same screen and same button this often: draw another button. 0, the default: never, which is greedy."
    )
    first_room: int = option(0, "Number of the first room; the next follow it.")
    max_detour: float = option(3.0, "A room is given up after this many times the turns that the expert needs.")
    record: str | None = option(
        None,
        "Also record this play in this folder as sessions, each turn labelled by the expert. --first_room must be at "
        "least 1000000: the rooms before are for measuring.",
    )
    record_mistakes: bool = option(
        False, "Make samples only of the recorded turns in which the model chose another button than the expert."
    )
    play_batch_size: int = option(32, "Rooms whose decisions share a forward pass.")
    play_workers: int = option(1, "With --game rom on a CPU: processes that play at once; each loads the model.")

    def __post_init__(self) -> None:
        check_ranges(self, "closed_loop", "play_batch_size", "play_workers", at_least=1)
        check_ranges(self, "stuck", "first_room", at_least=0)
        check_range("--noise", self.noise, at_least=0, at_most=1)
        check_range("--max_detour", self.max_detour, above=0)
        check_level(self.level)
        if self.play_workers > 1 and self.game != "rom":
            raise PokegemmaError(
                f"--play_workers {self.play_workers}: only for --game rom; rooms in Python share a pass"
            )
        if self.record_mistakes and self.record is None:
            raise PokegemmaError("--record_mistakes: only with --record")
        if self.record is not None and self.first_room < FIRST_RECORDED_ROOM:
            raise PokegemmaError(f"--first_room {self.first_room}: {FIRST_RECORDED_ROOM} or more with --record")

    @property
    def rules(self) -> RoomRules:
        stuck, detour = self.stuck or None, self.max_detour
        return RoomRules(self.level, noise=self.noise, game=self.game, stuck=stuck, turns_per_expert_turn=detour)

    @property
    def seeds(self) -> range:
        return range(self.first_room, self.first_room + (self.closed_loop or 0))
