"""Play battles on a server, one after the other: challenges of people, or the ladder."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from pokegemma.battles.legal_actions import find_legal_actions
from pokegemma.battles.online.connection import ShowdownConnection, simplify_name
from pokegemma.battles.players.player import BattleDecision, Decider
from pokegemma.battles.runner import BattleStep, Observer, order_team
from pokegemma.battles.seat import Seat
from pokegemma.battles.simulated_battle import BattleFormat
from pokegemma.errors import CheckFailedError

logger = logging.getLogger(__name__)

MatchSource = Literal["challenges", "ladder"]

_ROOM_MESSAGES = {"title", "c:", ":", "raw", "inactive", "uhtml", "notify", "noinit", "b", "battle", "users", "N"}
"""Lines of a battle's room that are not of the battle."""


@dataclass(frozen=True)
class MatchResult:
    """A battle on a server, from our side.

    Attributes:
        room: as the server names it: battle-gen1ou-12.
        rating: our own before the battle as the server wrote it, "" for none.
        won: None for a tie.
        last_record: what the observer returned after the end; None where the opponent left before the first turn.
        num_timeouts, num_unanswered: decisions that were not the player's own; see `Choice`.
    """

    room: str
    opponent: str
    rating: str
    won: bool | None
    num_turns: int
    steps: tuple[BattleStep, ...]
    last_record: Any
    num_timeouts: int
    num_unanswered: int = 0


@dataclass
class _Match:
    """A battle that is going on."""

    seat: Seat
    room: str
    opponent: str = ""
    rating: str = ""
    steps: list[BattleStep] = field(default_factory=list)
    num_timeouts: int = 0
    num_unanswered: int = 0


class MatchPlayer:
    """Plays one battle after the other over a connection.

    Args:
        decider: the player; with a limit of time, since people wait for it.
        draw_team: returns a packed team for each battle, or None in a format with random teams.
        observer: what to record before each decision and at the end.
        opponents: names whose challenges are accepted; empty: everybody's.
    """

    def __init__(
        self,
        connection: ShowdownConnection,
        decider: Decider,
        battle_format: BattleFormat,
        *,
        draw_team: Callable[[], str | None],
        observer: Observer,
        opponents: tuple[str, ...] = (),
    ) -> None:
        self._connection, self._decider, self._format = connection, decider, battle_format
        self._draw_team, self._observer = draw_team, observer
        self._opponents = {simplify_name(name) for name in opponents}
        self._match: _Match | None = None

    def play(self, num_battles: int, source: MatchSource) -> Iterator[MatchResult]:
        """Yield the result of each battle.

        Raises:
            PokegemmaError: the connection is lost.
            CheckFailedError: the server refused a choice, or sent a message that poke-env does not know. The battle is
                forfeited.
        """
        for _ in range(num_battles):
            if source == "ladder":
                self._send_team()
                self._connection.send(f"/search {self._format.name}")
            while (result := self._step()) is None:
                pass
            yield result

    def _step(self) -> MatchResult | None:
        """Read one message; return the result of the battle that ended with it."""
        message = self._connection.receive()
        if message.room.startswith("battle-"):
            return self._read_battle(message.room, message.lines)
        for line in message.lines:
            kind, *words = line.split("|")[1:] or [""]
            if kind == "pm" and self._match is None and words[2].startswith("/challenge"):
                self._answer_challenge(words[0].strip(), words[3] if len(words) > 3 else "")
            elif kind == "popup":
                logger.warning("the server: %s", " ".join(words).replace("||", " "))
        return None

    def _answer_challenge(self, user: str, battle_format: str) -> None:
        if simplify_name(user) == simplify_name(self._connection.user_name) or not battle_format:
            return  # our own, or one that was taken back
        welcome = not self._opponents or simplify_name(user) in self._opponents
        if battle_format != self._format.name or not welcome:
            logger.info("%s's challenge to %s is refused", user, battle_format)
            self._connection.send(f"/reject {user}")
            return
        self._send_team()
        self._connection.send(f"/accept {user}")

    def _send_team(self) -> None:
        self._connection.send(f"/utm {self._draw_team() or 'null'}")

    def _read_battle(self, room: str, lines: tuple[str, ...]) -> MatchResult | None:
        if self._match is None:
            if not any(line.startswith("|init|battle") for line in lines):
                return None  # the server's last word of a battle that was left
            seat = Seat(
                battle_id=room.rpartition("-")[2],
                battle_format=self._format.name,
                role="p1",  # until a request tells
                name=self._connection.user_name,
                generation=self._format.generation,
            )
            self._match = _Match(seat, room)
        match = self._match
        if room != match.room:  # of a battle that was left
            return None
        self._read_lines(match, lines)
        if match.seat.problem:
            self._connection.send("/forfeit", room=room)
            self._match = None
            raise CheckFailedError(f"{room}: {match.seat.problem}")
        if match.seat.battle.finished:
            return self._end(match)
        if match.seat.has_request:
            self._decide(match)
        return None

    def _read_lines(self, match: _Match, lines: tuple[str, ...]) -> None:
        seat = match.seat
        for line in lines:
            kind, *words = line.split("|")[1:] or [""]
            if kind == "player" and len(words) > 1 and words[1]:
                if simplify_name(words[1]) == simplify_name(self._connection.user_name):
                    match.rating = words[3] if len(words) > 3 else ""
                else:
                    match.opponent = words[1]
        seat.read("\n".join(line for line in lines if line.split("|")[1:2] not in ([kind] for kind in _ROOM_MESSAGES)))
        if seat.battle.player_role:
            seat.role = seat.battle.player_role
        if seat.was_unavailable and match.steps:
            match.steps.pop()

    def _decide(self, match: _Match) -> None:
        seat = match.seat
        seat.answered()
        legal = {} if seat.in_team_preview else find_legal_actions(seat.battle)
        decision = BattleDecision(match.room, seat.role, seat.num_decisions, match.room, seat.battle, legal)
        if seat.in_team_preview:
            choice = order_team(decision)
        else:
            (chosen,) = self._decider.decide([decision])
            seat.num_decisions += 1
            match.num_timeouts += chosen.timed_out
            match.num_unanswered += chosen.unanswered
            match.steps.append(BattleStep(self._observer(seat), chosen.action))
            choice = legal[chosen.action].choice
        request_id = seat.battle.last_request.get("rqid", "")
        self._connection.send(f"/choose {choice}|{request_id}", room=match.room)

    def _end(self, match: _Match) -> MatchResult:
        self._connection.send(f"/noreply /leave {match.room}")
        self._match = None
        battle = match.seat.battle
        has_begun = battle.active_pokemon is not None and battle.opponent_active_pokemon is not None
        return MatchResult(
            match.room,
            match.opponent,
            match.rating,
            battle.won,
            battle.turn,
            tuple(match.steps),
            self._observer(match.seat) if has_begun else None,
            match.num_timeouts,
            match.num_unanswered,
        )
