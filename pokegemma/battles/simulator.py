"""Pokémon Showdown's simulator without a server: many battles at once in long-lived node processes, seeded."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pokegemma.battles.node_pool import NodePool
from pokegemma.battles.simulated_battle import (
    ROLES,
    BattleEnd,
    BattleFormat,
    BattleLost,
    BattleNews,
    BattleSpec,
    derive_seed,
)
from pokegemma.errors import PokegemmaError, check_range

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Flight:
    """Where a battle is played: the number of its process, and its own number there, which is never used again."""

    place: int
    number: int


class Simulator:
    """Battles in node processes, each of which plays many at once.

    A process that dies, or is silent for `timeout_s` while it owes a reply, costs the battles in it: `receive` reports
    them as lost, and another process takes its place. Use it as a context manager.

    Attributes:
        timeout_s: seconds; may be changed at any time.

    Example:
        >>> with Simulator() as simulator:
        ...     simulator.start(BattleSpec("1", "gen1randombattle", ("ann", "bob"), seed="7"))
        ...     (news,) = simulator.receive()
        ...     simulator.choose("1", ("move 1", "move 2"))
    """

    def __init__(self, *, num_processes: int = 1, timeout_s: float = 60.0) -> None:
        """Start nothing yet: a process starts with its first battle.

        Raises:
            PokegemmaError: an argument is out of range.
        """
        check_range("num_processes", num_processes, at_least=1)
        check_range("timeout_s", timeout_s, above=0)
        self._pool = NodePool(num_processes)
        self._flights: dict[str, _Flight] = {}
        self._battle_ids: dict[int, str] = {}
        self._num_ids = 0
        self.timeout_s = timeout_s
        self._events: list[BattleNews | BattleLost] = []
        self._questions: set[int] = set()
        self._answers: dict[int, dict[str, Any]] = {}

    def __enter__(self) -> "Simulator":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def process_ids(self) -> list[int]:
        """The ids of the running node processes."""
        return [process.pid for process in self._pool.running]

    def close(self) -> None:
        """End the processes; battles in flight are dropped."""
        self._pool.close()
        self._flights.clear()
        self._battle_ids.clear()

    def describe_format(self, name: str) -> BattleFormat:
        """Return what Pokémon Showdown knows of a format.

        Raises:
            PokegemmaError: there is no such format, it is not played one against one, or it shows the opponent's exact
                HP, which no other format does (Custom Games): what was learned there would be wrong elsewhere.
        """
        facts = self._ask({"format": name})
        if "problems" in facts:
            raise PokegemmaError(f"format {name!r}: Pokémon Showdown has no format of this name")
        if facts["format_id"] != name:
            raise PokegemmaError(f"format {name!r}: Pokémon Showdown calls it {facts['format_id']}, write it so")
        if facts["game_type"] != "singles":
            raise PokegemmaError(f"format {name!r} is played as {facts['game_type']}: only singles are supported")
        if not facts["hides_exact_hp"]:
            raise PokegemmaError(f"format {name!r} shows the opponent's exact HP, which others hide; choose another")
        return BattleFormat(name, facts["generation"], facts["has_random_teams"])

    def validate_team(self, name: str, team: str) -> str:
        """Return the packed team to play in a format, from text as Showdown's team builder exports it, or packed.

        The validator fills in what such a text leaves out: without it, teams of generation 1 have no EVs (Tauros has
        290 HP and not 353), and Pokémon are accepted that the format bans.

        Raises:
            PokegemmaError: the format does not allow the team; all reasons are named.
        """
        answer = self._ask({"format": name, "team": team})
        if "team" not in answer:
            reasons = answer.get("problems") or [answer.get("error", "not a team")]
            raise PokegemmaError(f"format {name!r} does not allow this team: {' '.join(reasons)}")
        return answer["team"]

    def start(self, spec: BattleSpec) -> None:
        """Begin a battle; its first news have both players' first request.

        Raises:
            ValueError: a battle of this id is in flight.
            PokegemmaError: Node.js or its packages are not installed.
        """
        if spec.battle_id in self._flights:
            raise ValueError(f"battle {spec.battle_id!r} is in flight")
        players = {}
        for role, name, team in zip(ROLES, spec.names, spec.teams, strict=True):
            source = {"seed": derive_seed(spec.seed, role, "team")} if team is None else {"team": team}
            players[role] = {"name": name, **source}
        setup = {"format": spec.battle_format, "seed": derive_seed(spec.seed, "battle"), "players": players}
        flight = self._flights[spec.battle_id] = _Flight(self._pool.find_place(), self._next_number())
        self._battle_ids[flight.number] = spec.battle_id
        process = self._pool[flight.place]
        process.battles.add(spec.battle_id)
        process.send({"id": flight.number, "start": setup})

    def choose(self, battle_id: str, choices: Sequence[str | None]) -> None:
        """Send choices of p1 and p2: "move 2", "move 2 terastallize", "switch 3" or "team 321456"; None for no choice.

        Does nothing for a battle that was lost; `receive` reports it.
        """
        if (flight := self._flights.get(battle_id)) is not None:
            command = {"id": flight.number, "choose": dict(zip(ROLES, choices, strict=True))}
            self._pool[flight.place].send(command)

    def stop(self, battle_id: str) -> None:
        """Drop a battle in flight; nothing more is reported of it."""
        if battle_id in self._flights:
            flight = self._forget(battle_id)
            self._pool[flight.place].send({"id": flight.number})

    def receive(self) -> list[BattleNews | BattleLost]:
        """Wait until something has happened, and return all of it; an empty list where no battle is in flight.

        `timeout_s` counts only while this waits: a caller may take any time between two calls.
        """
        while self._flights and not self._events:
            self._wait()
        events, self._events = self._events, []
        return events

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to a question that is not about a battle.

        Raises:
            PokegemmaError: the node process dies at it.
        """
        place, number = self._pool.find_place(), self._next_number()
        process = self._pool[place]
        process.send({"id": number, **question})
        self._questions.add(number)
        while number not in self._answers:
            if self._pool[place] is not process:
                raise PokegemmaError(f"the simulator died at the question {question}")
            self._wait()
        return self._answers.pop(number)

    def _next_number(self) -> int:
        self._num_ids += 1
        return self._num_ids

    def _wait(self) -> None:
        """Wait until at least one process has sent something or died, and keep what it means."""
        replies, dead = self._pool.wait(self.timeout_s)
        for reply in replies:
            self._take(reply)
        for process in dead:
            lost = [battle_id for battle_id in process.battles if battle_id in self._flights]  # others ended just now
            logger.warning("%s; %d battles in flight are lost", process.reason, len(lost))
            for battle_id in lost:
                self._forget(battle_id)
                self._events.append(BattleLost(battle_id, process.reason, process_died=True))

    def _take(self, reply: dict[str, Any]) -> None:
        battle_id = self._battle_ids.get(reply["id"])
        if reply["id"] in self._questions:
            self._questions.discard(reply["id"])
            self._answers[reply["id"]] = reply
        elif battle_id is None:  # it was stopped
            return
        elif "error" in reply:
            self._forget(battle_id)
            self._events.append(BattleLost(battle_id, f"the simulator's error: {reply['error']}", process_died=False))
        else:
            end = reply.get("end")
            if end is not None:
                self._forget(battle_id)
                end = BattleEnd(end["winner"], end["turns"], end["log"])
            self._events.append(BattleNews(battle_id, (reply["p1"], reply["p2"]), end))

    def _forget(self, battle_id: str) -> _Flight:
        flight = self._flights.pop(battle_id)
        del self._battle_ids[flight.number]
        process = self._pool[flight.place]
        if process is not None:
            process.battles.discard(battle_id)
        return flight
