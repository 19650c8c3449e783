"""Metrics of decisions: accuracy and F1 tables, confusion, likelihood, and intervals by bootstrap over sessions.

Accuracy and F1 are counted from a confusion matrix of shape (8, 9): rows are the true buttons and columns the pressed
ones, both in the order of `BUTTONS`; the ninth column counts answers that name no button. Such an answer is wrong.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pokegemma.data.prompts import BUTTONS, AnswerError, parse_answer
from pokegemma.data.samples import Sample
from pokegemma.errors import PokegemmaError

INVALID = len(BUTTONS)
"""Column of the confusion matrix for an answer that names no button."""

NO_BUTTON = -1
"""Index that stands for "nothing was pressed before"."""

NUM_RESAMPLES = 2000
_INTERVAL_PERCENTILES = (2.5, 97.5)
_BUTTON_INDEX = {button: index for index, button in enumerate(BUTTONS)}


@dataclass(frozen=True)
class Decisions:
    """Labels of N decisions: arrays of N button indices, and N names.

    `previous` is the button pressed just before, or `NO_BUTTON`.
    """

    truth: np.ndarray
    previous: np.ndarray
    sessions: tuple[str, ...]
    situations: tuple[str, ...]

    @property
    def is_change(self) -> np.ndarray:
        """Where the true button differs from the one pressed before; never on a turn without a previous button."""
        return (self.previous != NO_BUTTON) & (self.truth != self.previous)


def read_decisions(samples: Iterable[Sample]) -> Decisions:
    """Collect the labels of `samples`.

    Raises:
        PokegemmaError: the output or the previous button of a sample is not one of the eight buttons.
    """
    truth, previous, sessions, situations = [], [], [], []
    for sample in samples:
        try:
            truth.append(_BUTTON_INDEX[parse_answer(sample.output).button])
        except AnswerError as error:
            raise PokegemmaError(f"{sample.id}: output is not an answer: {error}") from error
        last = sample.previous_buttons[-1] if sample.previous_buttons else None
        if last is not None and last not in _BUTTON_INDEX:
            raise PokegemmaError(f"{sample.id}: previous button {last!r} is not one of {', '.join(BUTTONS)}")
        previous.append(NO_BUTTON if last is None else _BUTTON_INDEX[last])
        sessions.append(sample.session)
        situations.append(str(sample.metadata.get("situation") or "unknown"))
    return Decisions(np.array(truth, int), np.array(previous, int), tuple(sessions), tuple(situations))


def button_indices(buttons: Iterable[str | None]) -> np.ndarray:
    """Return the index of each button, `INVALID` for None."""
    return np.array([INVALID if button is None else _BUTTON_INDEX[button] for button in buttons], int)


def confusion_matrix(truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Count (8, 9): row = true button, column = pressed button or `INVALID`."""
    cells = np.asarray(truth, int) * (INVALID + 1) + np.asarray(predicted, int)
    return np.bincount(cells, minlength=INVALID * (INVALID + 1)).reshape(INVALID, INVALID + 1)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full(np.shape(above), np.nan), where=np.asarray(below) != 0)


def accuracy(confusion: np.ndarray) -> np.ndarray:
    """Return the share of right answers of each matrix (..., 8, 9); NaN where there is no decision."""
    right = np.trace(confusion[..., :INVALID], axis1=-2, axis2=-1).astype(float)
    return _ratio(right, confusion.sum((-2, -1)))


def button_f1(confusion: np.ndarray) -> np.ndarray:
    """Return F1 = 2 right / (pressed + true) of each button, (..., 8); NaN for one neither pressed nor true."""
    right = np.diagonal(confusion[..., :INVALID], axis1=-2, axis2=-1).astype(float)
    return _ratio(2 * right, confusion.sum(-1) + confusion[..., :INVALID].sum(-2))


def macro_f1(confusion: np.ndarray) -> np.ndarray:
    """Return the mean F1 of the buttons that occur in the truth, of each matrix (..., 8, 9).

    A button that is never right has no F1, even if the model presses it; it lowers the recall of the buttons that it
    replaces. So every row of a report averages over the same buttons.
    """
    occurs = confusion.sum(-1) > 0
    return _ratio(np.where(occurs, button_f1(confusion), 0.0).sum(-1), occurs.sum(-1))


def button_table(confusion: np.ndarray) -> list[dict[str, Any]]:
    """Return support, times pressed, precision, recall and F1 of each button; None where one is undefined."""
    right = np.diagonal(confusion[:, :INVALID]).astype(float)
    support, pressed = confusion.sum(1), confusion[:, :INVALID].sum(0)
    precision, recall, f1 = _ratio(right, pressed), _ratio(right, support), button_f1(confusion)
    return [
        {
            "button": button,
            "support": int(support[index]),
            "pressed": int(pressed[index]),
            "precision": finite(precision[index]),
            "recall": finite(recall[index]),
            "f1": finite(f1[index]),
        }
        for index, button in enumerate(BUTTONS)
    ]


def situation_table(decisions: Decisions, predicted: np.ndarray) -> list[dict[str, Any]]:
    """Return support, accuracy and macro-F1 of each situation, the most frequent first."""
    situations = np.array(decisions.situations, dtype=object)
    table = []
    for situation in sorted(set(decisions.situations)):
        chosen = situations == situation
        confusion = confusion_matrix(decisions.truth[chosen], predicted[chosen])
        scores = {"accuracy": finite(accuracy(confusion)), "macro_f1": finite(macro_f1(confusion))}
        table.append({"situation": situation, "support": int(chosen.sum()), **scores})
    return sorted(table, key=lambda row: -row["support"])


