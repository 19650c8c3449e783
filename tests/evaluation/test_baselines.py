import numpy as np
import pytest

from pokegemma.evaluation import baselines
from pokegemma.evaluation.metrics import NO_BUTTON, Decisions

UP, DOWN, LEFT = 0, 1, 2


@pytest.fixture
def counts():
    """up is pressed 3 times, down 2; after up: up, down, down; after down: up; nothing ever follows left."""
    return baselines.count_buttons(
        Decisions(
            truth=np.array([UP, UP, DOWN, DOWN, UP]),
            previous=np.array([NO_BUTTON, UP, UP, UP, DOWN]),
            sessions=("s",) * 5,
            situations=("unknown",) * 5,
        )
    )


PREVIOUS = np.array([NO_BUTTON, UP, DOWN, LEFT])


def test_majority_presses_the_most_frequent_button(counts):
    predicted, probabilities = baselines.predict_majority(counts, PREVIOUS)
    assert predicted.tolist() == [UP] * 4
    # (3 + 1) / (5 + 8), (2 + 1) / 13, then 1 / 13 six times
    assert probabilities[0] == pytest.approx([4 / 13, 3 / 13] + [1 / 13] * 6)


def test_repeat_presses_the_previous_button_or_the_majority(counts):
    predicted, probabilities = baselines.predict_repeat(counts, PREVIOUS)
    assert predicted.tolist() == [UP, UP, DOWN, LEFT]
    assert probabilities is None


def test_markov_presses_what_followed_the_previous_button(counts):
    predicted, probabilities = baselines.predict_markov(counts, PREVIOUS)
    assert predicted.tolist() == [UP, DOWN, UP, UP]
    # after up: up once, down twice, of three
    assert probabilities[1] == pytest.approx([2 / 11, 3 / 11] + [1 / 11] * 6)
    assert probabilities[2] == pytest.approx([2 / 9] + [1 / 9] * 7)


def test_markov_falls_back_to_the_majority(counts):
    predicted, probabilities = baselines.predict_markov(counts, PREVIOUS)
    for row in (0, 3):  # no previous button; one that nothing ever followed
        assert predicted[row] == UP
        assert probabilities[row] == pytest.approx([4 / 13, 3 / 13] + [1 / 13] * 6)


def test_probabilities_sum_to_one_for_every_baseline(counts):
    for label, predict in baselines.BASELINES.values():
        probabilities = predict(counts, PREVIOUS)[1]
        assert probabilities is None or probabilities.sum(1) == pytest.approx(np.ones(4)), label


def test_predicting_changes_neither_counts_nor_input(counts):
    overall, previous = counts.overall.copy(), PREVIOUS.copy()
    for _, predict in baselines.BASELINES.values():
        predict(counts, previous)
    assert np.array_equal(counts.overall, overall) and np.array_equal(previous, PREVIOUS)
