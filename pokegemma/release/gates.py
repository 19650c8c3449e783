"""Gates of a release: values that each step measured, and their limits."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pokegemma.environment import GIB
from pokegemma.errors import CheckFailedError
from pokegemma.export.merge_limits import MERGE_TOLERANCE, STORED_TOLERANCE
from pokegemma.provenance import read_run_record
from pokegemma.release.measurements import METRICS_FILE, PARITY_FILE, read_json, summarize_evaluation
from pokegemma.release.options import PipelineOptions

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Gate:
    """A measured value and its limit; `option` is the flag that sets the limit, "fixed limit" without one."""

    option: str
    what: str
    value: float | None
    at_least: float | None = None
    at_most: float | None = None

    @property
    def holds(self) -> bool:
        """Whether the value was measured and is within the limit; NaN never is."""
        if self.value is None:
            return False
        return self.value <= self.at_most if self.at_least is None else self.value >= self.at_least

    def __str__(self) -> str:
        value = "not measured" if self.value is None else f"{self.value:.4g}"
        limit = f"{self.at_most:.4g} (at most)" if self.at_least is None else f"{self.at_least:.4g} (at least)"
        return f"{self.what} {value}, {self.option} {limit}"


def check_gates(name: str, gates: Sequence[Gate]) -> None:
    """Log each gate.

    Raises:
        CheckFailedError: one or more do not hold; the message has value and limit of each.
    """
    for gate in gates:
        logger.info("  %s: %s: %s", name, gate, "passed" if gate.holds else "FAILED")
    if failed := [str(gate) for gate in gates if not gate.holds]:
        raise CheckFailedError(f"the gate of {name} failed: {'; '.join(failed)}")


def read_gates(step: str, output: Path, options: PipelineOptions) -> list[Gate]:
    """Return the gates of a step, read from its output."""
    if step == "merge":
        verified = (read_run_record(output) or {}).get("verification") or {}
        stored, limit = f"stored as {options.dtype} against adapter + base", options.max_stored_difference
        limit = STORED_TOLERANCE[options.dtype] if limit is None else limit
        return [
            Gate("fixed limit", "merged against adapter + base", verified.get("merged_error"), at_most=MERGE_TOLERANCE),
            Gate("--max_stored_difference", stored, verified.get("stored_error"), at_most=limit),
        ]
    if step == "evaluate":
        metrics = read_json(output / METRICS_FILE)
        summary = summarize_evaluation(metrics)
        what, gain = "accuracy above the best baseline's", summary["points_above_baseline"] / 100
        gates = [Gate("--min_gain_over_baseline", what, gain, at_least=options.min_gain_over_baseline)]
        if options.min_accuracy is not None:
            gates.append(Gate("--min_accuracy", "accuracy", summary["accuracy"], at_least=options.min_accuracy))
        if options.min_solved is not None:
            solved = metrics["closed_loop"]["players"]["model"]["success"]
            gates.append(Gate("--min_solved", "share of rooms solved", solved, at_least=options.min_solved))
        return gates
    if step == "parity":
        return [gate for engine in read_json(output / PARITY_FILE)["engines"] for gate in _read_engine(engine, options)]
    if step.startswith("export_") and options.max_export_gib is not None:
        what, size = f"smallest model in {output.name}", _smallest_model_gib(output)
        return [Gate("--max_export_gib", what, size, at_most=options.max_export_gib)]
    return []


def _smallest_model_gib(export: Path) -> float:
    """Return the size of an export's smallest model with its vision part."""
    sizes = {path.name: path.stat().st_size for path in export.iterdir() if path.is_file()}
    models = [size for name, size in sizes.items() if name.startswith("model-") and name.endswith(".gguf")]
    vision = sum(size for name, size in sizes.items() if name.startswith("mmproj-"))
    return (min(models) + vision if models else sum(sizes.values())) / GIB


def _read_engine(engine: Mapping[str, Any], options: PipelineOptions) -> Iterator[Gate]:
    """Yield an engine's gates: the limits of the options, then others that scripts/check_parity.py found exceeded."""
    name, max_difference = engine["name"], options.max_log_probability_difference
    if "button_agreement" not in engine:  # the engine did not run
        what = f"{name} failed ({engine['failures'][0]['message']}), its agreement"
        yield Gate("--min_agreement", what, None, at_least=options.min_agreement)
        return
    for key in ("button_agreement", "written_agreement"):
        if engine[key] is not None:  # a model that writes no valid answer has no written agreement
            yield Gate("--min_agreement", f"{name} {key}", engine[key], at_least=options.min_agreement)
    option = "--max_log_probability_difference"
    for key in ("button_log_probability_difference", "log_probability_difference"):
        if max_difference is not None and engine[key] is not None:
            yield Gate(option, f"{name} {key}", engine[key]["mean"], at_most=max_difference)
    for failure in engine["failures"]:
        what, value, limit = f"{name} {failure['gate']}", failure["value"], float(failure["limit"])
        if not failure["gate"].endswith("log_probability_difference"):
            yield Gate("fixed limit", what, float(value), at_least=limit)
        elif max_difference is None:
            yield Gate(option, what, value, at_most=limit)
