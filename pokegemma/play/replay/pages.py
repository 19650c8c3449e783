"""Write replays: HTML pages without network, with a scrubber over the turns of recorded sessions."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2

from pokegemma.data.prompts import BUTTONS
from pokegemma.data.recordings.readers import Recording
from pokegemma.outputs import atomic_file
from pokegemma.play.replay.turns import ReplaySession, ReplayTurn, read_replay

REPLAY_FILE = "replay.html"

MAX_TURNS = 2000
"""Turns of one file: about 6 MB of the toy game, 20 MB of a real one."""


def write_replay(recordings: Iterable[Recording], output: Path) -> list[Path]:
    """Write a replay of recorded sessions and return its files.

    Up to 2,000 turns are one file. Beyond that each session is a page (a longer one several) next to `output`, which
    becomes their index.

    Raises:
        SessionError: a recording is damaged.
        OSError: a file cannot be written.
    """
    pages = _pages(map(read_replay, recordings))
    first = list(_take(pages, 2))
    if len(first) == 1:
        _write(output, "replay.html.jinja", **_page_values(first[0], index=None))
        return [output]
    written, entries = [], []
    for number, sessions in enumerate((*first, *pages), start=1):
        path = output.with_name(f"{output.stem}_{number:03d}{output.suffix}")
        _write(path, "replay.html.jinja", **_page_values(sessions, index=output.name))
        written.append(path)
        entries.append({"file": path.name, "sessions": [_summary(session) for session in sessions]})
    _write(output, "index.html.jinja", pages=entries)
    return [output, *written]


def _pages(sessions: Iterable[ReplaySession]) -> Iterator[list[ReplaySession]]:
    """Yield the sessions of each page: all, if they have at most `MAX_TURNS`; else one, or a part of one."""
    together: list[ReplaySession] = []
    alone = False
    for session in sessions:
        together.append(session)
        alone = alone or sum(len(one.turns) for one in together) > MAX_TURNS
        if alone:
            yield from ([part] for one in together for part in _parts(one))
            together = []
    if together:
        yield together


def _parts(session: ReplaySession) -> Iterator[ReplaySession]:
    turns = session.turns
    for start in range(0, max(len(turns), 1), MAX_TURNS):
        part = turns[start : start + MAX_TURNS]
        screens = {turn.screen: session.screens[turn.screen] for turn in part if turn.screen is not None}
        yield replace(session, turns=part, screens=screens)


def _take(items: Iterator[Any], count: int) -> Iterator[Any]:
    for _, item in zip(range(count), items, strict=False):
        yield item


def _page_values(sessions: Sequence[ReplaySession], *, index: str | None) -> dict[str, Any]:
    data = {
        "buttons": BUTTONS,
        "screens": {key: picture for session in sessions for key, picture in session.screens.items()},
        "sessions": [
            {"name": session.name, "goal": session.goal, "turns": [_turn_values(turn) for turn in session.turns]}
            for session in sessions
        ],
    }
    # "</script" and "<!--" in a text would change where the script element ends.
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return {"data": text, "index": index, "title": ", ".join(session.name for session in sessions[:3])}


def _turn_values(turn: ReplayTurn) -> dict[str, Any]:
    values = {
        "n": turn.number,
        "s": turn.screen,
        "p": turn.pressed,
        "c": turn.chosen,
        "r": turn.right,
        "by": turn.decided_by,
        "why": turn.reasoning,
        "at": turn.situation,
        "t": turn.time,
        "q": turn.probabilities,
        "bad": turn.is_mistake,
        "stuck": turn.is_stuck,
    }
    return {name: value for name, value in values.items() if value not in (None, "", False, ())}


def _summary(session: ReplaySession) -> dict[str, Any]:
    numbers = [turn.number for turn in session.turns if turn.number is not None]
    return {
        "name": session.name,
        "goal": session.goal,
        "turns": f"{min(numbers)} to {max(numbers)}" if numbers else "none",
        "num_mistakes": sum(turn.is_mistake for turn in session.turns),
        "num_stuck": sum(turn.is_stuck for turn in session.turns),
    }


def _write(path: Path, template: str, **values: Any) -> None:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    with atomic_file(path) as temporary:
        temporary.write_text(environment.get_template(template).render(**values), encoding="utf-8")
