"""Players without a model: random, the strongest move, and poke-env's SimpleHeuristics."""

from collections.abc import Sequence

import numpy as np
from poke_env.battle import Move, Pokemon
from poke_env.player import SimpleHeuristicsPlayer

from pokegemma.battles.players.player import BattleDecision
from pokegemma.battles.trajectories.actions import NUM_ACTIONS


class RandomBattlePlayer:
    """Play any legal action, each as often as the others."""

    def __init__(self, name: str = "random") -> None:
        self.name = name

    def score(self, decisions: Sequence[BattleDecision]) -> np.ndarray:
        return np.stack([_random_scores(decision) for decision in decisions])


class MaxBasePowerPlayer:
    """Play the move of the highest base power, the first of several; a random action where there is no move."""

    def __init__(self, name: str = "max-base-power") -> None:
        self.name = name

    def score(self, decisions: Sequence[BattleDecision]) -> np.ndarray:
        return np.stack([self._score(decision) for decision in decisions])

    def _score(self, decision: BattleDecision) -> np.ndarray:
        moves = decision.battle.available_moves
        if not moves:
            return _random_scores(decision)
        return _score_subject(decision, max(moves, key=lambda move: move.base_power))


class HeuristicPlayer:
    """Play what poke-env's SimpleHeuristicsPlayer plays.

    poke-env 0.16.1 is pinned for it. In that version it never uses a move that raises its statistics, because it
    compares `move.target`, an enum since 0.8, with "self". It draws from the global `random` where it knows nothing
    better: here such a draw depends on the decision only.
    """

    def __init__(self, name: str = "heuristic") -> None:
        self.name = name

    def score(self, decisions: Sequence[BattleDecision]) -> np.ndarray:
        return np.stack([self._score(decision) for decision in decisions])

    def _score(self, decision: BattleDecision) -> np.ndarray:
        battle = decision.battle
        knows_both = battle.active_pokemon is not None and battle.opponent_active_pokemon is not None
        if not knows_both or not (battle.available_moves or battle.available_switches):
            return _random_scores(decision)
        order, _ = SimpleHeuristicsPlayer.choose_singles_move(battle)
        return _score_subject(decision, order.order, terastallizes=order.terastallize)


def _random_scores(decision: BattleDecision) -> np.ndarray:
    draws = decision.random()
    scores = np.zeros(NUM_ACTIONS)
    scores[list(decision.legal)] = [draws.random() for _ in decision.legal]
    return scores


def _score_subject(decision: BattleDecision, subject: Move | Pokemon, *, terastallizes: bool = False) -> np.ndarray:
    """Return 1 for the action that uses a move or Pokémon of poke-env's, 0 for all others."""
    scores = np.zeros(NUM_ACTIONS)
    for number, action in decision.legal.items():
        scores[number] = action.subject is subject and action.terastallizes == terastallizes
    return scores


SCRIPTED_PLAYERS = {player().name: player for player in (RandomBattlePlayer, MaxBasePowerPlayer, HeuristicPlayer)}
"""The players of this module by name."""
