"""The report's plots, as SVG in data URIs: no network, readable on a light and on a dark page."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_INK, _FAINT = "#7d8590", "#7d859055"
_MODEL, _BASELINE, _INTERVAL = "#2f81f7", "#9aa4b0", "#bf8700"
_FAILED = "#c9372c"
_STYLE = {
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.edgecolor": _FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _FAINT,
    "axes.axisbelow": True,
    "svg.hashsalt": "pokegemma",
}


def _draw(width: float, height: float, draw: Any) -> str:
    """Return `draw(axes)` on a transparent figure of the given inches as a data URI."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.add_subplot())
        buffer = io.BytesIO()
        # Without a date the same results give the same bytes.
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _bars(axes: Axes, names: Sequence[str], values: Sequence[float], colors: Sequence[str]) -> None:
    axes.barh(range(len(values)), [100 * value for value in values], color=colors, height=0.62)
    axes.set_yticks(range(len(values)), names)
    axes.tick_params(length=0)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.grid(axis="x", linewidth=0.6)


def plot_accuracy(rows: Sequence[Mapping[str, Any]], model_keys: Sequence[str]) -> str:
    """Draw the accuracy of each row with its interval; the model's rows are coloured."""

    def draw(axes: Axes) -> None:
        colors = [_MODEL if row["key"] in model_keys else _BASELINE for row in rows]
        _bars(axes, [row["name"] for row in rows], [row["accuracy"] for row in rows], colors)
        for place, row in enumerate(rows):
            low, high = (100 * value for value in row["accuracy_interval"] or [row["accuracy"]] * 2)
            if row["accuracy_interval"]:
                axes.plot([low, high], [place, place], color=_INTERVAL, linewidth=2, marker="|", markersize=10)
            inside = high > 88
            axes.text(
                min(100 * row["accuracy"], low) - 1.5 if inside else high + 1.5,
                place,
                f"{100 * row['accuracy']:.1f}",
                va="center",
                ha="right" if inside else "left",
                color="white" if inside else _INK,
                fontweight="bold",
            )
        axes.set_xlabel("right button, % of turns (bar: accuracy; line: 95 % interval)")

    return _draw(7.2, 0.62 + 0.46 * len(rows), draw)


def plot_recall(table: Sequence[Mapping[str, Any]]) -> str:
    """Draw the recall of each button that occurs."""
    occurring = [row for row in table if row["support"]]

    def draw(axes: Axes) -> None:
        names = [f"{row['button']}  (n={row['support']})" for row in occurring]
        _bars(axes, names, [row["recall"] for row in occurring], [_MODEL] * len(occurring))
        axes.set_xlabel("recall: of the turns with this button, % pressed right")

    return _draw(5.2, 0.7 + 0.36 * len(occurring), draw)


def plot_reliability(bins: Sequence[Mapping[str, Any]]) -> str:
    """Draw accuracy over confidence; the area of a dot is its share of the decisions."""

    def draw(axes: Axes) -> None:
        total = sum(row["count"] for row in bins)
        confidence, accuracy = ([100 * row[name] for row in bins] for name in ("confidence", "accuracy"))
        axes.plot([0, 100], [0, 100], color=_INK, linewidth=1, linestyle=(0, (4, 4)))
        axes.plot(confidence, accuracy, color=_MODEL, linewidth=1.2, alpha=0.6)
        axes.scatter(
            confidence, accuracy, s=[18 + 420 * row["count"] / total for row in bins], color=_MODEL, alpha=0.75
        )
        axes.set(xlim=(0, 106), ylim=(-4, 108), xlabel="confidence, %", ylabel="right, %")
        axes.grid(linewidth=0.6)

    return _draw(4.6, 3.5, draw)


def plot_differences(rows: Sequence[Mapping[str, Any]]) -> str:
    """Draw the mean and the largest difference in log-probability of the buttons, and the limit of the mean."""

    def draw(axes: Axes) -> None:
        spreads = [row["button_log_probability_difference"] for row in rows]
        limits = [row.get("max_log_probability_difference") for row in rows]
        smallest = min((value for spread in spreads for value in spread.values() if value > 0), default=1e-6)
        floor = smallest / 3  # a difference of zero has no place on this axis: it stands at its left end
        for place, (row, spread, limit) in enumerate(zip(rows, spreads, limits, strict=True)):
            mean, largest = (max(spread[name], floor) for name in ("mean", "max"))
            color = _BASELINE if limit is None else _MODEL if row.get("passed") else _FAILED
            axes.plot([mean, largest], [place, place], color=color, linewidth=2.4, solid_capstyle="round")
            axes.plot(mean, place, "o", color=color, markersize=8)
            axes.plot(largest, place, "|", color=color, markersize=9, markeredgewidth=2)
            if limit:
                axes.plot([limit, limit], [place - 0.34, place + 0.34], color=_INTERVAL, linewidth=2)
        axes.set_xscale("log")
        axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", linewidth=0.6)
        # Aligned on the right: long names leave the axes less room than the label takes.
        axes.set_xlabel("log-probability apart: mean (dot), largest (end), limit of the mean (line)", loc="right")

    return _draw(7.6, 0.8 + 0.42 * len(rows), draw)
