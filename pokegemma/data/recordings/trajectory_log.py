"""Read the trajectory log of a harness such as PokéAgent's: JSON lines, each a step with its action and screenshot."""

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

from pokegemma.data.decisions import Decision, clean_text
from pokegemma.data.recordings.actions import BUTTON_KEYS, decide, read_moment, read_presses
from pokegemma.data.recordings.json_lines import read_json_lines
from pokegemma.data.recordings.session import MAX_TURN, PICTURES, Session, Turn, build_session, find_inside, with_frames

LOG_FILES = (".jsonl", ".ndjson")
PICTURE_FOLDERS = ("screenshots", "frames", "images")
GENERIC_NAMES = ("trajectory_history", "trajectory", "trajectories", "history", "steps", "log")
"""Stems of logs that are named after their folder."""

_STEP = ("step", "step_number", "step_num", "step_id", "turn", "index")
_ACTION = ("tool_calls", "tool_call", *BUTTON_KEYS)
_SCREENSHOT = (
    *("screenshot_base64", "image_base64", "image_b64", "screenshot", "screenshot_path", "image_path"),
    *("frame_path", "image", "frame"),
)
_TIME = ("timestamp", "time", "ts", "created_at")
_REASONING = ("reasoning", "reason", "rationale", "thought", "thoughts", "thinking")
_SITUATION = ("context_detected", "situation", "context")
_GOAL = ("goal", "objective", "task", "instruction")
_AFTER = ("post_state", "next_state", "next_observation", "next_obs", "new_state", "after", "result", "outcome")
"""Keys of what was there after the action: never read, since a sample shows what the player saw before it."""

_SEEN = ("pre_state", "state", "game_state", "observation", "obs", "info")
"""Keys of what was there before the action, which may list the actions that are possible."""

_WALKING = ("navigate", "path", "walk", "go_to", "goto", "move_to")
_MAX_SITUATION = 40
_MAX_SNIFFED = 2


def find_trajectory_logs(folder: Path, names: Iterable[str]) -> list[Path]:
    """Return the files of a folder that are trajectory logs, by their first two lines."""
    return [folder / name for name in sorted(names) if name.lower().endswith(LOG_FILES) and _is_log(folder / name)]


def name_trajectory_log(path: Path) -> Path:
    """Return a path that ends in the session's name: the log's folder where the log has a generic name."""
    path = path.absolute()
    return path.parent if path.stem.lower() in GENERIC_NAMES else path.with_suffix("")


def read_trajectory_log(path: Path) -> Session:
    """Read a log. A turn is one line with an action; a first line without one may give goal and model.

    The turn's number is the step's or, where these do not count upwards in all lines, its place among the lines with
    steps.

    Raises:
        OSError: it cannot be read.
    """
    records, problems = read_json_lines(path, name=path.name)
    head: Mapping[str, Any] = records[0] if records and isinstance(records[0], dict) else {}
    if head and _find_action(head) is None:
        records = records[1:]
    steps = [_find(record, _STEP) if isinstance(record, dict) else None for record in records]
    in_order = _count_upwards(steps)
    pictures = _Pictures(path.parent, steps)
    turns, last = [], None
    for number, (record, step) in enumerate(zip(records, steps, strict=True), 1):
        decision = _read_step(record, step, head)
        is_back = type(step) is int and last is not None and step <= last
        last = step if type(step) is int else last
        timestamp, time = read_moment(_find(record, _TIME) if isinstance(record, dict) else None)
        frames = pictures.find(record, step, number) if decision.status != "malformed_turn" else ()
        turn = Turn(step if in_order else number, decision, timestamp or None, time, frames, new_start=is_back)
        turns.append(with_frames(turn))
    goal = next((text for record in (head, *records[:1]) if (text := _text(record, _GOAL))), "")
    return build_session(path.parent, goal, turns, problems)


def _is_log(path: Path) -> bool:
    """Return whether one of the first lines is a step with an action and a screenshot, or pictures are next to it."""
    records = []
    with open(path, "rb") as file:
        for _, line in zip(range(_MAX_SNIFFED), file, strict=False):
            try:
                records.append(json.loads(line))
            except (ValueError, RecursionError):
                return False
    has_pictures = any((path.parent / name).is_dir() for name in PICTURE_FOLDERS)
    return any(
        isinstance(record, dict)
        and _find(record, _STEP) is not None
        and _find_action(record) is not None
        and (has_pictures or _find(record, _SCREENSHOT) is not None)
        for record in records
    )


def _count_upwards(steps: Sequence[Any]) -> bool:
    numbers = [step for step in steps if type(step) is int and 0 <= step < MAX_TURN]
    return len(numbers) == len(steps) and all(before < after for before, after in itertools.pairwise(numbers))


