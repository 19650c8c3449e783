"""The interface of all battle players: score the 13 actions; illegal ones are masked afterwards, in one place."""

import concurrent.futures
import queue
import random
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from poke_env.battle import Battle, Move

from pokegemma.battles.legal_actions import LegalAction
from pokegemma.battles.trajectories.actions import NUM_ACTIONS
from pokegemma.errors import CheckFailedError


@dataclass(frozen=True)
class BattleDecision:
    """What a player decides on.

    Attributes:
        battle_id: of the battle, for players that remember earlier decisions of it.
        role: "p1" or "p2".
        number: how many decisions this player made in this battle before.
        seed: of the battle.
        battle: what the player knows.
        legal: the legal actions by number, ascending; at least one.
    """

    battle_id: str
    role: str
    number: int
    seed: str
    battle: Battle
    legal: Mapping[int, LegalAction]

    def random(self) -> random.Random:
        """Return random numbers that depend on the battle, the role and the decision only.

        poke-env's players draw from one global stream, so that a battle depends on which others run next to it.
        """
        return random.Random(f"{self.seed}/{self.role}/{self.number}")


class BattlePlayer(Protocol):
    """A player of any number of battles at once."""

    name: str
    """What plays, as trajectory files and reports state it; without "_" and "|"."""

    def score(self, decisions: Sequence[BattleDecision]) -> np.ndarray:
        """Return the score of each action in each decision, (len(decisions), 13); the highest legal one is played.

        Scores of illegal actions are ignored. An action that the player does not name has minus infinity. A player that
        samples adds its noise, drawn from `BattleDecision.random`.
        """


@dataclass(frozen=True)
class Choice:
    """A legal action, and why it is not the player's own, if it is not.

    Attributes:
        timed_out: the player took too long, and the strongest legal move was played.
        unanswered: the player named no legal action: its answer was an illegal one, or could not be read. The legal
            action of the lowest number was played.
    """

    action: int
    timed_out: bool = False
    unanswered: bool = False


def describe_replaced(num_timeouts: int, num_unanswered: int) -> str:
    """Return how many decisions were not the player's own, in words."""
    return f"{num_timeouts} decisions timed out, {num_unanswered} answers named no legal action"


def mask_illegal(scores: np.ndarray, legal: Collection[int]) -> int:
    """Return the legal action with the highest score, (13,) -> action; the lowest number of several.

    Raises:
        ValueError: no action is legal, or the scores do not have that shape.
        CheckFailedError: the score of a legal action is NaN.
    """
    if not legal or scores.shape != (NUM_ACTIONS,):
        raise ValueError(f"scores of shape {scores.shape}, legal actions {list(legal)}: must be (13,) and at least one")
    of_legal = scores[list(legal)]
    if np.isnan(of_legal).any():
        raise CheckFailedError("the player's score of a legal action is NaN")
    return list(legal)[int(of_legal.argmax())]


def strongest_action(decision: BattleDecision) -> int:
    """Return the legal move with the most expected damage, without terastallization; else the first legal action.

    Expected is base power x accuracy x hits x 1.5 for the user's own type x the multiplier of the opponent's types.
    """
    active, opponent = decision.battle.active_pokemon, decision.battle.opponent_active_pokemon

    def damage(move: Move) -> float:
        own_type = 1.5 if active is not None and move.type in active.types else 1.0
        multiplier = opponent.damage_multiplier(move) if opponent is not None else 1.0
        return move.base_power * move.accuracy * move.expected_hits * own_type * multiplier

    damages = {
        number: damage(action.subject)
        for number, action in decision.legal.items()
        if isinstance(action.subject, Move) and not action.terastallizes
    }
    return max(damages, key=damages.__getitem__) if damages else next(iter(decision.legal))


class Decider:
    """A player with a limit of time.

    Without a limit the player is called here, with all decisions at once. With one it is called in a thread of its own,
    for one decision after the other, because the time of a batch tells nothing of a single decision. A call that takes
    too long goes on there, its result is dropped, and the next decision waits for it within its own limit.
    """

    def __init__(self, player: BattlePlayer, *, timeout_s: float | None = None) -> None:
        self.player = player
        self._timeout_s = timeout_s
        self._calls: queue.SimpleQueue[tuple[Sequence[BattleDecision], concurrent.futures.Future] | None] = (
            queue.SimpleQueue()
        )
        if timeout_s is not None:
            threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        """End the thread, once its call has ended."""
        self._calls.put(None)

    def decide(self, decisions: Sequence[BattleDecision]) -> list[Choice]:
        """Return a legal action for each decision, in their order.

        Raises:
            CheckFailedError, ValueError: as `mask_illegal`; and whatever the player raises.
        """
        if not decisions:
            return []
        if self._timeout_s is not None:
            return [self._decide_in_time(decision) for decision in decisions]
        return self._choose(self.player.score(decisions), decisions)

    def _decide_in_time(self, decision: BattleDecision) -> Choice:
        result: concurrent.futures.Future = concurrent.futures.Future()
        self._calls.put(([decision], result))
        try:
            scores = result.result(timeout=self._timeout_s)
        except TimeoutError:
            result.cancel()
            return Choice(strongest_action(decision), timed_out=True)
        return self._choose(scores, [decision])[0]

    def _choose(self, scores: np.ndarray, decisions: Sequence[BattleDecision]) -> list[Choice]:
        if len(scores) != len(decisions):
            raise ValueError(f"{self.player.name}: {len(scores)} rows of scores for {len(decisions)} decisions")
        actions = [mask_illegal(row, decision.legal) for row, decision in zip(scores, decisions, strict=True)]
        return [
            Choice(action, unanswered=bool(np.isneginf(row[action])))
            for action, row in zip(actions, scores, strict=True)
        ]

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            decisions, result = call
            if not result.set_running_or_notify_cancel():
                continue
            try:
                result.set_result(self.player.score(decisions))
            except BaseException as error:  # noqa: BLE001 (raised again in the thread that waits for it)
                result.set_exception(error)
