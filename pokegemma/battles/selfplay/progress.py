"""Results of self-play: a table, and win rates over rounds as a plot."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pokegemma.tables import format_interval, format_percent, format_table

_COLOURS = ("#2f81f7", "#bf8700", "#8250df", "#9aa4b0")
_AGAINST_BEST = "#1a7f37"


def format_progress(results: Mapping[str, Any]) -> str:
    """Return the results as a table for a terminal: a line for the first policy, and one for each candidate."""
    names = list(results["start"])
    head = ("", "against", "won-lost-tied", "win rate", "95 %", "accepted", *(f"against {name}" for name in names))
    rows = [head, ("start", *[""] * 5, *(_rate(results["start"][name]) for name in names))]
    for row in results["rounds"]:
        record = row["against_best"]
        rows.append(
            (
                row["candidate"],
                row["best"],
                f"{record['wins']}-{record['losses']}-{record['ties']}",
                format_percent(record["win_rate"]),
                format_interval(record["win_rate_interval"]),
                "yes" if row["accepted"] else "no",
                *(_rate(row["against"][name]) for name in names),
            )
        )
    return format_table(rows)


def describe_final(results: Mapping[str, Any]) -> str:
    """Return a sentence about the best policy and the first one, in battles that chose neither."""
    final, best = results["final"], results["best"]["name"]
    if final is None:
        return "no candidate was accepted: the best policy is the first one"
    record = final["against_start"]
    return (
        f"{best} against start in new battles: {record['wins']} won, {record['losses']} lost, {record['ties']} tied, "
        f"{format_percent(record['win_rate'])} ({format_interval(record['win_rate_interval'])})"
    )


def _rate(record: Mapping[str, Any]) -> str:
    return f"{format_percent(record['win_rate'])} ({format_interval(record['win_rate_interval'])})"


def plot_progress(path: Path, results: Mapping[str, Any]) -> None:
    """Draw each candidate's win rates, with 95 % intervals, as PNG: against the best, and against each other player.

    A filled mark is a candidate that was accepted.
    """
    rounds = results["rounds"]
    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        axes = figure.add_subplot()
        axes.axhline(50, color=_AGAINST_BEST, linewidth=0.8, linestyle=":")
        records = [(row["round"], row["against_best"], row["accepted"]) for row in rounds]
        _draw(axes, records, label="the best before", colour=_AGAINST_BEST, shift=0.0)
        for place, name in enumerate(results["start"]):
            records = [(row["round"], row["against"][name], row["accepted"]) for row in rounds]
            records.insert(0, (0, results["start"][name], True))
            _draw(axes, records, label=name, colour=_COLOURS[place % len(_COLOURS)], shift=0.05 * (place + 1))
        axes.set(ylim=(-3, 103), xlabel="round (0: the first policy)", ylabel="battles won, %")
        axes.set_xticks(range(len(rounds) + 1))
        axes.grid(axis="y", linewidth=0.6, alpha=0.5)
        axes.set_title("win rate of each candidate; filled: accepted; bars: 95 %", fontsize=10)
        axes.legend(title="against", frameon=False)
        figure.savefig(path, dpi=120)


def _draw(
    axes: Axes, records: Sequence[tuple[int, Mapping[str, Any], bool]], *, label: str, colour: str, shift: float
) -> None:
    places = [number + shift for number, _, _ in records]
    rates = [100 * record["win_rate"] for _, record, _ in records]
    bounds = [record["win_rate_interval"] for _, record, _ in records]
    below = [max(0.0, rate - 100 * low) for rate, (low, _) in zip(rates, bounds, strict=True)]
    above = [max(0.0, 100 * high - rate) for rate, (_, high) in zip(rates, bounds, strict=True)]
    axes.errorbar(places, rates, yerr=[below, above], color=colour, capsize=4, label=label)
    for place, rate, (_, _, accepted) in zip(places, rates, records, strict=True):
        axes.plot(place, rate, marker="o", color=colour, markerfacecolor=colour if accepted else "white")
