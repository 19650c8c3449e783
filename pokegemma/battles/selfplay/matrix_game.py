"""The game whose moves are players: its matrix as an arena measured it, Nash mixtures, exploitability.

M[i, j] is the share of battles that player i wins against j, where a tie is half a win, so that M + M^T = 1. A player
against itself has 1/2: the game is the same for both sides. A mixture is a distribution over players; exploitability of
a mixture sigma is max_i (M sigma)_i - 1/2, what the best player of the population gains against it.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog

from pokegemma.battles.arena.plan import Pair
from pokegemma.battles.arena.ratings import resample_rounds
from pokegemma.battles.arena.standings import view_from
from pokegemma.errors import CheckFailedError, PokegemmaError

_EVEN = 0.5
_NOTHING = 1e-7
"""Weights below it are the tolerance of HiGHS."""


@dataclass(frozen=True)
class Estimate:
    """A figure of measured payoffs: its value, and the mean and the 95 % interval over resampled battles."""

    value: float
    mean: float
    interval: tuple[float, float]


def payoff_matrix(counts: Mapping[Pair, np.ndarray], names: Sequence[str]) -> np.ndarray:
    """Return M, (..., N, N) float64, in the order of `names`.

    Args:
        counts: of each pair (..., 3): wins of its first player, wins of its second, ties. Other pairs are ignored.

    Raises:
        PokegemmaError: some pairs have not played; their payoff is missing, not 1/2.
    """
    pairs = [tuple(sorted(pair)) for pair in itertools.combinations(names, 2)]
    if missing := [" and ".join(pair) for pair in pairs if pair not in counts or not counts[pair].sum(-1).all()]:
        raise PokegemmaError(f"no payoff is known where no battle was played: {', '.join(missing)}")
    shape = counts[pairs[0]].shape[:-1] if pairs else ()
    payoffs = np.full((*shape, len(names), len(names)), _EVEN)
    for first, name in enumerate(names):
        for pair in pairs:
            if name in pair:
                opponent, of_player = view_from(name, pair, counts[pair])
                scores = (of_player[..., 0] + of_player[..., 2] / 2) / of_player.sum(-1)
                payoffs[..., first, names.index(opponent)] = scores
    return payoffs


def find_nash(payoffs: np.ndarray) -> np.ndarray:
    """Return a mixture that no player beats by more than chance, (N, N) -> (N,), by a linear programme.

    A game may have several; which one is returned depends on the solver, and is the same for the same matrix.

    Raises:
        ValueError: the matrix is not that of a game that is the same for both sides (M + M^T = 1).
        CheckFailedError: the solver failed.
    """
    size = len(payoffs)
    if not np.allclose(payoffs + payoffs.T, 1):
        raise ValueError("payoffs and their transpose must add up to 1")
    # Variables: the weights, and the value v, which is to be as large as possible with (M^T sigma)_j >= v for each j.
    result = linprog(
        np.append(np.zeros(size), -1.0),
        A_ub=np.hstack([-payoffs.T, np.ones((size, 1))]),
        b_ub=np.zeros(size),
        A_eq=np.append(np.ones(size), 0.0)[None],
        b_eq=[1.0],
        bounds=[(0, 1)] * size + [(None, None)],
        method="highs",
    )
    if result.x is None:
        raise CheckFailedError(f"no equilibrium was found: {result.message}")
    weights = np.where(result.x[:size] < _NOTHING, 0.0, result.x[:size])
    return weights / weights.sum()


def find_exploitability(payoffs: np.ndarray, mixture: np.ndarray) -> np.ndarray:
    """Return max_i (M sigma)_i - 1/2, (..., N, N), (N,) -> (...,)."""
    return (payoffs @ mixture).max(-1) - _EVEN


def estimate_exploitability(
    rounds: Mapping[Pair, np.ndarray],
    names: Sequence[str],
    mixture: np.ndarray,
    *,
    num_resamples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Return the exploitability of a mixture in the measured matrix, and that in matrices of resampled battles.

    The mixture stays as it is. Where it is an equilibrium of the measured matrix, the value is 0 by construction; the
    mean and the interval are what remains of it when the same number of battles is played again.

    Args:
        rounds: of each pair, (R, 3), as `count_rounds` returns them; both battles of a round have one seed.
    """
    matrix = payoff_matrix({pair: each.sum(0) for pair, each in rounds.items()}, names)
    resampled = find_exploitability(_resample(rounds, names, num_resamples=num_resamples, seed=seed), mixture)
    return _summarize(float(find_exploitability(matrix, mixture)), resampled)


def estimate_payoff(
    rounds: Mapping[Pair, np.ndarray],
    names: Sequence[str],
    name: str,
    mixture: np.ndarray,
    *,
    num_resamples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Return a player's share of battles won against a mixture over `names`, a tie being half a win."""
    place = names.index(name)
    matrix = payoff_matrix({pair: each.sum(0) for pair, each in rounds.items()}, names)
    resampled = _resample(rounds, names, num_resamples=num_resamples, seed=seed)
    return _summarize(float(matrix[place] @ mixture), resampled[:, place] @ mixture)


def _resample(rounds: Mapping[Pair, np.ndarray], names: Sequence[str], *, num_resamples: int, seed: int) -> np.ndarray:
    """Return the matrices of rounds drawn with replacement within each pair, (num_resamples, N, N)."""
    chosen = {pair: each for pair, each in rounds.items() if set(pair) <= set(names)}
    drawn = resample_rounds(list(chosen.values()), num_resamples=num_resamples, seed=seed)
    return payoff_matrix({pair: drawn[:, place] for place, pair in enumerate(chosen)}, names)


def _summarize(value: float, resampled: np.ndarray) -> Estimate:
    low, high = (float(bound) for bound in np.percentile(resampled, (2.5, 97.5)))
    return Estimate(value, float(resampled.mean()), (low, high))
