"""One player's view of a battle, kept in poke-env's Battle."""

import logging
from collections.abc import Mapping
from typing import Any

from pokegemma.errors import PokegemmaError, one_line

try:
    import orjson
    from poke_env.battle import Battle
except ImportError as error:
    raise PokegemmaError(f"battles need {error.name}: ./init.sh --with battles") from error

_battle_logger = logging.getLogger(f"{__name__}.battle")
_battle_logger.setLevel(logging.WARNING)  # poke-env logs what the simulator says of clauses, in each battle

_NOT_FOR_THE_STATE = {"t:", "expire", "uhtmlchange", "tempnotify", "tempnotifyoff", "bigerror"}
"""What poke-env's own Player keeps from its Battle, which raises at some. "bigerror" is sent from turn 500 on."""


class Seat:
    """One player's side of a battle.

    Attributes:
        role: "p1" or "p2".
        battle: poke-env's Battle, which knows what this player knows.
        num_decisions: how many decisions this player has made, those included that did not happen.
        has_request: whether the simulator waits for a choice of this player.
        in_team_preview: whether that is the order of the team, not an action.
        was_unavailable: whether the last choice did not happen: the Pokémon was trapped, which only the refusal tells.
        problem: why the battle cannot go on, "" if it can: an illegal choice, which would be a bug of ours, or a
            message that poke-env does not know.
    """

    def __init__(self, *, battle_id: str, battle_format: str, role: str, name: str, generation: int) -> None:
        self.role = role
        self.battle = Battle(f"battle-{battle_format}-{battle_id}", name, _battle_logger, generation)
        self.num_decisions = 0
        self.has_request = self.in_team_preview = self.was_unavailable = False
        self.problem = ""

    def read(self, lines: str) -> None:
        """Follow the lines of Pokémon Showdown's protocol that this player sees.

        A line is split at "|" before it is compared: a search for "|win" or "|tie" also finds "|tier".
        """
        self.was_unavailable = False
        for line in lines.split("\n"):
            words = line.split("|")
            kind = words[1] if len(words) > 1 else ""
            if kind == "request":
                if words[2]:  # a server sends an empty one first
                    self._read_request(orjson.loads(line.removeprefix("|request|")))
            elif kind == "error":
                self._read_error(words[2])
            elif kind == "win":
                self.battle.won_by(words[2])
            elif kind == "tie":
                self.battle.tied()
            elif len(words) > 1 and kind not in _NOT_FOR_THE_STATE:
                self._parse(words)

    def _parse(self, words: list[str]) -> None:
        try:
            self.battle.parse_message(words)
        except NotImplementedError as error:
            self.problem = f"poke-env does not know the message {one_line(error)}"

    def answered(self) -> None:
        """Record that a choice was made."""
        self.has_request = False

    def _read_request(self, request: Mapping[str, Any]) -> None:
        self.battle.parse_request(request)
        self.has_request = not request.get("wait", False)
        self.in_team_preview = bool(request.get("teamPreview", False))

    def _read_error(self, text: str) -> None:
        if text.startswith("[Unavailable choice]"):  # another request follows, with what has become known
            self.was_unavailable = True
        else:
            self.problem = f"an illegal choice: {text}"
