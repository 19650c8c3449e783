"""Games whose moves are players: equilibria that are known, exploitability, and what resampled battles tell of it."""

import numpy as np
import pytest

pytest.importorskip("poke_env", reason="needs poke-env (./init.sh --with battles)")
from pokegemma.battles.selfplay.matrix_game import (
    estimate_exploitability,
    estimate_payoff,
    find_exploitability,
    find_nash,
    payoff_matrix,
)
from pokegemma.battles.selfplay.psro import Equilibrium, describe_equilibria, find_equilibria
from pokegemma.errors import PokegemmaError

NAMES = ("paper", "rock", "scissors")
ROCK_PAPER_SCISSORS = np.array([[0.5, 1, 0], [0, 0.5, 1], [1, 0, 0.5]])
"""In the order of `NAMES`, which is that of the pairs in a table of counts."""

PAIRS = {("paper", "rock"): (0, 1), ("paper", "scissors"): (0, 2), ("rock", "scissors"): (1, 2)}


def play(payoffs: np.ndarray, num_rounds: int, seed: int) -> dict[tuple[str, str], np.ndarray]:
    """Return the counts of rounds of two battles without ties, won by the chances in `payoffs`."""
    draws = np.random.default_rng(seed)
    rounds = {}
    for pair, place in PAIRS.items():
        wins = draws.binomial(2, payoffs[place], size=num_rounds)
        rounds[pair] = np.stack([wins, 2 - wins, np.zeros_like(wins)], axis=1)
    return rounds


def biased_game(first: float, second: float, third: float) -> np.ndarray:
    """Return a game in which 0 beats 1 by `first` above one half, 1 beats 2 by `second`, and 2 beats 0 by `third`.

    Its equilibrium is (second, third, first), divided by their sum.
    """
    return 0.5 + np.array([[0, first, -third], [-first, 0, second], [third, -second, 0]])


def test_rock_paper_scissors_is_played_evenly() -> None:
    mixture = find_nash(ROCK_PAPER_SCISSORS)
    assert mixture == pytest.approx([1 / 3] * 3)
    assert find_exploitability(ROCK_PAPER_SCISSORS, mixture) == pytest.approx(0)


@pytest.mark.parametrize("place", range(3))
def test_a_single_move_of_rock_paper_scissors_always_loses_to_another(place: int) -> None:
    assert find_exploitability(ROCK_PAPER_SCISSORS, np.eye(3)[place]) == 0.5


def test_a_biased_game_has_its_known_equilibrium() -> None:
    game = biased_game(0.1, 0.2, 0.4)
    assert find_nash(game) == pytest.approx([2 / 7, 4 / 7, 1 / 7])
    assert find_exploitability(game, np.full(3, 1 / 3)) == pytest.approx(0.2 / 3)  # move 2 has (0.4 - 0.2) / 3


def test_a_dominant_player_is_played_alone() -> None:
    game = np.array([[0.5, 0.4, 0.1], [0.6, 0.5, 0.3], [0.9, 0.7, 0.5]])
    assert find_nash(game).tolist() == [0, 0, 1]


def test_a_matrix_that_is_not_the_same_for_both_sides_is_refused() -> None:
    with pytest.raises(ValueError, match="add up to 1"):
        find_nash(np.array([[0.5, 0.5], [0.6, 0.5]]))


def test_payoffs_are_shares_of_wins_with_half_of_the_ties() -> None:
    counts = {("a", "b"): np.array([6, 2, 2]), ("a", "c"): np.array([0, 4, 0]), ("b", "c"): np.array([1, 1, 2])}
    matrix = payoff_matrix(counts, ["b", "a", "c"])
    assert matrix == pytest.approx(np.array([[0.5, 0.3, 0.5], [0.7, 0.5, 0], [0.5, 1, 0.5]]))
    assert payoff_matrix(counts, ["c", "a"]) == pytest.approx(np.array([[0.5, 1], [0, 0.5]]))


