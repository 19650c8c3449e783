"""Compare what engines say with what the reference says, and judge it."""

import json
import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pokegemma.data.prompts import BUTTONS, answer_button
from pokegemma.data.samples import Sample, evenly_spread
from pokegemma.data.trajectories import Trajectory, cut_trajectories
from pokegemma.errors import PokegemmaError
from pokegemma.evaluation.view import View
from pokegemma.parity.worker import EngineFailedError, EngineSpec, Measured, Reading

_NUM_WORST = 6


@dataclass(frozen=True)
class Gates:
    """What an engine must reach. `max_difference`: mean difference in log-probability; None: it is not judged."""

    min_agreement: float
    max_difference: float | None
    max_invalid_json: float


def choose_examples(available: Sequence[Sample], view: View, *, count: int) -> tuple[Sample | Trajectory, ...]:
    """Return about `count` decisions, evenly spread; of a trajectory what was shown before a decision, and itself."""
    if view.layout != "trajectory":
        return tuple(evenly_spread(available, count))
    stretches = cut_trajectories(available, max_decisions=view.max_decisions, overlap=view.overlap_decisions)
    places = [(stretch, end) for stretch in stretches for end in range(stretch.num_context, len(stretch.samples))]
    return tuple(
        Trajectory(stretch.samples[: end + 1], num_context=stretch.num_context)
        for stretch, end in evenly_spread(places, count)
    )


def asked(example: Sample | Trajectory) -> Sample:
    """Return the sample whose button is asked for."""
    return example.samples[-1] if isinstance(example, Trajectory) else example


def chosen_button(reading: Reading) -> str | None:
    """Return the button that scores highest; where there are no scores, the written one."""
    return answer_button(reading.text) if reading.buttons is None else BUTTONS[int(reading.buttons.argmax())]


def describe(measured: Measured, examples: Sequence[Sample | Trajectory]) -> dict[str, Any]:
    """Return what is told of the reference as well: rates, accuracy against what was recorded, seconds, memory."""
    readings = measured.readings
    p50, p95 = np.percentile([reading.seconds for reading in readings], [50, 95])
    truth = [answer_button(asked(example).output) for example in examples]
    return {
        "valid_json_rate": _share(answer_button(reading.text) is not None for reading in readings),
        "button_accuracy": _share(chosen_button(r) == true for r, true in zip(readings, truth, strict=True)),
        "latency_s": {"p50": float(p50), "p95": float(p95)},
        "peak_memory_bytes": measured.peak_memory_bytes,
        "peak_gpu_memory_bytes": measured.peak_gpu_memory_bytes,
    }


def compare(reference: Measured, measured: Measured) -> dict[str, Any]:
    """Return how an engine's readings agree with the reference's; None where the engine does not tell.

    - button_agreement: share of decisions with the same button, scored among the eight (a server: written);
    - written_agreement: the same of written answers, where the reference's is valid; None where none is;
    - top1_agreement: share of the tokens of the reference's answers that are the likeliest here, too;
    - log_probability_difference: mean and largest distance in log-probability of these tokens (nats);
    - button_log_probability_difference: the same of the eight buttons;
    - prompts_equal: whether all prompts have the same tokens.
    """
    pairs = list(zip(reference.readings, measured.readings, strict=True))
    written = [(answer_button(theirs.text), answer_button(ours.text)) for theirs, ours in pairs]
    likeliest = [
        (theirs.likeliest[: len(ours.likeliest)] == ours.likeliest)
        for theirs, ours in pairs
        if ours.likeliest is not None
    ]
    prompts = [theirs.prompt == ours.prompt for theirs, ours in pairs if ours.prompt is not None]
    return {
        "button_agreement": _share(is_same_button(theirs, ours) for theirs, ours in pairs),
        "written_agreement": _share(button == said for button, said in written if button is not None),
        "top1_agreement": _share(np.concatenate(likeliest)) if likeliest else None,
        "log_probability_difference": _spread(answer_distances(theirs, ours) for theirs, ours in pairs),
        "button_log_probability_difference": _spread(button_distances(theirs, ours) for theirs, ours in pairs),
        "prompts_equal": all(prompts) if prompts else None,
    }


def is_same_button(reference: Reading, reading: Reading) -> bool:
    """Return whether both choose the same button, both scored or both written; without one, the same text."""
    if reading.buttons is None:
        button = answer_button(reference.text)
        return reading.text == reference.text if button is None else answer_button(reading.text) == button
    return chosen_button(reference) == chosen_button(reading)


def answer_distances(reference: Reading, reading: Reading) -> np.ndarray:
    """Return the distance in log-probability of each token of the reference's answer, as far as it is told."""
    if reading.log_probabilities is None:
        return np.zeros(0)
    return np.abs(reference.log_probabilities[: len(reading.log_probabilities)] - reading.log_probabilities)


