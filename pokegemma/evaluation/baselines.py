"""Three baselines that see no picture, fitted on the training split."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from pokegemma.data.prompts import BUTTONS
from pokegemma.evaluation.metrics import NO_BUTTON, Decisions


@dataclass(frozen=True)
class ButtonCounts:
    """How often each button was pressed: (8,) overall, and (8, 8) after each previous button (rows)."""

    overall: np.ndarray
    after: np.ndarray


def count_buttons(decisions: Decisions) -> ButtonCounts:
    """Count the buttons of the training decisions, from which all baselines predict."""
    size = len(BUTTONS)
    known = decisions.previous != NO_BUTTON
    pairs = decisions.previous[known] * size + decisions.truth[known]
    return ButtonCounts(
        overall=np.bincount(decisions.truth, minlength=size),
        after=np.bincount(pairs, minlength=size * size).reshape(size, size),
    )


def _smooth(counts: np.ndarray) -> np.ndarray:
    """Return probabilities with one added to every count, so that no button is impossible."""
    return (counts + 1) / (counts + 1).sum(-1, keepdims=True)


def predict_majority(counts: ButtonCounts, previous: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Always press the most frequent button (the first of a tie); probabilities are the smoothed frequencies."""
    probabilities = np.tile(_smooth(counts.overall), (len(previous), 1))
    return np.full(len(previous), counts.overall.argmax()), probabilities


def predict_repeat(counts: ButtonCounts, previous: np.ndarray) -> tuple[np.ndarray, None]:
    """Press the previous button again, or the most frequent one where there is none. Gives no probabilities."""
    return np.where(previous == NO_BUTTON, counts.overall.argmax(), previous), None


def predict_markov(counts: ButtonCounts, previous: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Press the button that most often followed the previous one; probabilities are smoothed P(button | previous).

    Presses the most frequent button where there is no previous button, or where nothing followed it in training.
    """
    predicted, probabilities = predict_majority(counts, previous)
    known = (previous != NO_BUTTON) & (counts.after.sum(1)[previous] > 0)
    predicted[known] = counts.after.argmax(1)[previous[known]]
    probabilities[known] = _smooth(counts.after)[previous[known]]
    return predicted, probabilities


Predict = Callable[[ButtonCounts, np.ndarray], tuple[np.ndarray, np.ndarray | None]]

BASELINES: Mapping[str, tuple[str, Predict]] = {
    "majority": ("majority", predict_majority),
    "repeat_previous": ("repeat previous", predict_repeat),
    "markov": ("Markov, first order", predict_markov),
}
"""Label and function of each baseline: (counts, previous (N,)) -> buttons (N,), probabilities (N, 8) or None."""
