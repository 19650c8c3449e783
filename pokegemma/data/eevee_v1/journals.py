"""The journal of a session that pokegemma recorded: one line a turn, whole up to the last turn whatever ended it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

JOURNAL_FILE = "journal.jsonl"
"""Next to session_data.json, which is written now and then from the journal.

The first line is {"session": {session_id, goal, start_time, facts}}. A later {"resumed": {turn, time, facts}} is where
recording went on. All other lines are turns as in session_data.json.
"""


@dataclass(frozen=True)
class Journal:
    """What a journal contains. Lines after `num_bytes` are cut off; `problems` names what is not readable."""

    head: dict[str, Any]
    turns: tuple[Any, ...]
    resumed: tuple[Any, ...]
    num_bytes: int
    problems: tuple[str, ...]


def read_journal(path: Path) -> Journal:
    """Read a journal that may end in the middle of a line; an unreadable line before the last is a turn that is None.

    Raises:
        OSError: the file cannot be read.
    """
    content = path.read_bytes()
    num_bytes = content.rfind(b"\n") + 1
    lines = [_decode(line) for line in content[:num_bytes].split(b"\n")[:-1]]
    problems = []
    while lines and lines[-1] is None:  # what a power failure may leave
        lines.pop()
        num_bytes = content.rfind(b"\n", 0, num_bytes - 1) + 1
    if num_bytes < len(content):
        problems.append(f"{path.name}: the last line is cut off; the turn that was being recorded is not converted")
    head = lines.pop(0).get("session") if lines and isinstance(lines[0], dict) and "session" in lines[0] else {}
    problems += [f"{path.name} line {number}: not JSON" for number, line in enumerate(lines, 2) if line is None]
    resumed = tuple(line["resumed"] for line in lines if isinstance(line, dict) and "resumed" in line)
    turns = tuple(line for line in lines if not (isinstance(line, dict) and "resumed" in line))
    return Journal(head if isinstance(head, dict) else {}, turns, resumed, num_bytes, tuple(problems))


def join_journal(record: Mapping[str, Any] | None, journal: Journal) -> dict[str, Any]:
    """Return the session's record with the turns that only its journal has; `record` is None where it is unreadable.

    Turns of the record stay as they are: they may have been corrected.
    """
    record = dict(record) if record is not None else start_record(journal.head)
    turns = record.get("turns")
    turns = turns if isinstance(turns, list) else []
    last = max((number for turn in turns if (number := _number(turn)) is not None), default=0)
    first_new = next((at for at, turn in enumerate(journal.turns) if (_number(turn) or 0) > last), len(journal.turns))
    record["turns"] = [*turns, *journal.turns[first_new:]]
    if journal.resumed:
        record["resumed"] = list(journal.resumed)
    return record


def start_record(head: Mapping[str, Any]) -> dict[str, Any]:
    """Return session_data.json of a session without turns, in Eevee v1's format and with the `facts` of its `head`."""
    known = {name: head.get(name) for name in ("session_id", "goal", "start_time")}
    metadata = {**known, "status": "running", "total_turns": 0, "successful_turns": 0, "fine_tuning_eligible": True}
    return {"session_metadata": metadata, **known, "facts": head.get("facts"), "turns": [], "enhanced_turns": []}


def _decode(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _number(turn: Any) -> int | None:
    number = turn.get("turn") if isinstance(turn, dict) else None
    return number if type(number) is int else None
