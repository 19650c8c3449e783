"""Open a player from what a command calls it: the name of a scripted one, or NAME=SOURCE."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pokegemma.battles.players.player import BattlePlayer
from pokegemma.battles.players.scripted import SCRIPTED_PLAYERS
from pokegemma.errors import PokegemmaError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")


@dataclass(frozen=True)
class PlayerSource:
    """A player that is not opened yet.

    Attributes:
        name: what reports and trajectory files call it.
        source: the name of a scripted player.

    Example:
        >>> PlayerSource.parse("teacher=heuristic")
        PlayerSource(name='teacher', source='heuristic')
    """

    name: str
    source: str

    @classmethod
    def parse(cls, text: str) -> "PlayerSource":
        """Return the player that "heuristic" or "teacher=heuristic" stands for.

        Raises:
            PokegemmaError: the name has characters that file names and Pokémon Showdown do not take, or there is no
                such player.
        """
        name, separator, source = text.partition("=")
        player = cls(name, source if separator else name)
        if not _NAME.fullmatch(player.name):
            raise PokegemmaError(f"player {text!r}: the name must be letters, digits, '.', '+' and '-'")
        if player.source not in SCRIPTED_PLAYERS:
            known = ", ".join(SCRIPTED_PLAYERS)
            raise PokegemmaError(f"player {text!r}: {player.source!r} is not a player; take one of {known}")
        return player

    def open(self) -> BattlePlayer:
        """Return the player."""
        return SCRIPTED_PLAYERS[self.source](self.name)

    def fingerprint(self) -> str:
        """Return what tells this player from another one that had its name before."""
        return self.source


def parse_players(texts: Sequence[str], *, flag: str) -> tuple[PlayerSource, ...]:
    """Return the players of a command in their order.

    Raises:
        PokegemmaError: as `PlayerSource.parse`, or two have one name.
    """
    players = tuple(map(PlayerSource.parse, texts))
    names = [player.name for player in players]
    for name in names:
        if names.count(name) > 1:
            raise PokegemmaError(f"{flag}: two players are called {name!r}; write NAME=SOURCE")
    return players
