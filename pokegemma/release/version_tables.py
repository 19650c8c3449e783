"""Tables of registered versions: all of them, one, and two compared. A version is what `Registry.describe` returns."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pokegemma.evaluation import metrics
from pokegemma.tables import format_table

_COMPARED = {
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "change_accuracy": "on changes",
    "nll": "NLL",
    "valid_json_rate": "valid JSON",
    "points_above_baseline": "points above baseline",
}


def compare_versions(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of two versions next to each other, and second minus first.

    "warnings" names what makes them hard to compare: other samples, other ways to answer, missing results.
    """
    pair = (first, second)
    evaluations = [one["evaluation"] or {} for one in pair]
    left, right = evaluations
    warnings = [f"version {one['version']} has no evaluation" for one in pair if not one["evaluation"]]
    warnings += [f"version {one['version']}: {reason}" for one in pair for reason in one["failed"].values()]
    if left and right:
        if left["dataset_sha256"] != right["dataset_sha256"]:
            warnings.append("evaluated on different data: their figures do not compare")
        elif left["num_decisions"] != right["num_decisions"]:
            warnings.append("evaluated on different samples of the data: their figures do not compare")
        if left["row"] != right["row"]:
            warnings.append(f"one is scored, the other generated ({left['row']}, {right['row']})")
    if first["dataset_sha256"] != second["dataset_sha256"]:
        warnings.append("trained on different data")
    values = {(key, label): [one.get(key) for one in evaluations] for key, label in _COMPARED.items()}
    engines = [one["parity"]["engines"] if one["parity"] else [] for one in pair]
    agreements = [{engine["name"]: engine["button_agreement"] for engine in some} for some in engines]
    for name in sorted({*agreements[0], *agreements[1]}):
        values[f"parity/{name}", f"parity {name}"] = [one.get(name) for one in agreements]
    rows = [
        {"key": key, "name": label, "values": both, "difference": None if None in both else both[1] - both[0]}
        for (key, label), both in values.items()
    ]
    versions = [
        {
            **{key: one[key] for key in ("version", "aliases", "dataset_sha256")},
            "evaluated_on_sha256": evaluation.get("dataset_sha256"),
        }
        for one, evaluation in zip(pair, evaluations, strict=True)
    ]
    return {"versions": versions, "rows": rows, "warnings": warnings, "accuracy_difference_interval": None}


def paired_interval(*predictions: str) -> list[float] | None:
    """Return the 95 % interval of the difference in accuracy, second minus first, by bootstrap over sessions.

    None where the two predictions.jsonl have different decisions, or decisions of one session only.
    """
    first, second = ([json.loads(line) for line in text.splitlines()] for text in predictions)
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


def format_comparison(compared: Mapping[str, Any]) -> str:
    """Return the comparison as a table."""
    versions, bounds = compared["versions"], compared["accuracy_difference_interval"]
    lines = [("", *(", ".join([f"version {one['version']}", *one["aliases"]]) for one in versions), "difference")]
    for row in compared["rows"]:
        figures = [*zip(row["values"], ("", ""), strict=True), (row["difference"], "+")]
        lines.append((row["name"], *("–" if value is None else f"{value:{sign}.4f}" for value, sign in figures)))
    for key, label in (("dataset_sha256", "trained on"), ("evaluated_on_sha256", "evaluated on")):
        lines.append((label, *((one[key] or "–")[:12] for one in versions), ""))
    if bounds is None:
        return format_table(lines)
    interval = f"95 % interval of the difference in accuracy, over sessions: {bounds[0]:+.4f} to {bounds[1]:+.4f}"
    return f"{format_table(lines)}\n{interval}"


def version_title(version: Mapping[str, Any]) -> str:
    """Return the number of a version with its aliases."""
    return f"version {version['version']}" + (f" ({', '.join(version['aliases'])})" if version["aliases"] else "")


def format_versions(versions: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of versions."""
    lines = [("version", "aliases", "created", "accuracy", "parity", "trained on", "content", "path")]
    for one in versions:
        note = " (failed)" if "evaluation" in one["failed"] else ""
        accuracy = f"{100 * one['evaluation']['accuracy']:.1f} %{note}" if one["evaluation"] else None
        parity = one["parity"] and ("passed" if one["parity"]["passed"] else "failed")
        hashes = ((one[key] or "")[:12] for key in ("dataset_sha256", "content_sha256"))
        cells = (str(one["version"]), ", ".join(one["aliases"]), one["created"], accuracy, parity, *hashes)
        lines.append(tuple(cell or "–" for cell in (*cells, one["model_path"])))
    return format_table(lines, num_left=len(lines[0]))


def format_version(version: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    """Return the facts of a version as lines, and the stages of its run.json with their commits."""
    lines = []
    for key, value in version.items():
        if key == "failed":  # the script prints it as warnings
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{name} {one}" for name, one in value.items() if not isinstance(one, list))
        lines.append(f"{key:16}{', '.join(value) if isinstance(value, list) else value}")
    for record in (run, run.get("training")):
        if record is not None:
            stage = record.get("stage") or "run"
            lines.append(f"{stage:16}{record.get('created')}, commit {record.get('git_commit')}")
    return "\n".join(lines)
