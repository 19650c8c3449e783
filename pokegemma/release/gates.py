"""Gates of a release: values that each step measured, and their limits."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pokegemma.errors import CheckFailedError
from pokegemma.export.merge_limits import MERGE_TOLERANCE, STORED_TOLERANCE
from pokegemma.provenance import read_run_record
from pokegemma.release.measurements import METRICS_FILE, PARITY_FILE, read_json, summarize_evaluation
from pokegemma.release.plan import ReleasePlan

logger = logging.getLogger(__name__)

_FIXED = "fixed limit"


@dataclass(frozen=True)
class Gate:
    """A measured value and its limit; `option` is the flag that sets the limit."""

    option: str
    what: str
    value: float | None
    limit: float
    at_least: bool = True

    @property
    def holds(self) -> bool:
        """Whether the value was measured and is within the limit; NaN never is."""
        if self.value is None:
            return False
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        value = "not measured" if self.value is None else f"{self.value:.4g}"
        return f"{self.what} {value}, {self.option} {self.limit:.4g} ({'at least' if self.at_least else 'at most'})"


def check_gates(name: str, gates: Sequence[Gate]) -> None:
    """Log each gate.

    Raises:
        CheckFailedError: one or more do not hold; the message has value and limit of each.
    """
    for gate in gates:
        logger.info("  %s: %s: %s", name, gate, "passed" if gate.holds else "FAILED")
    if failed := [str(gate) for gate in gates if not gate.holds]:
        raise CheckFailedError(f"the gate of {name} failed: {'; '.join(failed)}")


def read_gates(step: str, plan: ReleasePlan) -> list[Gate]:
    """Return the gates of a step, read from what it wrote."""
    read: dict[str, Callable[[ReleasePlan], Iterator[Gate]]] = {
        "merge": _merge_gates,
        "evaluate": _evaluation_gates,
        "parity": _parity_gates,
        **{f"export_{kind}": lambda plan, path=path: _size_gates(plan, path) for kind, path in plan.exports.items()},
    }
    return list(read[step](plan)) if step in read else []


def _merge_gates(plan: ReleasePlan) -> Iterator[Gate]:
    verification = (read_run_record(plan.model) or {}).get("verification") or {}
    dtype, limit = plan.options.dtype, plan.options.max_stored_difference
    if limit is None:
        limit = STORED_TOLERANCE[dtype]
    merged, stored = verification.get("merged_error"), verification.get("stored_error")
    yield Gate(_FIXED, "merged against adapter + base", merged, MERGE_TOLERANCE, at_least=False)
    what = f"stored as {dtype} against adapter + base"
    yield Gate("--max_stored_difference", what, stored, limit, at_least=False)


def _evaluation_gates(plan: ReleasePlan) -> Iterator[Gate]:
    options, summary = plan.options, summarize_evaluation(read_json(plan.evaluation / METRICS_FILE))
    what, gain = "accuracy above the best baseline's", summary["points_above_baseline"] / 100
    yield Gate("--min_gain_over_baseline", what, gain, options.min_gain_over_baseline)
    if options.min_accuracy is not None:
        yield Gate("--min_accuracy", "accuracy", summary["accuracy"], options.min_accuracy)


def _size_gates(plan: ReleasePlan, export: Path) -> Iterator[Gate]:
    """Yield the size of an export's smallest model with its vision part."""
    limit = plan.options.max_export_gib
    if limit is None:
        return
    sizes = {path.name: path.stat().st_size for path in export.iterdir() if path.is_file()}
    models = [size for name, size in sizes.items() if name.startswith("model-") and name.endswith(".gguf")]
    vision = sum(size for name, size in sizes.items() if name.startswith("mmproj-"))
    smallest = (min(models) + vision if models else sum(sizes.values())) / 2**30
    yield Gate("--max_export_gib", f"smallest model in {export.name}", smallest, limit, at_least=False)


def _parity_gates(plan: ReleasePlan) -> Iterator[Gate]:
    """Yield agreement with the limits of the options, so that a new limit needs no new comparison.

    The other limits are those that scripts/check_parity.py missed.
    """
    min_agreement = plan.options.min_agreement
    max_difference = plan.options.max_log_probability_difference
    for engine in read_json(plan.parity / PARITY_FILE)["engines"]:
        name = engine["name"]
        if "button_agreement" not in engine:  # the engine did not run
            what = f"{name} failed ({engine['failures'][0]['message']}), its agreement"
            yield Gate("--min_agreement", what, None, min_agreement)
            continue
        for key in ("button_agreement", "written_agreement"):
            if engine[key] is not None:  # a model that writes no valid answer has no written agreement
                yield Gate("--min_agreement", f"{name} {key}", engine[key], min_agreement)
        for key in ("button_log_probability_difference", "log_probability_difference"):
            if max_difference is not None and engine[key] is not None:
                option, value = "--max_log_probability_difference", engine[key]["mean"]
                yield Gate(option, f"{name} {key}", value, max_difference, at_least=False)
        for failure in engine["failures"]:
            is_difference = failure["gate"].endswith("log_probability_difference")
            if is_difference and max_difference is not None:
                continue  # compared with the option above
            option = "--max_log_probability_difference" if is_difference else _FIXED
            value = None if failure["value"] is None else float(failure["value"])
            what, limit = f"{name} {failure['gate']}", float(failure["limit"])
            yield Gate(option, what, value, limit, at_least=not is_difference)
