"""The report of an arena: arena.json, players.csv, pairs.csv, and a page with the matrix and the replays."""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pokegemma import evaluation
from pokegemma.battles.arena.playing import REPLAYS_FOLDER
from pokegemma.battles.arena.replay import read_battle_log
from pokegemma.battles.arena.results import ArenaResult
from pokegemma.battles.players.player import describe_replaced
from pokegemma.outputs import write_if_changed
from pokegemma.pages import render_page
from pokegemma.tables import format_interval, format_percent, format_table

STANDINGS_FILE, ARENA_PAGE_FILE = "arena.json", "report.html"
_TEMPLATE = Path(__file__).with_name("report.html.jinja")
_STYLE = Path(evaluation.__file__).with_name("style.css.jinja")


def write_arena_report(
    output_dir: Path, standings: Mapping[str, Any], results: Iterable[ArenaResult], *, battle_format: str
) -> None:
    """Write arena.json, players.csv, pairs.csv and report.html; the same results give the same bytes."""
    report = {"battle_format": battle_format, **standings}
    write_if_changed(output_dir / STANDINGS_FILE, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    write_if_changed(output_dir / "players.csv", _write_csv(standings["players"]))
    pairs = [
        {"first": pair["players"][0], "second": pair["players"][1], **_without(pair, "players")}
        for pair in standings["pairs"]
    ]
    write_if_changed(output_dir / "pairs.csv", _write_csv(pairs))
    write_if_changed(output_dir / ARENA_PAGE_FILE, _render(output_dir, report, list(results)))


def format_standings(standings: Mapping[str, Any]) -> str:
    """Return the standings as a table for a terminal, with the battles against the baseline below."""
    rows = [("", "rating", "95 %", "won", "lost", "tied", "of the pool", "95 %")]
    for player in standings["players"]:
        low, high = player["rating_interval"]
        rows.append(
            (
                player["name"],
                f"{player['rating']:+.0f}",
                f"{low:+.0f} to {high:+.0f}",
                *(str(player[key]) for key in ("wins", "losses", "ties")),
                format_percent(player["pool_win_rate"]),
                format_interval(player["pool_win_rate_interval"]),
            )
        )
    lines = [format_table(rows)]
    lines += [
        f"{player['name']}: {describe_replaced(player['timeouts'], player['unanswered'])}"
        for player in standings["players"]
        if player["timeouts"] or player["unanswered"]
    ]
    lines += [
        f"{row['name']} against {row['baseline']}: {row['wins']} won, {row['losses']} lost, {row['ties']} tied, "
        f"{format_percent(row['win_rate'])} ({format_interval(row['win_rate_interval'])})"
        for row in standings["head_to_head"]
    ]
    return "\n".join(lines)


def _without(row: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in keys}


def _write_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as CSV; an interval becomes two columns."""
    flat = [
        {
            name: part
            for key, value in row.items()
            for name, part in (
                zip((f"{key}_low", f"{key}_high"), value, strict=True) if isinstance(value, list) else [(key, value)]
            )
        }
        for row in rows
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def _render(output_dir: Path, report: Mapping[str, Any], results: list[ArenaResult]) -> str:
    names = [player["name"] for player in report["players"]]
    cells = {}
    for pair in report["pairs"]:
        first, second = pair["players"]
        total = pair["wins"] + pair["losses"] + pair["ties"]
        for name, other, wins, losses in (
            (first, second, pair["wins"], pair["losses"]),
            (second, first, pair["losses"], pair["wins"]),
        ):
            cells[name, other] = {"text": f"{wins}–{losses}–{pair['ties']}", "share": wins / total}
    replays = []
    for result in sorted(results, key=lambda result: result.battle.battle_id):
        path = output_dir / REPLAYS_FOLDER / f"{result.battle.battle_id}.log"
        if path.is_file():
            turns = read_battle_log(path.read_text(encoding="utf-8"))
            replays.append({"result": result, "names": result.battle.names, "turns": turns})
    return render_page(
        _TEMPLATE,
        filters={"percent": format_percent, "interval": format_interval},
        style=_STYLE.read_text(encoding="utf-8"),
        report=report,
        names=names,
        cells=cells,
        replays=replays,
    )