@pytest.mark.parametrize("missing", [None, np.zeros(3, dtype=int)])
def test_a_pair_that_was_not_played_has_no_payoff(missing) -> None:
    counts = {("a", "b"): np.array([6, 2, 2]), ("a", "c"): np.array([1, 0, 0])}
    if missing is not None:
        counts["b", "c"] = missing
    with pytest.raises(PokegemmaError, match=r"no battle was played: b and c$"):
        payoff_matrix(counts, ["a", "b", "c"])


def test_an_equilibrium_of_measured_payoffs_is_exploitable_by_about_what_resampled_battles_tell() -> None:
    """Of 50 rounds a pair, the true exploitability is 0.02 on average; in the measured matrix it is always 0."""
    game = biased_game(0.2, 0.2, 0.2)
    true, estimated, covered = [], [], []
    for seed in range(40):
        rounds = play(game, 50, seed)
        mixture = find_nash(payoff_matrix({pair: each.sum(0) for pair, each in rounds.items()}, NAMES))
        estimate = estimate_exploitability(rounds, NAMES, mixture, num_resamples=200)
        true.append(find_exploitability(game, mixture))
        estimated.append(estimate.mean)
        covered.append(true[-1] <= estimate.interval[1])
        assert estimate.value == pytest.approx(0, abs=1e-6)
    assert np.mean(true) == pytest.approx(0.02, abs=0.007)
    assert np.mean(estimated) == pytest.approx(np.mean(true), abs=0.007)
    assert np.mean(covered) >= 0.9


def test_a_payoff_against_a_mixture_has_an_interval() -> None:
    rounds = play(biased_game(0.1, 0.2, 0.4), 200, 0)
    mixture = np.array([0.0, 0.5, 0.5])
    estimate = estimate_payoff(rounds, NAMES, "paper", mixture, num_resamples=200)
    matrix = payoff_matrix({pair: each.sum(0) for pair, each in rounds.items()}, NAMES)
    assert estimate.value == pytest.approx((matrix[0, 1] + matrix[0, 2]) / 2)
    low, high = estimate.interval
    assert low < estimate.value < high and high - low < 0.1
    assert estimate.mean == pytest.approx(estimate.value, abs=0.01)


def find_by_exact_responses(num_responses: int) -> list[Equilibrium]:
    """Return what PSRO finds in rock-paper-scissors, from rock and paper on, where best responses are exact."""

    def measure(names) -> dict[tuple[str, str], np.ndarray]:
        return {pair: each for pair, each in play(ROCK_PAPER_SCISSORS, 5, 0).items() if set(pair) <= set(names)}

    def respond(number: int, equilibrium: Equilibrium) -> str:
        mixture = np.zeros(3)
        mixture[[NAMES.index(name) for name in equilibrium.names]] = equilibrium.mixture
        return NAMES[int((ROCK_PAPER_SCISSORS @ mixture).argmax())]

    return find_equilibria(["rock", "paper"], num_responses=num_responses, measure=measure, respond=respond)


def test_an_exact_response_leads_to_the_equilibrium_of_rock_paper_scissors() -> None:
    first, last = find_by_exact_responses(1)
    assert (first.names, last.names) == (("rock", "paper"), ("rock", "paper", "scissors"))
    assert first.mixture.tolist() == [0, 1]
    assert last.mixture == pytest.approx([1 / 3] * 3)


def test_a_mixture_that_only_later_players_exploit_is_recorded_so() -> None:
    first, last = describe_equilibria(find_by_exact_responses(1), num_resamples=50, seed=0)
    assert first["exploitability"]["value"] == 0 < first["later_exploitability"]["value"] == 0.5
    assert (first["response"], first["response_payoff"]["value"]) == ("scissors", 1)
    assert last["exploitability"]["value"] == pytest.approx(0, abs=1e-6)
    assert "response" not in last
