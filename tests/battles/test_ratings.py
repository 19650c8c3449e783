"""Ratings: known solutions, order does not matter, and what has no common scale is refused."""

import numpy as np
import pytest

from pokegemma.battles.arena.ratings import fit_strengths, rate_players
from pokegemma.errors import PokegemmaError


def rounds_of(wins: int, losses: int, ties: int = 0) -> np.ndarray:
    """Return rounds of one battle each, (wins + losses + ties, 3)."""
    return np.repeat(np.eye(3, dtype=np.int64), (wins, losses, ties), axis=0)


def test_a_gap_is_the_logarithm_of_the_odds() -> None:
    """3 wins, 1 loss: 400 log10(3) = 190.8. Ties do not move it, as they do where each counts as half a win (88.7)."""
    for ties, nu in ((0, 0.0), (4, 4 / np.sqrt(3))):
        ratings = rate_players({("a", "b"): rounds_of(3, 1, ties)}, prior=0, num_resamples=10)
        assert ratings.names == ("a", "b")
        assert ratings.ratings == pytest.approx([95.42, -95.42], abs=0.01)
        assert ratings.tie_parameter == pytest.approx(nu)


def test_expected_wins_and_ties_equal_those_that_were_counted() -> None:
    """At the maximum of the likelihood this holds for each player, and for the ties of all."""
    counts = np.array([[[30.0, 12, 5], [22, 20, 9], [15, 31, 2]]])
    pairs = [(0, 1), (0, 2), (1, 2)]
    strengths, log_nu = fit_strengths(pairs, counts, num_players=3, prior=0)
    p, nu = np.exp(strengths[0]), np.exp(log_nu[0])
    scores, ties = np.zeros(3), 0.0
    for (first, second), row in zip(pairs, counts[0], strict=True):
        tie = nu * np.sqrt(p[first] * p[second])
        shares = np.array([p[first], p[second], tie]) / (p[first] + p[second] + tie)
        expected = row.sum() * shares
        ties += expected[2]
        for place, player in ((0, first), (1, second)):
            scores[player] += expected[place] + expected[2] / 2
    assert ties == pytest.approx(16)
    assert scores == pytest.approx([30 + 22 + 7, 12 + 15 + 3.5, 20 + 31 + 5.5])


def test_many_tables_are_fitted_as_each_alone() -> None:
    tables = np.random.default_rng(0).integers(0, 9, (20, 3, 3)).astype(float)
    tables[3, :, 2] = 0  # no ties
    tables[4, :, :2] = 0  # nothing else
    pairs = [(0, 1), (0, 2), (1, 2)]
    together, log_nu = fit_strengths(pairs, tables, num_players=3, prior=0.5)
    for place, table in enumerate(tables):
        alone, log_nu_alone = fit_strengths(pairs, table[None], num_players=3, prior=0.5)
        assert together[place] == pytest.approx(alone[0], abs=1e-6)
        assert log_nu[place] == pytest.approx(log_nu_alone[0], abs=1e-6)
    assert np.isfinite(together).all()


def test_an_interval_contains_the_rating_and_shrinks_with_the_battles() -> None:
    few, many = (
        rate_players({("a", "b"): rounds_of(6 * scale, 4 * scale), ("b", "c"): rounds_of(5 * scale, 5 * scale)})
        for scale in (1, 16)
    )
    for ratings in (few, many):
        assert (ratings.intervals[:, 0] < ratings.ratings).all() and (ratings.ratings < ratings.intervals[:, 1]).all()
    assert 3 < np.diff(few.intervals).sum() / np.diff(many.intervals).sum() < 6  # about the root of 16


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    draws = np.random.default_rng(1)
    covered = 0
    for _ in range(100):
        wins = draws.binomial(60, 0.6)
        ratings = rate_players({("a", "b"): rounds_of(wins, 60 - wins)}, num_resamples=200)
        low, high = ratings.intervals[0]
        covered += low <= 200 * np.log10(1.5) <= high
    assert 88 <= covered <= 99


def test_a_player_that_never_lost_has_a_rating_by_the_prior_only() -> None:
    rounds = {("a", "b"): rounds_of(10, 0), ("b", "c"): rounds_of(5, 5)}
    assert 300 < rate_players(rounds, num_resamples=10).ratings[0] < 1000
    with pytest.raises(PokegemmaError, match="never beat a"):
        rate_players(rounds, prior=0)


def test_players_that_never_met_are_refused() -> None:
    rounds = {("a", "b"): rounds_of(1, 1), ("c", "d"): rounds_of(1, 1)}
    with pytest.raises(PokegemmaError, match="c, d never met a, b"):
        rate_players(rounds)
    assert rate_players({**rounds, ("b", "c"): rounds_of(1, 1)}).names == ("a", "b", "c", "d")
