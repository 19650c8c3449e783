"""Ratings from wins, losses and ties: Bradley and Terry's model with Davidson's ties, intervals by bootstrap.

With strengths p, player i beats j with probability p_i / (p_i + p_j + nu sqrt(p_i p_j)), and they tie with probability
nu sqrt(p_i p_j) / (the same) (Davidson 1970, https://doi.org/10.1080/01621459.1970.10481082). A rating is
400 log10(p), as Elo's, with a mean of 0 over the pool. Unlike Elo's it does not depend on the order of the battles.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pokegemma.battles.arena.plan import Pair
from pokegemma.errors import PokegemmaError

PRIOR = 0.5
"""Wins, and losses as many, that each player is given against a player of rating 0 outside the pool: without them one
that never lost would have no finite rating."""

_POINTS = 400 / np.log(10)
_NO_TIES, _ONLY_TIES = -40.0, 10.0
"""The logarithm of nu where there was no tie, or nothing else; its likeliest value is minus or plus infinity."""

_MAX_STEP, _TOLERANCE, _MAX_ITERATIONS = 2.0, 1e-9, 200


@dataclass(frozen=True)
class Ratings:
    """Ratings in the order of `names`, and their 95 % intervals.

    ratings (N,) float64; intervals (N, 2) float64; tie_parameter: nu.
    """

    names: tuple[str, ...]
    ratings: np.ndarray
    intervals: np.ndarray
    tie_parameter: float


def rate_players(
    rounds: Mapping[Pair, np.ndarray], *, prior: float = PRIOR, num_resamples: int = 1000, seed: int = 0
) -> Ratings:
    """Return the ratings of all players in `rounds`.

    Args:
        rounds: of each pair, (R, 3): wins of the first, wins of the second, and ties, in each round. The rounds are
            resampled and not the battles, because both battles of a round have one seed.
        prior: see `PRIOR`; 0 for none.

    Raises:
        PokegemmaError: some players never met the others, not even over a third; or without a prior, some never lost to
            or never won against the others.
    """
    names = tuple(sorted({name for pair in rounds for name in pair}))
    require_connected(names, [pair for pair, counts in rounds.items() if counts.sum()])
    counts = np.stack([each.sum(axis=0) for each in rounds.values()])[None]
    if not prior:
        _require_finite(names, rounds)
    pairs = [(names.index(first), names.index(second)) for first, second in rounds]
    strengths, log_nu = fit_strengths(pairs, counts, num_players=len(names), prior=prior)
    drawn = resample_rounds(list(rounds.values()), num_resamples=num_resamples, seed=seed)
    # Without a prior a resample may have no finite ratings although all rounds together have.
    resampled, _ = fit_strengths(pairs, drawn, num_players=len(names), prior=prior or PRIOR)
    bounds = np.percentile(_center(resampled), (2.5, 97.5), axis=0).T
    return Ratings(names, _center(strengths)[0], bounds, float(np.exp(log_nu[0])) if log_nu[0] > _NO_TIES else 0.0)


def _center(strengths: np.ndarray) -> np.ndarray:
    return _POINTS * (strengths - strengths.mean(axis=1, keepdims=True))


def resample_rounds(rounds: Sequence[np.ndarray], *, num_resamples: int, seed: int) -> np.ndarray:
    """Return the counts of each pair in rounds drawn with replacement within the pair, (num_resamples, pairs, 3)."""
    draws = np.random.default_rng(seed)
    columns = []
    for each in rounds:
        times = draws.multinomial(len(each), np.full(len(each), 1 / len(each)), size=num_resamples)
        columns.append(times @ each)
    return np.stack(columns, axis=1).astype(np.float64)


def fit_strengths(
    pairs: Sequence[tuple[int, int]], counts: np.ndarray, *, num_players: int, prior: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the likeliest log strengths (B, players) and log nu (B,) of B tables of counts.

    The logarithm of the likelihood is concave in them, so that Newton's steps end at its maximum.

    Args:
        pairs: places of the players of each pair.
        counts: (B, pairs, 3): wins of the first, wins of the second, ties.
    """
    features = np.zeros((len(pairs), 3, num_players + 1))
    for place, (first, second) in enumerate(pairs):
        features[place, 0, first] = features[place, 1, second] = features[place, 2, num_players] = 1.0
        features[place, 2, [first, second]] = 0.5
    has_ties = counts[:, :, 2].sum(axis=1) > 0
    values = np.zeros((len(counts), num_players + 1))
    values[~has_ties, -1] = _NO_TIES
    for _ in range(_MAX_ITERATIONS):
        gradient, curvature = _derivatives(values, features, counts, prior=prior)
        gradient[~has_ties, -1] = 0.0
        curvature[~has_ties, -1, :] = curvature[~has_ties, :, -1] = 0.0
        curvature[~has_ties, -1, -1] = 1.0
        step = np.linalg.solve(curvature, gradient[..., None])[..., 0]
        step /= np.maximum(1.0, abs(step).max(axis=1, keepdims=True) / _MAX_STEP)
        step[:, -1] = np.minimum(step[:, -1], _ONLY_TIES - values[:, -1])
        values += step
        if abs(step).max() < _TOLERANCE:
            break
    return values[:, :-1], values[:, -1]