def _read_step(record: Any, step: Any, head: Mapping[str, Any]) -> Decision:
    if not isinstance(record, dict):
        return Decision("malformed_turn", problem="not a JSON object")
    if type(step) is not int:
        problem = "no step" if step is None else f"step {str(step)[:60]!r} is not a whole number"
        return Decision("malformed_turn", problem=clean_text(problem))
    action = _find_action(record)
    if action is None:
        return Decision("malformed_turn", problem="no action")
    try:
        presses, walked, reasons = _read_action(action)
    except ValueError as error:
        return Decision("malformed_turn", problem=clean_text(str(error)))
    model = _text(record, ("model", "model_name")) or _text(head, ("model", "model_name"))
    by = record.get("decided_by") or record.get("by") or (f"model:{model}" if model else "model")
    situation = _text(record, _SITUATION)
    decision = decide(
        presses,
        by=by,
        reasoning=" ".join(reasons) or _text(record, _REASONING),
        situation=situation if len(situation) <= _MAX_SITUATION else "",
    )
    outcome = record.get("outcome")
    if walked:
        return replace(decision, status="pathfinding", pressed=())
    if decision.status == "decision" and isinstance(outcome, dict) and outcome.get("success") is False:
        return replace(decision, status="action_failed", pressed=())
    return decision


def _read_action(action: Any) -> tuple[tuple[str, ...], bool, list[str]]:
    """Return the presses of an action, whether it walked before the first of them, and its tool calls' reasons."""
    calls = list(_tool_calls(action))
    if not calls:
        is_empty = isinstance(action, dict) and not any(key in action for key in BUTTON_KEYS)
        return (() if is_empty else read_presses(action)), False, []
    presses: tuple[str, ...] = ()
    reasons = []
    for name, arguments in calls:
        if any(word in name for word in _WALKING):
            return presses, not presses, reasons  # what follows was chosen from a screen that is not recorded
        if "press" in name or "button" in name:
            presses += read_presses(arguments)
            reasons += [arguments[key] for key in _REASONING if isinstance(arguments.get(key), str)][:1]
    return presses, False, reasons


def _tool_calls(action: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the lower-cased name and the arguments of each tool call, as PokéAgent, Anthropic or OpenAI write them."""
    if isinstance(action, dict) and isinstance(action.get("tool_calls"), list):
        action = action["tool_calls"]
    for call in action if isinstance(action, list) else [action]:
        call = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            continue
        arguments = next((call[key] for key in ("args", "arguments", "input") if key in call), {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                arguments = {}
        yield call["name"].lower(), arguments if isinstance(arguments, dict) else {}


def _find(record: dict[str, Any], keys: Sequence[str], *, without: Sequence[str] = _AFTER) -> Any:
    """Return the value of the first of `keys` in an object or in those within it, the least deep first."""
    level = [record]
    while level:
        for key in keys:
            for part in level:
                if part.get(key) is not None:
                    return part[key]
        level = [
            value for part in level for key, value in part.items() if isinstance(value, dict) and key not in without
        ]
    return None


def _find_action(record: dict[str, Any]) -> Any:
    return _find(record, _ACTION, without=_AFTER + _SEEN)


def _text(record: Any, keys: Sequence[str]) -> str:
    found = _find(record, keys) if isinstance(record, dict) else None
    return clean_text(found).strip()


class _Pictures:
    """The pictures of a log's steps: in the line, in a file that it names, or in a file named after the step."""

    def __init__(self, folder: Path, steps: Sequence[Any]) -> None:
        self.folder = folder
        self.by_step: dict[int, Path] = {}
        for name in PICTURE_FOLDERS:
            for path in sorted((folder / name).iterdir()) if (folder / name).is_dir() else []:
                if path.suffix.lower() in PICTURES and (match := re.search(r"(\d+)\D*$", path.stem)):
                    self.by_step.setdefault(int(match[1]), path)
        # A run that was resumed writes the picture of a repeated step again: only the last line shows it.
        self.last_line = {step: number for number, step in enumerate(steps, 1) if type(step) is int}

    def find(self, record: dict[str, Any], step: int, number: int) -> tuple[str | Path, ...]:
        shown = _find(record, _SCREENSHOT)
        if isinstance(shown, dict):
            shown = next((shown[key] for key in ("base64", "data", "path", "url") if shown.get(key)), None)
        if isinstance(shown, str) and shown:
            is_path = shown.lower().endswith(PICTURES) and not shown.startswith("data:")
            path = self._named(shown) if is_path else None
            return (path,) if path else () if is_path else (shown,)
        path = self.by_step.get(step)
        return (path,) if path and self.last_line[step] == number else ()

    def _named(self, name: str) -> Path | None:
        last = PurePath(name.replace("\\", "/")).name
        return find_inside(self.folder, (name, *(f"{place}/{last}" for place in PICTURE_FOLDERS), last))
