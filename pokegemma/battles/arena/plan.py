"""Which battles an arena plays: rounds of two battles a pair, on one seed, with the sides swapped."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pokegemma.battles.players.opening import PlayerSource
from pokegemma.battles.simulated_battle import BattleSpec
from pokegemma.battles.teams import draw_teams
from pokegemma.errors import PokegemmaError

Pair = tuple[str, str]
"""Names of two players, sorted."""


@dataclass(frozen=True)
class ArenaBattle:
    """One battle. `swapped`: the second of the pair is p1."""

    pair: Pair
    round: int
    swapped: bool

    @property
    def battle_id(self) -> str:
        """A name that no other battle of the arena has; the names of players contain no "_"."""
        return f"{self.pair[0]}_vs_{self.pair[1]}_{self.round:05d}_{1 + self.swapped}"

    @property
    def names(self) -> tuple[str, str]:
        """The players p1 and p2."""
        return self.pair[::-1] if self.swapped else self.pair


@dataclass(frozen=True)
class ArenaRules:
    """What determines the battles of an arena besides its players.

    Attributes:
        seed: a number; a battle's random numbers come from it and the round, so that all pairs get the same teams.
        max_turns: a longer battle counts as a tie.
        timeout_s: of a decision; None: no limit.
        teams_file: the teams, where the format has no random ones; None: those of pokegemma.
    """

    battle_format: str
    seed: int
    max_turns: int
    timeout_s: float | None
    teams_file: str | None


def list_pairs(players: Sequence[PlayerSource], against: Sequence[str] = ()) -> list[Pair]:
    """Return the pairs that play: all, or only those with a player of `against`.

    Raises:
        PokegemmaError: fewer than two players, or `against` names none of them.
    """
    names = [player.name for player in players]
    if len(names) < 2:
        raise PokegemmaError(f"--players {' '.join(names)}: must be at least 2")
    for name in against:
        if name not in names:
            raise PokegemmaError(f"--against {name}: must be among the players {', '.join(names)}")
    pairs = [tuple(sorted(pair)) for pair in itertools.combinations(names, 2)]
    return [pair for pair in pairs if not against or set(pair) & set(against)]


def list_battles(pairs: Sequence[Pair], num_rounds: int) -> Iterator[ArenaBattle]:
    """Yield the battles round by round, so that an arena that is interrupted has about as many of each pair."""
    for number, pair, swapped in itertools.product(range(num_rounds), pairs, (False, True)):
        yield ArenaBattle(pair, number, swapped)


def make_spec(battle: ArenaBattle, rules: ArenaRules, teams: Sequence[str]) -> BattleSpec:
    """Return a battle as the simulator takes it; both battles of a round have the same teams on the same sides.

    No recording has these seeds: a policy would be measured on the battles that it was trained on.
    """
    seed = f"arena/{rules.seed}/{battle.round}"
    drawn = draw_teams(teams, seed=seed)
    return BattleSpec(battle.battle_id, rules.battle_format, battle.names, seed=seed, teams=drawn)
