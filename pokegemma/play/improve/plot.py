"""Results of learning from play: a table, and success over rounds as a plot."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pokegemma.play.closed_loop.episodes import pool_success
from pokegemma.tables import format_interval, format_percent, format_table

ARMS = {
    "dagger": ("learns from its own play (DAgger)", "#2f81f7", "o"),
    "expert": ("as much data of the expert", "#9aa4b0", "s"),
    "dart": ("of the expert with noise (DART)", "#bf8700", "D"),
}
"""Label, colour and marker of each way to get more data."""


def pool_arms(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return, for each arm and round, the success of all seeds together with its interval, and that of each seed."""
    groups: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["arm"], result["round"]), []).append(result)
    rows = []
    for (arm, number), group in groups.items():
        success, interval = pool_success([result["play"] for result in group])
        also, also_interval = pool_success([result["also"] for result in group])
        rows.append(
            {
                "arm": arm,
                "round": number,
                "success": success,
                "interval": interval,
                "of_seeds": [result["play"]["success"] for result in group],
                "also": also,
                "also_interval": also_interval,
                "also_lowest": min(result["also"]["success"] for result in group),
                "num_samples": sum(result["num_samples"] for result in group) // len(group),
            }
        )
    return rows


def improvement_table(rows: Sequence[Mapping[str, Any]], *, level: int, also_level: int) -> str:
    """Return the pooled results as a table for a terminal."""
    head = ("", "round", "samples", f"level {level}", "95 % interval", "seeds", f"level {also_level}", "lowest seed")
    table = [head]
    for row in rows:
        seeds = " ".join(f"{100 * share:.0f}" for share in row["of_seeds"])
        success, also, lowest = (format_percent(row[name]) for name in ("success", "also", "also_lowest"))
        cells = (ARMS[row["arm"]][0], str(row["round"]), str(row["num_samples"]), success)
        table.append((*cells, format_interval(row["interval"]), seeds, also, lowest))
    return format_table(table)


def plot_improvement(path: Path, rows: Sequence[Mapping[str, Any]], *, level: int, noise: float) -> None:
    """Draw success over rounds, with intervals over all rooms and a dot for each seed, as PNG."""
    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        axes = figure.add_subplot()
        for place, (arm, (label, colour, marker)) in enumerate(ARMS.items()):
            if chosen := sorted((row for row in rows if row["arm"] == arm), key=lambda row: row["round"]):
                _draw_arm(axes, chosen, label=label, colour=colour, marker=marker, shift=0.06 * place)
        axes.set(ylim=(-3, 103), xlabel="round of play, correction and training", ylabel="rooms solved, %")
        axes.set_xticks(sorted({row["round"] for row in rows}))
        axes.grid(axis="y", linewidth=0.6, alpha=0.5)
        axes.set_title(
            f"level {level}, {100 * noise:.0f} % of the presses replaced; bars: 95 %, dots: seeds", fontsize=10
        )
        axes.legend(loc="lower right", frameon=False)
        figure.savefig(path, dpi=120)


def _draw_arm(
    axes: Axes, rows: Sequence[Mapping[str, Any]], *, label: str, colour: str, marker: str, shift: float
) -> None:
    places = [row["round"] + shift for row in rows]
    success = [100 * row["success"] for row in rows]
    below = [100 * max(0.0, row["success"] - row["interval"][0]) for row in rows]
    above = [100 * max(0.0, row["interval"][1] - row["success"]) for row in rows]
    axes.errorbar(places, success, yerr=[below, above], color=colour, marker=marker, label=label, capsize=4)
    for place, row in zip(places, rows, strict=True):
        shares = [100 * share for share in row["of_seeds"]]
        axes.scatter([place + 0.02] * len(shares), shares, color=colour, s=10, alpha=0.6)
