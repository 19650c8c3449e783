"""A policy that takes metamon's observation and answers with one of its actions: any Python callable.

The callable gets the observations of all waiting decisions, and returns the number of an action for each. A class is
called without arguments first, once in each process, and its instances are the policy: such a one may have a model.

    def play_first_legal(observations: Sequence[MetamonObservation]) -> list[int]:
        return [observation.legal_actions[0] for observation in observations]
"""

import hashlib
import importlib
import importlib.util
import operator
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pokegemma.battles.players.player import BattleDecision
from pokegemma.battles.trajectories.actions import NUM_ACTIONS
from pokegemma.battles.trajectories.from_battle import state_from_battle
from pokegemma.battles.trajectories.records import TrajectoryState
from pokegemma.battles.trajectories.texts import list_numbers, list_words
from pokegemma.errors import PokegemmaError, one_line


@dataclass(frozen=True)
class MetamonObservation:
    """What a policy decides on.

    Attributes:
        battle: the battle and the player's side in it: what a policy remembers, it remembers by this.
        number: of decisions of the player in the battle before, those included that did not happen; 0 begins it anew.
        text: the 87 words of metamon's DefaultObservationSpace, with a space between them.
        numbers: its 48 numbers, (48,) float32.
        legal_actions: numbers of the actions of metamon's DefaultActionSpace, ascending; at least one.
        state: the whole state. `dataclasses.asdict(state)` is what metamon's UniversalState.from_dict takes, for
            policies with another observation space and for rewards.
    """

    battle: str
    number: int
    text: str
    numbers: np.ndarray
    legal_actions: tuple[int, ...]
    state: TrajectoryState


MetamonPolicy = Callable[[Sequence[MetamonObservation]], Sequence[int]]


class MetamonPlayer:
    """Plays the action that a policy returns. Where it is illegal, the legal action of the lowest number is played."""

    def __init__(self, name: str, policy: MetamonPolicy) -> None:
        self.name, self._policy = name, policy

    def score(self, decisions: Sequence[BattleDecision]) -> np.ndarray:
        """Return (len(decisions), 13): 0 for the action that the policy returned, minus infinity for all others.

        Raises:
            PokegemmaError: the policy returned something else than a number for each decision.
        """
        answers = list(self._policy([_observe(decision) for decision in decisions]))
        if len(answers) != len(decisions):
            raise PokegemmaError(f"player {self.name!r}: {len(answers)} answers to {len(decisions)} observations")
        scores = np.full((len(decisions), NUM_ACTIONS), -np.inf)
        for row, answer in zip(scores, answers, strict=True):
            try:
                action = operator.index(answer)
            except TypeError as error:
                raise PokegemmaError(f"player {self.name!r}: {answer!r} is not the number of an action") from error
            if 0 <= action < NUM_ACTIONS:
                row[action] = 0.0
        return scores


def _observe(decision: BattleDecision) -> MetamonObservation:
    state = state_from_battle(decision.battle)
    return MetamonObservation(
        battle=f"{decision.battle_id} {decision.role}",
        number=decision.number,
        text=" ".join(list_words(state)),
        numbers=list_numbers(state),
        legal_actions=tuple(decision.legal),
        state=state,
    )


def load_metamon_player(source: str, name: str) -> MetamonPlayer:
    """Return the player of "MODULE:CALLABLE"; the current folder is searched for the module, too.

    Raises:
        PokegemmaError: there is no such module or callable, or it cannot be imported.
    """
    module, _, attribute = source.partition(":")
    _find_module(module)
    try:
        policy = getattr(importlib.import_module(module), attribute, None)
    except ImportError as error:
        raise PokegemmaError(f"player {name!r}: {module} cannot be imported: {one_line(error)}") from error
    if not callable(policy):
        raise PokegemmaError(f"player {name!r}: {module} has no callable {attribute!r}")
    return MetamonPlayer(name, policy() if isinstance(policy, type) else policy)


def hash_module(source: str) -> str:
    """Return the SHA-256 of the file of MODULE in "MODULE:CALLABLE". What the module imports or loads is not in it.

    Raises:
        PokegemmaError: there is no such module.
    """
    return hashlib.sha256(_find_module(source.partition(":")[0]).read_bytes()).hexdigest()


def _find_module(name: str) -> Path:
    if str(Path.cwd()) not in sys.path:  # a script has its own folder there only
        sys.path.append(str(Path.cwd()))
    try:
        spec = importlib.util.find_spec(name)
    except ImportError:  # of the package that contains it
        spec = None
    if spec is None or not spec.origin or not Path(spec.origin).is_file():
        raise PokegemmaError(f"there is no module {name!r} here or on PYTHONPATH")
    return Path(spec.origin)
