"""Results of a model: its evaluation and its parity, checked to be of that model, and their summaries."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pokegemma.errors import PokegemmaError
from pokegemma.provenance import read_run_record

METRICS_FILE, PARITY_FILE = "metrics.json", "parity.json"


@dataclass(frozen=True)
class ModelResults:
    """Results by kind ("evaluation", "parity"): their folders, their summaries, and the numbers of all summaries."""

    folders: dict[str, Path]
    summaries: dict[str, dict[str, Any]]
    metrics: dict[str, float]


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object that another script wrote.

    Raises:
        PokegemmaError: the file is missing, or does not contain a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PokegemmaError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise PokegemmaError(f"{path} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise PokegemmaError(f"{path} is damaged: not a JSON object")
    return value


def read_results(
    model_path: Path, record: Mapping[str, Any], *, evaluation: Path | None, parity: Path | None
) -> ModelResults:
    """Read the outputs of scripts/evaluate.py and scripts/check_parity.py for a model whose run.json is `record`.

    Raises:
        PokegemmaError: a file is missing or damaged, or is for another model or an earlier one at the same path.
    """
    folders, summaries, numbers = {}, {}, {}
    if evaluation is not None:
        about = _check_belongs(evaluation, model_path, record, made_by="scripts/evaluate.py")
        result = read_json(evaluation / METRICS_FILE)
        folders["evaluation"] = evaluation
        summaries["evaluation"] = {**summarize_evaluation(result), "dataset_sha256": about.get("dataset_hash")}
        numbers |= {
            key: float(value) for key, value in summaries["evaluation"].items() if isinstance(value, int | float)
        }
    if parity is not None:
        _check_belongs(parity, model_path, record, made_by="scripts/check_parity.py")
        folders["parity"] = parity
        summaries["parity"] = summarize_parity(read_json(parity / PARITY_FILE))
    return ModelResults(folders, summaries, numbers)


def _check_belongs(folder: Path, model_path: Path, record: Mapping[str, Any], *, made_by: str) -> dict[str, Any]:
    about = read_run_record(folder)
    if about is None:
        raise PokegemmaError(f"{folder}/run.json not found; make the folder with {made_by}")
    options = about.get("options", {})
    named = options.get("model_path")
    if named is None or not (Path(named).resolve() == model_path.resolve() or _moved(options, folder, model_path)):
        raise PokegemmaError(f"{folder} is about the model {named}, not {model_path}")
    if _moment(about) < _moment(record):
        raise PokegemmaError(f"{folder} is older than the model in {model_path}; run {made_by} again")
    return about


def _moved(options: Mapping[str, Any], folder: Path, model_path: Path) -> bool:
    """Return whether the folder with both results and model was moved: their relative paths are still the same."""
    if not options.get("output_dir"):
        return False
    then = os.path.relpath(options["model_path"], options["output_dir"])
    return then == os.path.relpath(model_path.resolve(), folder.resolve())


def _moment(record: Mapping[str, Any]) -> datetime:
    return datetime.strptime(record["created"], "%Y-%m-%dT%H:%M:%S%z")


def summarize_evaluation(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of metrics.json by which versions are compared: those of the row that its headline names."""
    headline = result["headline"]
    row = next(row for row in result["rows"] if row["key"] == headline["model"])
    nll = next((other["nll"] for other in result["rows"] if other["key"] == "scored"), None)
    return {
        "row": row["key"],
        "accuracy": row["accuracy"],
        "accuracy_interval": row["accuracy_interval"],
        "macro_f1": row["macro_f1"],
        "change_accuracy": row["change_accuracy"],
        "nll": nll,
        "valid_json_rate": result["valid_json_rate"],
        "points_above_baseline": headline["points_above_baseline"],
        "best_baseline": headline["best_baseline"],
        "best_baseline_accuracy": headline["best_baseline_accuracy"],
        "num_decisions": result["num_decisions"],
        "num_sessions": result["num_sessions"],
    }


def summarize_parity(parity: Mapping[str, Any]) -> dict[str, Any]:
    """Return whether all engines of parity.json passed, and the agreement of each."""
    return {
        "passed": parity["passed"],
        "num_samples": parity["num_samples"],
        "engines": [
            {
                "name": engine["name"],
                "passed": engine["passed"],
                "button_agreement": engine.get("button_agreement"),  # an engine that did not run has none
                "failures": [failure["message"] for failure in engine["failures"]],
            }
            for engine in parity["engines"]
        ],
    }


def failures(evaluation: Mapping[str, Any] | None, parity: Mapping[str, Any] | None) -> dict[str, str]:
    """Return which of these summaries failed, and why; what was never measured did not fail."""
    reasons = {}
    if evaluation is not None and not evaluation["points_above_baseline"] > 0:
        reasons["evaluation"] = (
            f"its accuracy of {100 * evaluation['accuracy']:.1f} % is not above the {evaluation['best_baseline']} "
            f"baseline's {100 * evaluation['best_baseline_accuracy']:.1f} %, which uses no picture"
        )
    if parity is not None and not parity["passed"]:
        failed = [engine["name"] for engine in parity["engines"] if not engine["passed"]]
        reasons["parity"] = f"parity failed ({', '.join(failed) or 'no engine'})"
    return reasons
