"""Read the plain form of a recording, which anyone can write: a folder of frames and a table of actions."""

import csv
import io
import json
import re
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from pokegemma.data.decisions import Decision, clean_text
from pokegemma.data.recordings.actions import decide, is_continued, read_moment, read_presses
from pokegemma.data.recordings.json_lines import read_json_lines
from pokegemma.data.recordings.session import (
    PICTURES,
    Session,
    SessionError,
    Turn,
    build_session,
    find_inside,
    with_frames,
)

ACTION_FILES = ("actions.csv", "actions.jsonl")
INFO_FILE = "session.json"
_REQUIRED, _OPTIONAL = ("time", "button"), ("frame", "held", "reason", "situation", "by")
_YES, _NO = ("1", "true", "yes", "y"), ("", "0", "false", "no", "n", "none")


def find_plain_form(folder: Path, names: Iterable[str]) -> list[Path]:
    """Return the folder if it is a recording in the plain form."""
    return [folder] if (folder / "frames").is_dir() and set(names) & set(ACTION_FILES) else []


def read_plain_form(folder: Path) -> Session:
    """Read a folder with frames/ and actions.csv or actions.jsonl, and session.json (goal, by) if it exists.

    Raises:
        SessionError: a required column is missing, or frames and rows cannot be matched.
    """
    rows, problems = _read_rows(folder)
    info = _read_info(folder)
    frames = _match_frames(folder, rows)
    turns: list[Turn] = []
    held: tuple[str, ...] = ()
    before: datetime | None = None
    for number, (row, frame) in enumerate(zip(rows, frames, strict=True), 1):
        timestamp, time = read_moment(row.get("time") if isinstance(row, dict) else None)
        continues = is_continued(before, time)
        decision, held = _decide(row, held=held if continues else (), by=info.get("by"))
        before = time
        is_between = decision.status == "held" or (decision.status == "no_button" and continues)
        shown = () if is_between or frame is None else (frame,)
        turns.append(with_frames(Turn(number, decision, timestamp or None, time, shown)))
    return build_session(folder, clean_text(info.get("goal")).strip(), turns, problems)


def _decide(row: Any, *, held: Sequence[str], by: Any) -> tuple[Decision, tuple[str, ...]]:
    """Return a row's decision, and the buttons that are held after it."""
    if not isinstance(row, dict):
        return Decision("malformed_turn", problem="not a JSON object"), ()
    try:
        presses = read_presses(row.get("button"))
        is_held = _read_flag(row.get("held"))
    except ValueError as error:
        return Decision("malformed_turn", problem=clean_text(str(error))), ()
    decision = decide(
        presses,
        already_held=presses if is_held else held,
        by=row.get("by") or by,
        reasoning=row.get("reason"),
        situation=row.get("situation"),
    )
    return decision, presses


def _read_flag(value: Any) -> bool:
    text = str("" if value is None else value).strip().lower()
    if text not in _YES + _NO:
        raise ValueError(f"held {text[:60]!r} is neither yes nor no")
    return text in _YES


def _read_rows(folder: Path) -> tuple[list[Any], list[str]]:
    """Return the rows of the table of actions, and a line for what is not read in it."""
    path = next(folder / name for name in ACTION_FILES if (folder / name).is_file())
    name = f"{folder.name}/{path.name}"
    if path.suffix == ".jsonl":
        rows, problems = read_json_lines(path, name=name)
        keys = sorted({key for row in rows if isinstance(row, dict) for key in row})
    else:
        try:
            reader = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline=""), strict=True)
            keys = [(key or "").strip().lower() for key in reader.fieldnames or ()]
            reader.fieldnames = keys
            rows, problems = list(reader), []
        except (csv.Error, UnicodeDecodeError) as error:
            raise SessionError(f"{name} is not a table: {error}") from error
    if missing := [key for key in _REQUIRED if key not in keys]:
        raise SessionError(f"{name}: no column {' and no column '.join(missing)}; found {', '.join(keys) or 'none'}")
    unknown = [str(key) for key in keys if key not in _REQUIRED + _OPTIONAL]
    problems += [f"{name}: its column {key!r} is not read" for key in unknown]
    return rows, problems


def _read_info(folder: Path) -> dict[str, Any]:
    path = folder / INFO_FILE
    if not path.exists():
        return {}
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise SessionError(f"{folder.name}/{INFO_FILE} is not JSON: {error}") from error
    if not isinstance(info, dict):
        raise SessionError(f"{folder.name}/{INFO_FILE} is not an object with goal and by")
    return info


def _match_frames(folder: Path, rows: Sequence[Any]) -> list[Path | None]:
    """Return each row's picture: the file that it names or, where no row names one, the files in order."""
    if any(isinstance(row, dict) and row.get("frame") for row in rows):
        names = [row.get("frame") if isinstance(row, dict) else None for row in rows]
        return [
            find_inside(folder, (f"frames/{name}", name)) if isinstance(name, str) and name else None for name in names
        ]
    files = sorted(
        (path for path in (folder / "frames").iterdir() if path.suffix.lower() in PICTURES),
        key=lambda path: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)],
    )
    if len(files) not in (len(rows), len(rows) + 1):  # the last may show how it ended
        raise SessionError(
            f"{folder.name}: {len(rows)} actions and {len(files)} frames; without a column 'frame' there must be one "
            "frame for each action, and one more at most"
        )
    return list(files[: len(rows)])