def button_distances(reference: Reading, reading: Reading) -> np.ndarray:
    """Return the distance in log-probability of each button, (8,), or (0,) where it is not told."""
    return np.zeros(0) if reading.buttons is None else np.abs(reference.buttons - reading.buttons)


def _share(values: Iterable[Any]) -> float | None:
    values = list(values)
    return float(np.mean(values)) if values else None


def _spread(distances: Iterable[np.ndarray]) -> dict[str, float] | None:
    values = np.concatenate(list(distances))
    return {"mean": float(values.mean()), "max": float(values.max())} if len(values) else None


def judge(
    record: dict[str, Any],
    reference: Measured,
    measured: Measured,
    *,
    gates: Gates,
    reference_rate: float,
    examples: Sequence[Sample | Trajectory],
) -> list[dict[str, Any]]:
    """Return the gates that an engine fails: gate, value, limit, the first decision that fails it, and all as a line.

    Args:
        record: what `describe` and `compare` say of the engine.
        reference_rate: valid JSON of the reference.
    """
    pairs = list(zip(reference.readings, measured.readings, strict=True))
    ids = [asked(example).id for example in examples]
    failures = []

    def fail(gate: str, value: float | bool | None, limit: float | bool, differs: Iterable[bool], says: str) -> None:
        first = next((name for name, wrong in zip(ids, differs, strict=True) if wrong), ids[0])
        failures.append(
            {"gate": gate, "value": value, "limit": limit, "sample": first, "message": f"{says}; first at {first}"}
        )

    if record["prompts_equal"] is False:
        unequal = [theirs.prompt != ours.prompt for theirs, ours in pairs]
        where = prompt_difference(*pairs[unequal.index(True)])
        fail("prompts_equal", False, True, unequal, f"prompts: {sum(unequal)} of {len(unequal)} differ ({where})")
    for gate, differs in (
        ("button_agreement", [not is_same_button(theirs, ours) for theirs, ours in pairs]),
        (
            "written_agreement",
            [answer_button(theirs.text) not in (None, answer_button(ours.text)) for theirs, ours in pairs],
        ),
    ):
        value = record[gate]
        if value is not None and value < gates.min_agreement:
            fail(gate, value, gates.min_agreement, differs, f"{gate} {value:.3f} is below {gates.min_agreement:g}")
    limit = gates.max_difference
    for gate, distances in (
        ("button_log_probability_difference", button_distances),
        ("log_probability_difference", answer_distances),
    ):
        if limit is not None and record[gate] is not None and record[gate]["mean"] > limit:
            value = record[gate]["mean"]
            beyond = [(distances(theirs, ours) > limit).any() for theirs, ours in pairs]
            fail(gate, value, limit, beyond, f"{gate} {value:.4f} (mean) is above {limit:.4f}")
    if limit is not None and record["log_probability_difference"] is None:
        says = "it tells no log-probabilities, which have a limit"
        fail("log_probability_difference", None, limit, [True] * len(pairs), says)
    rate, lowest = record["valid_json_rate"], reference_rate - gates.max_invalid_json
    if rate < lowest:
        invalid = [
            answer_button(theirs.text) is not None and answer_button(ours.text) is None for theirs, ours in pairs
        ]
        fail("valid_json_rate", rate, lowest, invalid, f"valid_json_rate {rate:.3f} is below {lowest:.3f}")
    return failures


def prompt_difference(reference: Reading, reading: Reading) -> str:
    """Say where two prompts begin to differ."""
    pairs = zip(reference.prompt, reading.prompt, strict=False)
    place = next((at for at, (one, other) in enumerate(pairs) if one != other), None)
    if place is None:
        return f"{len(reading.prompt)} tokens instead of {len(reference.prompt)}"
    return f"from token {place} on: {reading.prompt[place]} instead of {reference.prompt[place]}"


def find_worst(
    reference: Measured, measured: Measured, examples: Sequence[Sample | Trajectory]
) -> list[dict[str, Any]]:
    """Return the decisions that differ most: other buttons first, then by the largest distance in log-probability."""
    rows = []
    for place, (theirs, ours) in enumerate(zip(reference.readings, measured.readings, strict=True)):
        distances = np.concatenate([button_distances(theirs, ours), answer_distances(theirs, ours)])
        rows.append(
            {
                "place": place,
                "id": asked(examples[place]).id,
                "same_button": is_same_button(theirs, ours),
                "reference_button": chosen_button(theirs),
                "button": chosen_button(ours),
                "recorded_button": answer_button(asked(examples[place]).output),
                "reference_text": theirs.text,
                "text": ours.text,
                "difference": float(distances.max(initial=0.0)),
                "reference_scores": _scores(theirs),
                "scores": _scores(ours),
            }
        )
    differing = [row for row in rows if row["difference"] > 0 or row["text"] != row["reference_text"]]
    return sorted(differing, key=lambda row: (row["same_button"], -row["difference"]))[:_NUM_WORST]


