"""The limits of the parity check, and which of them an engine misses."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pokegemma.data.prompts import answer_button
from pokegemma.data.samples import Sample
from pokegemma.data.trajectories import Trajectory
from pokegemma.errors import PokegemmaError
from pokegemma.parity.compare import answer_distances, asked_sample, button_distances, is_same_button
from pokegemma.parity.engine_spec import EngineSpec, weights_type
from pokegemma.parity.task import Measured, Reading

MIN_AGREEMENT = 0.98
MAX_INVALID_JSON = 0.02
MAX_DIFFERENCE = {"f32": 0.25, "f16": 0.25, "bf16": 2.0, "8 bits": 4.0, "6 bits": 6.0, "5 bits": 8.0, "4 bits": 16.0}
"""Largest mean difference in log-probability by type of the weights, in units of what bfloat16 costs the reference.

Measured on the trained toy model: 0.04 for f16, 0.2 to 1 for bf16, 0.9 to 1.3 for q8_0, 2.5 for q5_k_m, 3.7 for q4_k_m,
and 1.5 to 17 for two swapped rows of the projector. So a type of 16 bits shows faults that fewer bits hide. Exports of
one model share their mmproj file: compare an f16 with them."""

Pairs = Sequence[tuple[Reading, Reading]]
"""The reference's reading and the engine's, of each decision."""


@dataclass(frozen=True)
class ParityLimits:
    """The limits for an engine.

    Attributes:
        min_agreement: share of decisions with the reference's button.
        max_difference: mean difference in log-probability; None: it has no limit.
        max_invalid_json: how far the share of valid answers may be below the reference's.
    """

    min_agreement: float
    max_difference: float | None
    max_invalid_json: float


def difference_limit(spec: EngineSpec, *, rounding: float, reference_dtype: str = "float32") -> float:
    """Return the largest mean difference for an engine, given what bfloat16 costs the reference (`rounding`).

    A reference that was itself computed in bfloat16 is no closer to anything than that.

    Raises:
        PokegemmaError: this type of weights has no limit.
    """
    name = weights_type(spec)
    if name not in MAX_DIFFERENCE:
        raise PokegemmaError(f"{spec.path}: no limit for weights of {name}; pass --max_log_probability_difference")
    return max(MAX_DIFFERENCE[name], MAX_DIFFERENCE["bf16"] if reference_dtype == "bfloat16" else 0.0) * rounding


@dataclass(frozen=True)
class _Miss:
    gate: str
    value: float | bool | None
    limit: float | bool
    message: str
    where: Iterable[bool]  # for each decision, whether it misses the limit


def find_failures(
    record: dict[str, Any],
    reference: Measured,
    measured: Measured,
    *,
    limits: ParityLimits,
    reference_rate: float,
    examples: Sequence[Sample | Trajectory],
) -> list[dict[str, Any]]:
    """Return the limits that an engine misses: gate, value, limit, the first decision that misses it, and a message.

    Args:
        record: what `summarize_engine` and `compare` return for the engine.
        reference_rate: the reference's share of valid answers.
    """
    pairs = list(zip(reference.readings, measured.readings, strict=True))
    ids = [asked_sample(example).id for example in examples]
    misses = [*_check_prompts(record, pairs), *_check_agreement(record, pairs, limits.min_agreement)]
    if limits.max_difference is not None:
        misses += _check_differences(record, pairs, limits.max_difference)
    misses += _check_valid_json(record, pairs, reference_rate - limits.max_invalid_json)
    failures = []
    for miss in misses:
        first = next((name for name, missed in zip(ids, miss.where, strict=True) if missed), ids[0])
        failures.append(
            {
                "gate": miss.gate,
                "value": miss.value,
                "limit": miss.limit,
                "sample": first,
                "message": f"{miss.message}; first at {first}",
            }
        )
    return failures


def _check_prompts(record: dict[str, Any], pairs: Pairs) -> Iterator[_Miss]:
    if record["prompts_equal"] is False:
        differs = [expected.prompt != actual.prompt for expected, actual in pairs]
        where = _prompt_difference(*pairs[differs.index(True)])
        message = f"prompts: {sum(differs)} of {len(differs)} differ ({where})"
        yield _Miss("prompts_equal", False, True, message, differs)


def _prompt_difference(expected: Reading, actual: Reading) -> str:
    pairs = zip(expected.prompt, actual.prompt, strict=False)
    place = next((at for at, (left, right) in enumerate(pairs) if left != right), None)
    if place is None:
        return f"{len(actual.prompt)} tokens instead of {len(expected.prompt)}"
    return f"from token {place} on: {actual.prompt[place]} instead of {expected.prompt[place]}"


def _check_agreement(record: dict[str, Any], pairs: Pairs, limit: float) -> Iterator[_Miss]:
    differs = {
        "button_agreement": [not is_same_button(*pair) for pair in pairs],
        "written_agreement": [
            answer_button(expected.text) not in (None, answer_button(actual.text)) for expected, actual in pairs
        ],
    }
    for gate, where in differs.items():
        value = record[gate]
        if value is not None and value < limit:
            yield _Miss(gate, value, limit, f"{gate} {value:.3f} is below {limit:g}", where)


def _check_differences(record: dict[str, Any], pairs: Pairs, limit: float) -> Iterator[_Miss]:
    distances = {
        "button_log_probability_difference": button_distances,
        "log_probability_difference": answer_distances,
    }
    for gate, distance in distances.items():
        if record[gate] is not None and (value := record[gate]["mean"]) > limit:
            beyond = [(distance(*pair) > limit).any() for pair in pairs]
            yield _Miss(gate, value, limit, f"{gate} {value:.4f} (mean) is above {limit:.4f}", beyond)
    if record["log_probability_difference"] is None:
        message = "the engine reports no log-probabilities, which have a limit"
        yield _Miss("log_probability_difference", None, limit, message, [True] * len(pairs))


def _check_valid_json(record: dict[str, Any], pairs: Pairs, limit: float) -> Iterator[_Miss]:
    rate = record["valid_json_rate"]
    if rate < limit:
        invalid = [
            answer_button(expected.text) is not None and answer_button(actual.text) is None
            for expected, actual in pairs
        ]
        yield _Miss("valid_json_rate", rate, limit, f"valid_json_rate {rate:.3f} is below {limit:.3f}", invalid)
