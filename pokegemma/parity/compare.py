"""Compare the readings of an engine with those of the reference."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from pokegemma.data.prompts import BUTTONS, answer_button
from pokegemma.data.samples import Sample, evenly_spread
from pokegemma.data.trajectories import Trajectory, cut_trajectories
from pokegemma.evaluation.view import View
from pokegemma.parity.task import Measured, Reading

_NUM_WORST = 6


def choose_examples(available: Sequence[Sample], view: View, *, count: int) -> tuple[Sample | Trajectory, ...]:
    """Return about `count` decisions, evenly spread; a trajectory ends with the decision that is asked for."""
    if view.layout != "trajectory":
        return tuple(evenly_spread(available, count))
    stretches = cut_trajectories(available, max_decisions=view.max_decisions, overlap=view.overlap_decisions)
    places = [(stretch, end) for stretch in stretches for end in range(stretch.num_context, len(stretch.samples))]
    return tuple(
        Trajectory(stretch.samples[: end + 1], num_context=stretch.num_context)
        for stretch, end in evenly_spread(places, count)
    )


def asked_sample(example: Sample | Trajectory) -> Sample:
    """Return the sample whose button is asked for."""
    return example.samples[-1] if isinstance(example, Trajectory) else example


def chosen_button(reading: Reading) -> str | None:
    """Return the button that scores highest; without scores, the written one."""
    return answer_button(reading.text) if reading.buttons is None else BUTTONS[int(reading.buttons.argmax())]


def summarize_engine(measured: Measured, examples: Sequence[Sample | Trajectory]) -> dict[str, Any]:
    """Return what needs no reference: valid JSON, accuracy against the recorded buttons, seconds, memory."""
    readings = measured.readings
    p50, p95 = np.percentile([reading.seconds for reading in readings], [50, 95])
    truth = [answer_button(asked_sample(example).output) for example in examples]
    return {
        "valid_json_rate": _share(answer_button(reading.text) is not None for reading in readings),
        "button_accuracy": _share(chosen_button(r) == true for r, true in zip(readings, truth, strict=True)),
        "latency_s": {"p50": float(p50), "p95": float(p95)},
        "peak_memory_bytes": measured.peak_memory_bytes,
        "peak_gpu_memory_bytes": measured.peak_gpu_memory_bytes,
    }


def compare(reference: Measured, measured: Measured) -> dict[str, Any]:
    """Return how an engine's readings agree with the reference's; None where the engine reports no such value.

    - button_agreement: share of decisions with the same button, scored among the eight (a server: written);
    - written_agreement: the same of written answers, where the reference's is valid; None where none is;
    - top1_agreement: share of the tokens of the reference's answers that are the likeliest here, too;
    - log_probability_difference: mean and largest distance in log-probability of these tokens (nats);
    - button_log_probability_difference: the same of the eight buttons;
    - prompts_equal: whether all prompts have the same tokens.
    """
    pairs = list(zip(reference.readings, measured.readings, strict=True))
    written = [(answer_button(expected.text), answer_button(actual.text)) for expected, actual in pairs]
    likeliest = [
        expected.likeliest[: len(actual.likeliest)] == actual.likeliest
        for expected, actual in pairs
        if actual.likeliest is not None
    ]
    prompts = [expected.prompt == actual.prompt for expected, actual in pairs if actual.prompt is not None]
    return {
        "button_agreement": _share(is_same_button(*pair) for pair in pairs),
        "written_agreement": _share(expected == actual for expected, actual in written if expected is not None),
        "top1_agreement": _share(np.concatenate(likeliest)) if likeliest else None,
        "log_probability_difference": _spread(answer_distances(*pair) for pair in pairs),
        "button_log_probability_difference": _spread(button_distances(*pair) for pair in pairs),
        "prompts_equal": all(prompts) if prompts else None,
    }


def is_same_button(expected: Reading, actual: Reading) -> bool:
    """Return whether both choose the same button, both scored or both written; without a button, the same text."""
    if actual.buttons is None:
        button = answer_button(expected.text)
        return actual.text == expected.text if button is None else answer_button(actual.text) == button
    return chosen_button(expected) == chosen_button(actual)


def answer_distances(expected: Reading, actual: Reading) -> np.ndarray:
    """Return the distance in log-probability of each token of the reference's answer that the engine reports."""
    if actual.log_probabilities is None:
        return np.zeros(0)
    return np.abs(expected.log_probabilities[: len(actual.log_probabilities)] - actual.log_probabilities)


def button_distances(expected: Reading, actual: Reading) -> np.ndarray:
    """Return the distance in log-probability of each button, (8,), or (0,) where the engine reports none."""
    return np.zeros(0) if actual.buttons is None else np.abs(expected.buttons - actual.buttons)


def _share(values: Iterable[Any]) -> float | None:
    values = list(values)
    return float(np.mean(values)) if values else None


def _spread(distances: Iterable[np.ndarray]) -> dict[str, float] | None:
    values = np.concatenate(list(distances))
    return {"mean": float(values.mean()), "max": float(values.max())} if len(values) else None


def find_worst(
    reference: Measured, measured: Measured, examples: Sequence[Sample | Trajectory]
) -> list[dict[str, Any]]:
    """Return the decisions that differ most: other buttons first, then by the largest distance in log-probability."""
    rows = []
    for place, (expected, actual) in enumerate(zip(reference.readings, measured.readings, strict=True)):
        distances = np.concatenate([button_distances(expected, actual), answer_distances(expected, actual)])
        rows.append(
            {
                "place": place,
                "id": asked_sample(examples[place]).id,
                "same_button": is_same_button(expected, actual),
                "reference_button": chosen_button(expected),
                "button": chosen_button(actual),
                "recorded_button": answer_button(asked_sample(examples[place]).output),
                "reference_text": expected.text,
                "text": actual.text,
                "difference": float(distances.max(initial=0.0)),
                "reference_scores": _button_probabilities(expected),
                "scores": _button_probabilities(actual),
            }
        )
    differing = [row for row in rows if row["difference"] > 0 or row["text"] != row["reference_text"]]
    return sorted(differing, key=lambda row: (row["same_button"], -row["difference"]))[:_NUM_WORST]


def _button_probabilities(reading: Reading) -> dict[str, float] | None:
    """Return the probabilities of the buttons, normalised over the eight."""
    if reading.buttons is None:
        return None
    shares = np.exp(reading.buttons - reading.buttons.max())
    return dict(zip(BUTTONS, map(float, shares / shares.sum()), strict=True))
