"""Tables of registered versions: all of them, one, and two compared."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pokegemma.evaluation import metrics
from pokegemma.tables import format_table

PREDICTIONS_FILE = "predictions.jsonl"
_COMPARED = {
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "change_accuracy": "on changes",
    "nll": "NLL",
    "valid_json_rate": "valid JSON",
    "points_above_baseline": "points above baseline",
}


def compare_versions(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of two versions (of `Registry.describe`) next to each other, and second minus first.

    "warnings" names what makes them hard to compare: other samples, other ways to answer, missing results.
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
    rows = [_compare_values(key, label, left.get(key), right.get(key)) for key, label in _COMPARED.items()]
    agreements = [_agreements(one["parity"]) for one in (first, second)]
    for name in sorted({*agreements[0], *agreements[1]}):
        rows.append(_compare_values(f"parity/{name}", f"parity {name}", *(one.get(name) for one in agreements)))
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


def _compare_values(key: str, name: str, left: float | None, right: float | None) -> dict[str, Any]:
    difference = None if left is None or right is None else right - left
    return {"key": key, "name": name, "values": [left, right], "difference": difference}


def _agreements(parity: Mapping[str, Any] | None) -> dict[str, float]:
    return {} if parity is None else {engine["name"]: engine["button_agreement"] for engine in parity["engines"]}


def paired_interval(first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]) -> list[float] | None:
    """Return the 95 % interval of the accuracy of `second` minus that of `first`, by bootstrap over sessions.

    Args:
        first, second: the records of two predictions.jsonl.

    Returns:
        None where the two have different decisions, or decisions of one session only.
    """
    if [(line["id"], line["truth"]) for line in first] != [(line["id"], line["truth"]) for line in second]:
        return None
    truth = metrics.button_indices(line["truth"] for line in first)
    sessions = tuple(line["id"].rpartition("/")[0] for line in first)
    decisions = metrics.Decisions(truth, truth, sessions, sessions)  # only truth and sessions are used
    answers = {
        key: metrics.button_indices(line["scored_button"] if line["text"] is None else line["button"] for line in lines)
        for key, lines in (("first", first), ("second", second))
    }
    drawn = metrics.resample_sessions(decisions, answers)
    return metrics.interval(drawn["second"]["accuracy"] - drawn["first"]["accuracy"]) if drawn else None


def parse_predictions(text: str) -> list[dict[str, Any]]:
    """Return the records of a predictions.jsonl."""
    return [json.loads(line) for line in text.splitlines()]


def format_comparison(compared: Mapping[str, Any]) -> str:
    """Return the comparison as a table for a terminal."""
    heads = [", ".join([f"version {one['version']}", *one["aliases"]]) for one in compared["versions"]]
    lines = [("", *heads, "difference")]
    for row in compared["rows"]:
        lines.append((row["name"], *map(_figure, row["values"]), _figure(row["difference"], sign="+")))
    for key, label in (("dataset_sha256", "trained on"), ("evaluated_on_sha256", "evaluated on")):
        lines.append((label, *((one[key] or "–")[:12] for one in compared["versions"]), ""))
    table = format_table(lines)
    bounds = compared["accuracy_difference_interval"]
    if bounds is not None:
        table += f"\n95 % interval of the difference in accuracy, over sessions: {bounds[0]:+.4f} to {bounds[1]:+.4f}"
    return table


def _figure(value: float | None, *, sign: str = "") -> str:
    return "–" if value is None else f"{value:{sign}.4f}"


def version_title(described: Mapping[str, Any]) -> str:
    """Return the number of a version (of `Registry.describe`) with its aliases."""
    aliases = ", ".join(described["aliases"])
    return f"version {described['version']}" + (f" ({aliases})" if aliases else "")


def format_versions(versions: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of versions for a terminal."""
    lines = [("version", "aliases", "created", "accuracy", "parity", "trained on", "content", "path")]
    for one in versions:
        evaluation, parity = one["evaluation"], one["parity"]
        note = " (failed)" if "evaluation" in one["failed"] else ""
        lines.append(
            (
                str(one["version"]),
                ", ".join(one["aliases"]) or "–",
                one["created"],
                f"{100 * evaluation['accuracy']:.1f} %{note}" if evaluation else "–",
                ("passed" if parity["passed"] else "failed") if parity else "–",
                *((one[key] or "–")[:12] for key in ("dataset_sha256", "content_sha256")),
                one["model_path"] or "–",
            )
        )
    return format_table(lines, num_left=len(lines[0]))


def format_version(described: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    """Return the facts of a version as lines, and the stages of its run.json with their commits."""
    lines = []
    for key, value in described.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {one}" for name, one in value.items() if not isinstance(one, list))
        lines.append(f"{key:16}{', '.join(value) if isinstance(value, list) else value}")
    for record in (run, run.get("training")):
        if record is not None:
            stage = record.get("stage") or "run"
            lines.append(f"{stage:16}{record.get('created')}, commit {record.get('git_commit')}")
    return "\n".join(lines)
