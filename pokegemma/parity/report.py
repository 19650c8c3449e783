"""Show a comparison: a table for the terminal, parity.json, and one HTML page."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pokegemma.evaluation.plots import plot_differences
from pokegemma.pages import picture_url, render_page
from pokegemma.parity.task import Task
from pokegemma.tables import format_percent, format_table

RESULT_FILE, PARITY_REPORT = "parity.json", "report.html"
_THUMBNAIL_PX = 448


def format_difference(spread: Mapping[str, float] | None) -> str:
    """Return mean and largest difference, "0.0010 / 0.0045", or a dash for None."""
    return "–" if spread is None else f"{spread['mean']:.4f} / {spread['max']:.3f}"


def format_mib(num_bytes: int | None) -> str:
    """Return bytes in MiB, or a dash for None."""
    return "–" if num_bytes is None else f"{num_bytes / 2**20:,.1f}"


def format_prompts(equal: bool | None) -> str:
    """Return in a word whether the prompts are those of the reference."""
    return {True: "equal", False: "differ", None: "not reported"}[equal]


def _cells(row: Mapping[str, Any], *, is_reference: bool) -> tuple[str, ...]:
    agreement = (
        ("–",) * 5
        if is_reference
        else (
            format_percent(row["button_agreement"]),
            format_percent(row["written_agreement"]),
            format_percent(row["top1_agreement"], digits=2),
            format_difference(row["button_log_probability_difference"]),
            format_difference(row["log_probability_difference"]),
        )
    )
    latency = row["latency_s"]
    return (
        row["name"],
        *agreement,
        format_percent(row["valid_json_rate"]),
        format_percent(row["button_accuracy"]),
        "–" if is_reference else format_prompts(row["prompts_equal"]),
        f"{1000 * latency['p50']:.0f} / {1000 * latency['p95']:.0f}",
        format_mib(row["peak_memory_bytes"]),
        format_mib(row.get("file_bytes")),
    )


COLUMNS = (
    "",
    "button",
    "written",
    "top-1",
    "Δ buttons",
    "Δ answer",
    "valid JSON",
    "right",
    "prompts",
    "ms p50/p95",
    "memory MiB",
    "files MiB",
)
_LEGEND = (
    "button, written, top-1: agreement with the reference on the scored button, the written one, the tokens of its "
    "answers.\nΔ: difference in log-probability, mean / largest, of the eight buttons and of these tokens. right: the "
    "recorded button.\nms: one written decision. memory: peak of the engine's process."
)


def table_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of the table: the cells, and whether the engine passed (None: it has no limits)."""
    rows = [{"cells": _cells(result["reference"], is_reference=True), "passed": None}]
    rows += [{"cells": _cells(row, is_reference=False), "passed": None} for row in result["variants"]]
    for engine in result["engines"]:
        if "latency_s" not in engine:
            rows.append({"cells": (engine["name"], "failed", *("–",) * (len(COLUMNS) - 2)), "passed": False})
            continue
        rows.append({"cells": _cells(engine, is_reference=False), "passed": engine["passed"]})
        if against := engine.get("against_causal_reference"):
            shown = {**engine, **against, "name": "  against causal pictures"}
            cells = _cells(shown, is_reference=False)
            rows.append({"cells": (*cells[:6], *("–",) * 6), "passed": None})
    return rows


def format_parity_table(result: Mapping[str, Any]) -> str:
    """Return the table for a terminal, with a line for each limit that an engine misses."""
    rows = table_rows(result)
    marks = {None: "", True: "PASS", False: "FAIL"}
    lines = [("", *COLUMNS), *((marks[row["passed"]], *row["cells"]) for row in rows)]
    failures = [f"FAIL  {name}: {message}" for name, message in _failures(result)]
    return "\n".join([format_table(lines, num_left=2), "", _LEGEND, *failures])


def _failures(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(engine["name"], failure["message"]) for engine in result["engines"] for failure in engine["failures"]]


def failure_line(result: Mapping[str, Any]) -> str:
    """Return the first failure as one line, with the number of the others."""
    (name, message), *others = _failures(result)
    return f"{name}: {message}" + (f" (and {len(others)} more)" if others else "")


def headline(result: Mapping[str, Any]) -> str:
    """Return the result in one sentence."""
    bad, total = sum(not engine["passed"] for engine in result["engines"]), len(result["engines"])
    where = f"with the reference on {result['num_samples']} decisions."
    if total == 1:
        return f"The export {'does not agree' if bad else 'agrees'} {where}"
    return f"{bad} of {total} exports {'does' if bad == 1 else 'do'} not agree {where}" if bad else f"All agree {where}"


def render_parity_page(result: Mapping[str, Any], task: Task) -> str:
    """Return the report as one page that loads nothing from anywhere."""
    measured = [engine for engine in result["engines"] if engine.get("button_log_probability_difference")]
    places = {worst["place"] for engine in result["engines"] for worst in engine.get("worst", ())}
    pictures = {place: task.question(place).pictures[-1] for place in sorted(places)}
    return render_page(
        Path(__file__).with_name("report.html.jinja"),
        filters={"percent": format_percent, "difference": format_difference, "mib": format_mib},
        result=result,
        headline=headline(result),
        columns=COLUMNS,
        rows=table_rows(result),
        failures=_failures(result),
        pictures={place: picture_url(picture, size_px=_THUMBNAIL_PX) for place, picture in pictures.items()},
        plot=plot_differences([*result["variants"], *measured]) if measured else None,
    )


def write_parity_report(folder: Path, result: Mapping[str, Any], task: Task) -> None:
    """Write parity.json and report.html into `folder`."""
    text = json.dumps(result, indent=2, allow_nan=False) + "\n"
    (folder / RESULT_FILE).write_text(text, encoding="utf-8")
    (folder / PARITY_REPORT).write_text(render_parity_page(result, task), encoding="utf-8")
