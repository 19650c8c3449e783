"""A battle as the simulator takes it and reports it: its format, players, teams and seed; what happens; how it ends."""

import hashlib
from dataclasses import dataclass

ROLES = ("p1", "p2")


@dataclass(frozen=True)
class BattleFormat:
    """What Pokémon Showdown knows of a format.

    Attributes:
        has_random_teams: the simulator draws the teams; elsewhere both players bring one.
    """

    name: str
    generation: int
    has_random_teams: bool


@dataclass(frozen=True)
class BattleSpec:
    """A battle to play. With the same players, the same values give the same battle, at any concurrency.

    Attributes:
        battle_id: any name that no other battle in flight has.
        battle_format: as Pokémon Showdown writes it: "gen1ou".
        names: of the players p1 and p2, which differ.
        seed: any text; all random numbers of the battle and of both teams come from it.
        teams: packed teams that `Simulator.validate_team` returned; None in a format with random teams.
    """

    battle_id: str
    battle_format: str
    names: tuple[str, str]
    seed: str
    teams: tuple[str | None, str | None] = (None, None)

    def __post_init__(self) -> None:
        if self.names[0] == self.names[1] or any(set(name) & set("|\n_") or not name for name in self.names):
            raise ValueError(f"names {self.names}: must differ, and contain no '|', '_' or line break")


@dataclass(frozen=True)
class BattleEnd:
    """How a battle ended. `winner` is a role, None for a tie; `log` is the public log, as a replay page takes it."""

    winner: str | None
    num_turns: int
    log: str


@dataclass(frozen=True)
class BattleNews:
    """What happened in a battle since the last news: the lines that each player sees, and the end if it has ended."""

    battle_id: str
    lines: tuple[str, str]
    end: BattleEnd | None = None


@dataclass(frozen=True)
class BattleLost:
    """A battle that cannot go on. `process_died`: with its node process, so that it can be played again."""

    battle_id: str
    reason: str
    process_died: bool


def derive_seed(*parts: object) -> str:
    """Return a seed of Pokémon Showdown, four numbers below 65536, from any values.

    Its generator takes four numbers: with fewer, the missing ones are NaN and every seed gives the same stream.
    """
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return ",".join(str(int.from_bytes(digest[index : index + 2], "big")) for index in range(0, 8, 2))