def negative_log_likelihood(truth: np.ndarray, probabilities: np.ndarray) -> float:
    """Return the mean of -ln p(true button); `probabilities` is (N, 8). A p of 0 counts as the smallest float."""
    true = probabilities[np.arange(len(truth)), truth]
    return float(-np.log(np.maximum(true, np.finfo(float).tiny)).mean())


def reliability_table(truth: np.ndarray, probabilities: np.ndarray, *, num_bins: int = 10) -> list[dict[str, Any]]:
    """Return, for each tenth of confidence (the highest p) that occurs, its count, mean confidence and accuracy."""
    confidence, right = probabilities.max(1), probabilities.argmax(1) == truth
    bins = np.minimum((confidence * num_bins).astype(int), num_bins - 1)
    return [
        {
            "low": number / num_bins,
            "high": (number + 1) / num_bins,
            "count": int((bins == number).sum()),
            "confidence": float(confidence[bins == number].mean()),
            "accuracy": float(right[bins == number].mean()),
        }
        for number in sorted(set(bins.tolist()))
    ]


def resample_sessions(
    decisions: Decisions, predictions: Mapping[str, np.ndarray], *, seed: int = 0, num_resamples: int = NUM_RESAMPLES
) -> dict[str, dict[str, np.ndarray]]:
    """Return accuracy and macro-F1 of each set of predictions in `num_resamples` draws of whole sessions.

    Turns of one session are similar, so whole sessions are drawn with replacement, as many as there are. All
    predictions are measured on the same draws, so the difference of two of them is paired. The result is empty with
    fewer than two sessions, since one session does not show how sessions differ.
    """
    names = sorted(set(decisions.sessions))
    if len(names) < 2:
        return {}
    number = {name: index for index, name in enumerate(names)}
    session = np.array([number[name] for name in decisions.sessions])
    drawn = np.random.default_rng(seed).multinomial(len(names), [1 / len(names)] * len(names), num_resamples)
    size = INVALID * (INVALID + 1)
    resampled = {}
    for key, predicted in predictions.items():
        cells = session * size + decisions.truth * (INVALID + 1) + predicted
        counts = np.bincount(cells, minlength=len(names) * size).reshape(len(names), size)
        confusion = (drawn @ counts).reshape(num_resamples, INVALID, INVALID + 1)
        resampled[key] = {"accuracy": accuracy(confusion), "macro_f1": macro_f1(confusion)}
    return resampled


def interval(values: np.ndarray | None) -> list[float] | None:
    """Return the 95 % percentile interval of resampled `values`, or None without any."""
    return None if values is None else [float(value) for value in np.percentile(values, _INTERVAL_PERCENTILES)]


def wilson_interval(num_right: int, total: int) -> list[float]:
    """Return the 95 % interval of a share of independent trials (Wilson 1927), which fits 0 and 100 % as well."""
    z, share = 1.96, num_right / total
    centre = share + z**2 / (2 * total)
    half = z * (share * (1 - share) / total + z**2 / (4 * total**2)) ** 0.5
    bounds = (centre - half) / (1 + z**2 / total), (centre + half) / (1 + z**2 / total)
    return [min(1.0, max(0.0, bound)) for bound in bounds]  # rounding may lead outside


def finite(value: float) -> float | None:
    """Return `value` as a float that JSON can hold: None for NaN and infinity."""
    return float(value) if np.isfinite(value) else None


def build_row(
    key: str,
    label: str,
    decisions: Decisions,
    predicted: np.ndarray,
    probabilities: np.ndarray | None,
    resampled: Mapping[str, Mapping[str, np.ndarray]],
) -> dict[str, Any]:
    """Return one row of the comparison: a predictor's accuracy and macro-F1 with intervals, change accuracy, NLL."""
    confusion = confusion_matrix(decisions.truth, predicted)
    change = confusion_matrix(decisions.truth[decisions.is_change], predicted[decisions.is_change])
    draws = resampled.get(key, {})
    return {
        "key": key,
        "name": label,
        "accuracy": finite(accuracy(confusion)),
        "accuracy_interval": interval(draws.get("accuracy")),
        "macro_f1": finite(macro_f1(confusion)),
        "macro_f1_interval": interval(draws.get("macro_f1")),
        "change_accuracy": finite(accuracy(change)),
        "nll": None if probabilities is None else negative_log_likelihood(decisions.truth, probabilities),
    }


def build_difference(
    row: Mapping[str, Any], baseline: Mapping[str, Any], resampled: Mapping[str, Mapping[str, np.ndarray]]
) -> dict[str, Any]:
    """Return `row` minus `baseline` in accuracy and macro-F1, with paired intervals."""
    difference: dict[str, Any] = {"of": row["key"], "minus": baseline["key"]}
    for name in ("accuracy", "macro_f1"):
        difference[name] = row[name] - baseline[name]
        draws = resampled[row["key"]][name] - resampled[baseline["key"]][name] if resampled else None
        difference[f"{name}_interval"] = interval(draws)
    return difference


def percentiles_ms(seconds: Sequence[float]) -> dict[str, Any]:
    """Return p50 and p95, in milliseconds, of durations in seconds."""
    p50, p95 = np.percentile(np.array(seconds) * 1000, (50, 95))
    return {"p50": float(p50), "p95": float(p95), "num_decisions": len(seconds)}
