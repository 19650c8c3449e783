"""Play battles of two players in the simulator, many at once: every decision legal, every battle reproducible."""

import collections
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pokegemma.battles.legal_actions import find_legal_actions
from pokegemma.battles.players.player import BattleDecision, Choice, Decider
from pokegemma.battles.seat import Seat
from pokegemma.battles.simulated_battle import ROLES, BattleEnd, BattleFormat, BattleNews, BattleSpec
from pokegemma.battles.simulator import Simulator

logger = logging.getLogger(__name__)

MAX_TRIES = 3
"""How often a battle is played that was lost with its node process. From the second time on it is played alone, so that
a battle that kills the process takes no other with it."""


@dataclass(frozen=True)
class BattleStep:
    """A decision that happened. `record` is what the observer returned before it; None without an observer."""

    record: Any
    action: int


@dataclass(frozen=True)
class SeatResult:
    """One player's side of a battle that was played.

    Attributes:
        num_timeouts, num_unanswered: decisions that were not the player's own; see `Choice`.
        num_unavailable: choices that did not happen; see `Seat.was_unavailable`.
        last_record: what the observer returned after the end.
    """

    steps: tuple[BattleStep, ...]
    num_timeouts: int
    num_unavailable: int
    num_unanswered: int
    last_record: Any = None


@dataclass(frozen=True)
class BattleResult:
    """A battle that was played.

    Attributes:
        winner: a role; None for a tie, and where the limit of turns ended the battle.
        turn_limit_reached: whether it did.
        problem: why the battle could not be played to its end; "" if it could.
    """

    spec: BattleSpec
    winner: str | None = None
    num_turns: int = 0
    log: str = ""
    turn_limit_reached: bool = False
    seats: tuple[SeatResult, ...] = ()
    problem: str = ""


Observer = Callable[[Seat], Any]
"""Called before each decision and after the end of a battle, to record the state."""


@dataclass
class _Running:
    """A battle in flight."""

    spec: BattleSpec
    seats: dict[str, Seat]
    steps: dict[str, list[BattleStep]] = field(default_factory=lambda: {role: [] for role in ROLES})
    num_timeouts: collections.Counter = field(default_factory=collections.Counter)
    num_unavailable: collections.Counter = field(default_factory=collections.Counter)
    num_unanswered: collections.Counter = field(default_factory=collections.Counter)


