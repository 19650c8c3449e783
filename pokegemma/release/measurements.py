"""What was measured of a model: evaluation and parity, checked to be of that model, cut down to what is compared."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pokegemma.errors import PokegemmaError
from pokegemma.evaluation import metrics
from pokegemma.provenance import read_run_record

METRICS_FILE, PREDICTIONS_FILE, PARITY_FILE = "metrics.json", "predictions.jsonl", "parity.json"


@dataclass(frozen=True)
class Results:
    """`folders`: where each kind ("evaluation", "parity") lies; `summaries`: what is compared; `metrics`: numbers."""

    folders: dict[str, Path]
    summaries: dict[str, dict[str, Any]]
    metrics: dict[str, float]


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object that another script wrote.

    Raises:
        PokegemmaError: it is not there, or is none.
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
) -> Results:
    """Read what scripts/evaluate.py and scripts/check_parity.py wrote about a model whose run.json is `record`.

    Raises:
        PokegemmaError: a file is missing or damaged, or is about another model or an earlier one at the same path.
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
    return Results(folders, summaries, numbers)


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
    """Return whether results and model lie to each other as when the results were made: their folder was moved."""
    if not options.get("output_dir"):
        return False
    then = os.path.relpath(options["model_path"], options["output_dir"])
    return then == os.path.relpath(model_path.resolve(), folder.resolve())


def _moment(record: Mapping[str, Any]) -> datetime:
    return datetime.strptime(record["created"], "%Y-%m-%dT%H:%M:%S%z")


def summarize_evaluation(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of metrics.json by which versions are judged: those of the row that its headline names."""
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
    """Return of parity.json whether all engines passed, and what each agreed on."""
    return {
        "passed": parity["passed"],
        "num_samples": parity["num_samples"],
        "engines": [
            {
                "name": engine["name"],
                "passed": engine["passed"],
                "button_agreement": engine.get("button_agreement"),  # one that did not run has none
                "failures": [failure["message"] for failure in engine["failures"]],
            }
            for engine in parity["engines"]
        ],
    }


def failures(evaluation: Mapping[str, Any] | None, parity: Mapping[str, Any] | None) -> dict[str, str]:
    """Return which of these summaries speak against a version, and why; what was never measured does not."""
    reasons = {}
    if evaluation is not None and not evaluation["points_above_baseline"] > 0:
        reasons["evaluation"] = (
            f"its accuracy of {100 * evaluation['accuracy']:.1f} % is not above the {evaluation['best_baseline']} "
            f"baseline's {100 * evaluation['best_baseline_accuracy']:.1f} %, which sees no picture"
        )
    if parity is not None and not parity["passed"]:
        failed = [engine["name"] for engine in parity["engines"] if not engine["passed"]]
        reasons["parity"] = f"parity failed ({', '.join(failed) or 'no engine'})"
    return reasons


COMPARED = {
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "change_accuracy": "on changes",
    "nll": "NLL",
    "valid_json_rate": "valid JSON",
    "points_above_baseline": "points above baseline",
}


def compare_versions(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of two versions (of `Registry.describe`) beside each other, and second minus first.

    "warnings" says what makes them hard to compare: other samples, other ways to answer, nothing measured.
    """
    left, right = first["evaluation"] or {}, second["evaluation"] or {}
    warnings = [f"version {one['version']} has no evaluation" for one in (first, second) if not one["evaluation"]]
    warnings += [f"version {one['version']}: {reason}" for one in (first, second) for reason in one["failed"].values()]
    if left and right:
        if left["dataset_sha256"] != right["dataset_sha256"]:
            warnings.append("evaluated on different data: their figures do not compare")
        elif left["num_decisions"] != right["num_decisions"]:
            warnings.append("evaluated on different samples of the data: their figures do not compare")
        if left["row"] != right["row"]:
            warnings.append(f"one is scored, the other generated ({left['row']}, {right['row']})")
    if first["dataset_sha256"] != second["dataset_sha256"]:
        warnings.append("trained on different data")
    rows = []
    for key, label in COMPARED.items():
        values = (left.get(key), right.get(key))
        difference = None if None in values else values[1] - values[0]
        rows.append({"key": key, "name": label, "values": list(values), "difference": difference})
    agreements = [_agreements(one["parity"]) for one in (first, second)]
    for name in sorted({*agreements[0], *agreements[1]}):
        values = (agreements[0].get(name), agreements[1].get(name))
        difference = None if None in values else values[1] - values[0]
        rows.append(
            {"key": f"parity/{name}", "name": f"parity {name}", "values": list(values), "difference": difference}
        )
    versions = [
        {
            "version": one["version"],
            "aliases": one["aliases"],
            "dataset_sha256": one["dataset_sha256"],
            "evaluated_on_sha256": (one["evaluation"] or {}).get("dataset_sha256"),
        }
        for one in (first, second)
    ]
    return {"versions": versions, "rows": rows, "warnings": warnings, "accuracy_difference_interval": None}


def _agreements(parity: Mapping[str, Any] | None) -> dict[str, float]:
    return {} if parity is None else {engine["name"]: engine["button_agreement"] for engine in parity["engines"]}


def paired_interval(first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]) -> list[float] | None:
    """Return the 95 % interval of the accuracy of `second` minus that of `first`, by bootstrap over sessions.

    Args:
        first, second: the records of two predictions.jsonl.

    Returns:
        None where the two are not about the same decisions, or these are of one session.
    """
    if [(line["id"], line["truth"]) for line in first] != [(line["id"], line["truth"]) for line in second]:
        return None
    truth = metrics.button_indices(line["truth"] for line in first)
    sessions = tuple(line["id"].rpartition("/")[0] for line in first)
    decisions = metrics.Decisions(truth, truth, sessions, sessions)  # of these, only truth and sessions are looked at
    answers = {
        key: metrics.button_indices(line["scored_button"] if line["text"] is None else line["button"] for line in lines)
        for key, lines in (("first", first), ("second", second))
    }
    drawn = metrics.resample_sessions(decisions, answers)
    return metrics.interval(drawn["second"]["accuracy"] - drawn["first"]["accuracy"]) if drawn else None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the records of a predictions.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def format_comparison(compared: Mapping[str, Any]) -> str:
    """Return the comparison as a table for a terminal."""
    heads = [", ".join([f"version {one['version']}", *one["aliases"]]) for one in compared["versions"]]
    lines = [("", *heads, "difference")]
    for row in compared["rows"]:
        lines.append((row["name"], *map(_figure, row["values"]), _figure(row["difference"], sign="+")))
    for key, label in (("dataset_sha256", "trained on"), ("evaluated_on_sha256", "evaluated on")):
        lines.append((label, *((one[key] or "–")[:12] for one in compared["versions"]), ""))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = "\n".join(
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
    bounds = compared["accuracy_difference_interval"]
    if bounds is not None:
        table += f"\n95 % interval of the difference in accuracy, over sessions: {bounds[0]:+.4f} to {bounds[1]:+.4f}"
    return table


def _figure(value: float | None, *, sign: str = "") -> str:
    return "–" if value is None else f"{value:{sign}.4f}"