def _scores(reading: Reading) -> dict[str, float] | None:
    """Return the probabilities of the buttons, normalised over the eight."""
    if reading.buttons is None:
        return None
    shares = np.exp(reading.buttons - reading.buttons.max())
    return dict(zip(BUTTONS, map(float, shares / shares.sum()), strict=True))


LIMITS = {"f32": 0.25, "f16": 0.25, "bf16": 2.0, "8 bits": 4.0, "6 bits": 6.0, "5 bits": 8.0, "4 bits": 16.0}
"""Limit by type of the weights, in units of what bfloat16 costs. Measured on the trained toy model: 0.04 for f16, 0.2
to 1 for bf16, 0.9 to 1.3 for q8_0, 2.5 for q5_k_m, 3.7 for q4_k_m, and 1.5 to 17 for two swapped rows of the
projector. So a type of 16 bits shows faults that fewer bits hide; exports of one model share their mmproj: compare an
f16 with them."""


_SAFETENSORS_TYPES = {"F32": "f32", "F16": "f16", "BF16": "bf16"}


_GGUF_TYPE = re.compile(r"(?<![a-z0-9])(bf16|f16|f32|i?q([2-8])(?:_\w+)?)(?![a-z0-9])", re.IGNORECASE)


def gguf_type(name: str) -> str | None:
    """Return the type of weights in the name of a GGUF file, or in llama.cpp's own name for it; None where it has none.

    Example:
        >>> gguf_type("model-q4_k_m")
        '4 bits'
    """
    found = _GGUF_TYPE.findall(name)
    if not found:
        return None
    kind, bits = found[-1]
    return f"{bits} bits" if bits else kind.lower()


def check_loaded(spec: EngineSpec, *, engine: str, weights: str) -> None:
    """Refuse to judge an engine that did not load what its files are named after.

    Args:
        engine: what the engine calls itself.
        weights: what it says of the weights that it loaded.

    Raises:
        EngineFailedError: it is another engine, or the weights have another type.
    """
    if engine.split()[0] != spec.kind:
        raise EngineFailedError(f"{engine} answered instead of {spec.kind}")
    if spec.kind == "transformers":
        return
    named = gguf_type(spec.path.stem) if spec.kind == "llama.cpp" else weights_type(spec)
    loaded = gguf_type(weights) or weights
    if named and loaded and named != loaded:
        raise EngineFailedError(f"{spec.path} is named after {named}, and the loaded weights are {weights}")


def weights_type(spec: EngineSpec) -> str:
    """Return the type of an engine's weights, such as "f16" or "4 bits"; of a GGUF file as its name says.

    Raises:
        PokegemmaError: it cannot be told.
    """
    if spec.kind == "llama.cpp":
        if (named := gguf_type(spec.path.stem)) is None:
            raise PokegemmaError(
                f"{spec.path}: its name says no type, such as f16 or q8_0; pass --max_log_probability_difference"
            )
        return named
    if spec.dtype != "auto":
        return {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[spec.dtype]
    config = json.loads((spec.path / "config.json").read_text(encoding="utf-8"))
    if spec.kind == "mlx" and "quantization" in config:
        return f"{config['quantization']['bits']} bits"
    largest = max((entry for file in spec.files for entry in read_header(file)), default=None)
    if largest is None or largest[1] not in _SAFETENSORS_TYPES:
        raise PokegemmaError(f"{spec.path}: weights of a type that is not known: {largest and largest[1]}")
    return _SAFETENSORS_TYPES[largest[1]]


def limit_of(spec: EngineSpec, *, rounding: float, reference_dtype: str = "float32") -> float:
    """Return the largest mean difference for an engine, given what bfloat16 costs the reference.

    A reference that was itself computed in bfloat16 is no closer to anything than that.

    Raises:
        PokegemmaError: there is none for this type.
    """
    name = weights_type(spec)
    if name not in LIMITS:
        raise PokegemmaError(f"{spec.path}: no limit for weights of {name}; pass --max_log_probability_difference")
    return max(LIMITS[name], LIMITS["bf16"] if reference_dtype == "bfloat16" else 0.0) * rounding


def read_header(file: Path) -> list[tuple[int, str]]:
    """Return (bytes, type) of each tensor of a safetensors file."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        entries = json.loads(stream.read(length))
    return [
        (entry["data_offsets"][1] - entry["data_offsets"][0], entry["dtype"])
        for name, entry in entries.items()
        if name != "__metadata__"
    ]