class BattleRunner:
    """Plays battles of a format; a player decides for all waiting battles in one call.

    Args:
        deciders: by the names in the battles' specs; one may have several names, to play against itself.
        concurrency: battles in flight at once, at most.
        max_turns: a longer battle is ended with neither a winner nor a loser. Pokémon Showdown ends one at turn 1000.
        observer: what to record.
    """

    def __init__(
        self,
        simulator: Simulator,
        battle_format: BattleFormat,
        deciders: Mapping[str, Decider],
        *,
        concurrency: int = 64,
        max_turns: int = 1000,
        observer: Observer | None = None,
    ) -> None:
        self._simulator, self._format = simulator, battle_format
        self._deciders = deciders
        self._concurrency, self._max_turns, self._observer = concurrency, max_turns, observer
        self._running: dict[str, _Running] = {}
        self._num_losses: collections.Counter[str] = collections.Counter()

    def play(self, specs: Sequence[BattleSpec]) -> Iterator[BattleResult]:
        """Yield the result of each battle as it ends, in no particular order.

        A battle that was lost with its node process is played again after the others and alone, `MAX_TRIES` times in
        all.
        """
        try:
            yield from self._play(collections.deque(specs))
        finally:  # of a caller that ends early, or a player's error
            for battle_id in self._running:
                self._simulator.stop(battle_id)
            self._running.clear()

    def _play(self, waiting: collections.deque[BattleSpec]) -> Iterator[BattleResult]:
        suspects: collections.deque[BattleSpec] = collections.deque()
        while waiting or suspects or self._running:
            while waiting and len(self._running) < self._concurrency:
                self._start(waiting.popleft())
            if suspects and not self._running:
                self._start(suspects.popleft())
            news = []
            for event in self._simulator.receive():
                if isinstance(event, BattleNews):
                    news.append(event)
                    continue
                spec = self._running.pop(event.battle_id).spec
                self._num_losses[spec.battle_id] += 1
                if event.process_died and self._num_losses[spec.battle_id] < MAX_TRIES:
                    suspects.append(spec)
                else:
                    yield BattleResult(spec, problem=event.reason)
            yield from self._follow(news)

    def _start(self, spec: BattleSpec) -> None:
        seats = {
            role: Seat(
                battle_id=spec.battle_id,
                battle_format=spec.battle_format,
                role=role,
                name=name,
                generation=self._format.generation,
            )
            for role, name in zip(ROLES, spec.names, strict=True)
        }
        self._running[spec.battle_id] = _Running(spec, seats)
        self._simulator.start(spec)

    def _follow(self, news: Sequence[BattleNews]) -> Iterator[BattleResult]:
        """Read what happened, yield the battles that ended, and decide in the others."""
        undecided = []
        for each in news:
            running = self._running.get(each.battle_id)
            if running is None:  # it was lost after these news
                continue
            for role, lines in zip(ROLES, each.lines, strict=True):
                self._read(running, role, lines)
            if result := self._find_result(running, each.end):
                del self._running[each.battle_id]
                yield result
            else:
                undecided.append(running)
        self._decide(undecided)

    def _read(self, running: _Running, role: str, lines: str) -> None:
        seat = running.seats[role]
        seat.read(lines)
        if seat.was_unavailable:  # the choice did not happen
            running.steps[role].pop()
            running.num_unavailable[role] += 1

    def _find_result(self, running: _Running, end: BattleEnd | None) -> BattleResult | None:
        problems = [seat.problem for seat in running.seats.values() if seat.problem]
        num_turns = max(seat.battle.turn for seat in running.seats.values())
        if problems:
            self._simulator.stop(running.spec.battle_id)
            return BattleResult(running.spec, num_turns=num_turns, problem=problems[0])
        if end is None and num_turns <= self._max_turns:
            return None
        if end is None:
            self._simulator.stop(running.spec.battle_id)
        return BattleResult(
            running.spec,
            winner=end and end.winner,
            num_turns=end.num_turns if end else self._max_turns,
            log=end.log if end else "",
            turn_limit_reached=end is None,
            seats=tuple(self._seat_result(running, role) for role in ROLES),
        )

    def _seat_result(self, running: _Running, role: str) -> SeatResult:
        return SeatResult(
            tuple(running.steps[role]),
            num_timeouts=running.num_timeouts[role],
            num_unavailable=running.num_unavailable[role],
            num_unanswered=running.num_unanswered[role],
            last_record=self._observe(running.seats[role]),
        )

    def _observe(self, seat: Seat) -> Any:
        return self._observer(seat) if self._observer else None

    def _decide(self, undecided: Sequence[_Running]) -> None:
        """Have the players decide where the simulator waits for them, and send what they chose."""
        choices: dict[str, dict[str, str]] = collections.defaultdict(dict)
        decisions: dict[int, list[BattleDecision]] = collections.defaultdict(list)
        deciders = {id(decider): decider for decider in self._deciders.values()}
        for running in undecided:
            for role, name in zip(ROLES, running.spec.names, strict=True):
                seat = running.seats[role]
                if not seat.has_request:
                    continue
                seat.answered()
                decision = self._make_decision(running, role)
                if seat.in_team_preview:
                    choices[running.spec.battle_id][role] = order_team(decision)
                else:
                    decisions[id(self._deciders[name])].append(decision)
        for key, of_player in decisions.items():
            for decision, choice in zip(of_player, deciders[key].decide(of_player), strict=True):
                self._record(decision, choice)
                choices[decision.battle_id][decision.role] = decision.legal[choice.action].choice
        for battle_id, of_battle in choices.items():
            self._simulator.choose(battle_id, [of_battle.get(role) for role in ROLES])

    def _make_decision(self, running: _Running, role: str) -> BattleDecision:
        seat, spec = running.seats[role], running.spec
        legal = {} if seat.in_team_preview else find_legal_actions(seat.battle)
        return BattleDecision(spec.battle_id, role, seat.num_decisions, spec.seed, seat.battle, legal)

    def _record(self, decision: BattleDecision, choice: Choice) -> None:
        running = self._running[decision.battle_id]
        seat = running.seats[decision.role]
        seat.num_decisions += 1
        running.num_timeouts[decision.role] += choice.timed_out
        running.num_unanswered[decision.role] += choice.unanswered
        running.steps[decision.role].append(BattleStep(self._observe(seat), choice.action))


def order_team(decision: BattleDecision) -> str:
    """Return a choice of the team's order, drawn as poke-env draws it, but for this battle and player only."""
    places = list(range(1, len(decision.battle.last_request["side"]["pokemon"]) + 1))
    decision.random().shuffle(places)
    return "team " + "".join(map(str, places))
