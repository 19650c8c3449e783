"""Read recorded Eevee v1 sessions, in all layouts of their files."""

import dataclasses
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pokegemma.data.copies import take_fingerprint
from pokegemma.data.decisions import DECISION, Decision, clean_text, read_decision
from pokegemma.data.eevee_v1.journals import JOURNAL_FILE, join_journal, read_journal
from pokegemma.data.eevee_v1.named_pictures import SESSION_FILE, NamedPictures, split_path
from pokegemma.data.eevee_v1.screenshot_numbers import number_steps
from pokegemma.data.recordings.session import MAX_TURN, Session, SessionError, Turn, read_time

_STEP_FILE = re.compile(r"step_(\d{1,9})_grid\.png")


def find_eevee_sessions(folder: Path, names: Iterable[str]) -> list[Path]:
    """Return the folder if it is a session of Eevee v1, or of pokegemma, whose journal may be all that there is."""
    return [folder] if {SESSION_FILE, JOURNAL_FILE} & set(names) else []


def read_session(folder: Path, *, pictures: NamedPictures | None = None) -> Session:
    """Read a session folder. Every logged turn is returned, with exactly one status.

    Args:
        folder: with session_data.json and the screenshots.
        pictures: finds the file of a `screenshot_path` (default: in `folder` only).

    Raises:
        SessionError: session_data.json is missing, cut off, or not a session.
    """
    folder = Path(folder)
    try:
        return _read_session(folder, pictures or NamedPictures(folder))
    except OSError as error:
        raise SessionError(f"{folder.name} cannot be read: {error.strerror}") from error


def _read_session(folder: Path, pictures: NamedPictures) -> Session:
    record, problems = read_record(folder)
    raw_turns = record.get("turns") or record.get("gameplay_history") or []
    if not isinstance(raw_turns, list):
        raise SessionError(f"{folder.name}/{SESSION_FILE}: its turns are not a list")
    numbers = _read_numbers(raw_turns)
    decisions = [
        Decision("malformed_turn") if number is None else read_decision(raw)
        for number, raw in zip(numbers, raw_turns, strict=True)
    ]
    files = _step_files(folder)
    numbering = number_steps(numbers, [decision.captured for decision in decisions], sorted(files))
    raw_frames = _raw_frames(record)
    wanted = [
        number is not None and number not in raw_frames and step is None
        for number, step in zip(numbers, numbering.steps, strict=True)
    ]
    named = pictures.find(raw_turns, folder, wanted=wanted)
    turns, missing = [], None
    for number, raw, decision, step, path in zip(numbers, raw_turns, decisions, numbering.steps, named, strict=True):
        found = (raw_frames.get(number), path if step is None else files[step]) if number is not None else ()
        frames = tuple(frame for frame in found if frame is not None)
        if decision.status == DECISION and not frames:
            decision = dataclasses.replace(decision, status="frame_missing")
            missing = missing or _picture_name(raw, number)
        timestamp = clean_text(raw.get("timestamp")) if isinstance(raw, dict) else ""
        new_start = isinstance(raw, dict) and raw.get("new_start") is True
        turns.append(Turn(number, decision, timestamp or None, read_time(timestamp), frames, new_start))
    goal = _read_goal(record)
    try:
        fingerprint = take_fingerprint(
            session_id=record.get("session_id"),
            start=record.get("start_time"),
            goal=goal,
            raw_turns=raw_turns,
            dated=any(turn.time for turn in turns),
        )
    except RecursionError as error:
        raise SessionError(f"{SESSION_FILE} is not a session: nested too deeply") from error
    return Session(folder, goal, tuple(turns), numbering.rule, fingerprint, missing, tuple(problems))


def _picture_name(raw: dict[str, Any], number: int) -> str:
    parts = split_path(clean_text(raw.get("screenshot_path")))
    return parts[-1] if len(parts) > 1 else f"step_{number:04d}_grid.png"


def read_record(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Return what session_data.json contains, with the turns that only the session's journal has, and what is damaged.

    Raises:
        SessionError: there is neither a readable session_data.json nor a journal.
        OSError: the journal cannot be read.
    """
    path = folder / JOURNAL_FILE
    if not path.is_file():
        return _read_session_file(folder), []
    journal = read_journal(path)
    problems = [f"{folder.name}/{problem}" for problem in journal.problems]
    if not (folder / SESSION_FILE).exists():
        return join_journal(None, journal), problems
    try:
        return join_journal(_read_session_file(folder), journal), problems
    except SessionError as error:
        return join_journal(None, journal), [*problems, f"{error}; its turns are read from {JOURNAL_FILE}"]


def _read_session_file(folder: Path) -> dict[str, Any]:
    path, name = folder / SESSION_FILE, f"{folder.name}/{SESSION_FILE}"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise SessionError(f"{name} cannot be read: {error.strerror}") from error
    try:
        record = json.loads(content)
    except RecursionError as error:
        raise SessionError(f"{name} is not a session: nested too deeply") from error
    except ValueError as error:
        raise SessionError(f"{name} is cut off or not JSON ({len(content)} bytes): {error}") from error
    if not isinstance(record, dict):
        raise SessionError(f"{name} is not a session: a JSON {type(record).__name__}, not an object")
    return record


def _read_numbers(raw_turns: list[Any]) -> list[int | None]:
    """Return each turn's number; None if it is missing, not a whole number, or the number of an earlier turn."""
    numbers: list[int | None] = []
    seen: set[int] = set()
    for raw in raw_turns:
        number = raw.get("turn") if isinstance(raw, dict) else None
        usable = type(number) is int and 0 <= number < MAX_TURN and number not in seen
        numbers.append(number if usable else None)
        if usable:
            seen.add(number)
    return numbers


def _read_goal(record: dict[str, Any]) -> str:
    metadata = record.get("session_metadata")
    nested = metadata.get("goal") if isinstance(metadata, dict) else None
    return clean_text(nested).strip() or clean_text(record.get("goal")).strip()


def _raw_frames(record: dict[str, Any]) -> dict[int, str]:
    """Return the base64 of the frames without v1's overlay, by turn number."""
    enhanced = record.get("enhanced_turns")
    frames: dict[int, str] = {}
    for raw in enhanced if isinstance(enhanced, list) else []:
        number = raw.get("turn_number") if isinstance(raw, dict) else None
        if type(number) is int and isinstance(raw.get("screenshot_base64"), str) and raw["screenshot_base64"]:
            frames.setdefault(number, raw["screenshot_base64"])
    return frames


def _step_files(folder: Path) -> dict[int, Path]:
    """Return the screenshots by step number: from the session's root (oldest versions), then from sshots/."""
    files = {}
    for parent in (folder, folder / "sshots"):
        for path in sorted(parent.iterdir()) if parent.is_dir() else []:
            if match := _STEP_FILE.fullmatch(path.name):
                files[int(match[1])] = path
    return files
