"""Which battles a policy learns from, and which it is evaluated on: chosen by their files' names."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from pokegemma.battles.trajectories.files import format_of, name_of
from pokegemma.battles.trajectories.packed import PackedTrajectories

SplitName = Literal["train", "eval"]


@dataclass(frozen=True)
class BattleFilter:
    """Which players' views of battles are used. None: all.

    Attributes:
        min_rating: of the player, as `TrajectoryName.rating_points` has it.
        since, until: the first and the last day, as their midnights.
    """

    won_only: bool = False
    min_rating: int | None = None
    formats: tuple[str, ...] | None = None
    since: datetime | None = None
    until: datetime | None = None

    def accepts(self, path: str) -> bool:
        """Return whether a file is used, by its path FORMAT/NAME or RECORDING/FORMAT/NAME."""
        name = name_of(path)
        return (
            (name.won or not self.won_only)
            and (self.min_rating is None or name.rating_points >= self.min_rating)
            and (self.formats is None or format_of(path) in self.formats)
            and (self.since is None or name.played_at >= self.since)
            and (self.until is None or name.played_at < self.until + timedelta(days=1))
        )


def choose_split(battle_id: str, *, eval_fraction: float) -> SplitName:
    """Return where a battle belongs: by a hash of its id, so that both players' views are in one split."""
    number = int.from_bytes(hashlib.sha256(battle_id.encode()).digest()[:8], "big")
    return "eval" if number < eval_fraction * 2**64 else "train"


def select_battles(
    battles: PackedTrajectories, battle_filter: BattleFilter, *, eval_fraction: float, split: SplitName
) -> Iterator[int]:
    """Yield the numbers of the battles of a split that the filter accepts, ascending."""
    for index in range(len(battles)):
        path = battles.name(index)
        if not battle_filter.accepts(path):
            continue
        battle_id = name_of(path).battle_id
        if choose_split(battle_id, eval_fraction=eval_fraction) == split:
            yield index
