"""Results of PSRO as tables for a terminal."""

from collections.abc import Mapping
from typing import Any

from pokegemma.tables import format_interval, format_percent, format_table


def format_payoffs(equilibrium: Mapping[str, Any]) -> str:
    """Return the matrix of one population, each player's share of wins against those on top, and the mixture."""
    names, mixture = equilibrium["population"], equilibrium["mixture"]
    rows = [("", *names, "mixture")]
    for name, payoffs in zip(names, equilibrium["payoffs"], strict=True):
        cells = ("–" if other == name else format_percent(payoff) for other, payoff in zip(names, payoffs, strict=True))
        rows.append((name, *cells, format_percent(mixture[name])))
    return format_table(rows)


def format_responses(results: Mapping[str, Any]) -> str:
    """Return a line for each population: its mixture's exploitability, and what was trained against it."""
    head = ("players", "exploitability", "resampled", "95 %", "response", "wins against it", "95 %", "in the last game")
    rows = [head]
    for record in results["equilibria"]:
        within, trained = record["exploitability"], record.get("response_payoff")
        cells = [str(len(record["population"])), format_percent(within["value"]), format_percent(within["mean"])]
        cells.append(format_interval(within["interval"]))
        if trained is not None:
            cells += [record["response"], format_percent(trained["value"]), format_interval(trained["interval"])]
            cells.append(format_percent(record["later_exploitability"]["value"]))
        rows.append((*cells, *[""] * (len(head) - len(cells))))
    return format_table(rows)