def _derivatives(
    values: np.ndarray, features: np.ndarray, counts: np.ndarray, *, prior: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the log-likelihood's first derivatives (B, K), and minus its second ones (B, K, K)."""
    logits = np.einsum("pok,bk->bpo", features, values)
    shares = np.exp(logits - logits.max(axis=2, keepdims=True))
    shares /= shares.sum(axis=2, keepdims=True)
    totals = counts.sum(axis=2)
    gradient = np.einsum("bpo,pok->bk", counts - totals[..., None] * shares, features)
    means = np.einsum("bpo,pok->bpk", shares, features)
    curvature = np.einsum("bp,bpo,pok,pol->bkl", totals, shares, features, features, optimize=True)
    curvature -= np.einsum("bp,bpk,bpl->bkl", totals, means, means, optimize=True)
    strengths = values[:, :-1]
    if prior:
        share = 1 / (1 + np.exp(-strengths))
        gradient[:, :-1] += prior * (1 - 2 * share)
        places = np.arange(strengths.shape[1])
        curvature[:, places, places] += 2 * prior * share * (1 - share)
    else:  # only differences count: hold the sum, along which there is no gradient
        curvature[:, :-1, :-1] += 1.0
    return gradient, curvature


def require_connected(names: Sequence[str], pairs: Sequence[Pair]) -> None:
    """Refuse players of which some never met the others, directly or over third ones.

    Raises:
        PokegemmaError: there is no common scale for them.
    """
    edges = {name: {other for pair in pairs if name in pair for other in pair} for name in names}
    met = _reach(names[0], edges)
    if left := sorted(set(names) - met):
        raise PokegemmaError(
            f"players {', '.join(left)} never met {', '.join(sorted(met))}, so that no scale is common to them; "
            "let a player of each group meet, or rate the groups apart"
        )


def _require_finite(names: Sequence[str], rounds: Mapping[Pair, np.ndarray]) -> None:
    """Refuse what has no finite ratings (Ford 1957): a group that never lost to, or tied with, the others."""
    totals = {pair: each.sum(axis=0) for pair, each in rounds.items()}
    beaten: dict[str, set[str]] = {name: set() for name in names}
    for (first, second), (wins, losses, ties) in totals.items():
        beaten[first] |= {second} if wins or ties else set()
        beaten[second] |= {first} if losses or ties else set()
    for name in names:
        if left := sorted(set(names) - _reach(name, beaten)):
            raise PokegemmaError(f"{name} never beat {', '.join(left)}: without a prior no rating is finite")


def _reach(start: str, edges: Mapping[str, set[str]]) -> set[str]:
    found, waiting = {start}, [start]
    while waiting:
        new = edges[waiting.pop()] - found
        found |= new
        waiting += new
    return found
