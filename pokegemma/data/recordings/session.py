"""A recorded session, whatever recorded it: turns with a picture, what was pressed, and the label."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pokegemma.data.copies import Fingerprint, take_fingerprint
from pokegemma.data.decisions import DECISION, Decision, clean_text, correct
from pokegemma.data.recordings.corrections import Correction
from pokegemma.errors import PokegemmaError

MAX_TURN = 10**9
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
"""Suffixes of pictures, in lower case."""


class SessionError(PokegemmaError):
    """A session that cannot be read as a whole."""


@dataclass(frozen=True)
class Turn:
    """One logged turn.

    `number` is the turn as logged, None where that is unusable. `decision.status` is whether it can be a sample.
    `frames` are pictures of the screen before the decision, the best first: base64 text of the raw frame, or a file.
    `new_start`: the turn continues no earlier one (a loaded state), so its window and its earlier buttons begin here.
    """

    number: int | None
    decision: Decision
    timestamp: str | None
    time: datetime | None
    frames: tuple[str | Path, ...]
    new_start: bool = False


@dataclass(frozen=True)
class Session:
    """One recording: every logged turn in order.

    `numbering` is how step files were matched (`screenshot_numbers.Numbering.rule`). `missing_picture` is the name of
    the picture that the first decision without one should have. `problems` names what is damaged and was read in part.
    """

    folder: Path
    goal: str
    turns: tuple[Turn, ...]
    numbering: str
    fingerprint: Fingerprint
    missing_picture: str | None = None
    problems: tuple[str, ...] = ()


def correct_session(session: Session, corrections: Mapping[int, Correction]) -> Session:
    """Return a session with the labels of corrections, by turn number; one without its turn is named in `problems`."""
    turns = tuple(
        correct_turn(turn, corrections[turn.number]) if turn.number in corrections else turn for turn in session.turns
    )
    unused = sorted(set(corrections) - {turn.number for turn in session.turns})
    problems = [f"{session.folder.name} turn {number}: corrected, but there is no such turn" for number in unused]
    return dataclasses.replace(session, turns=turns, problems=(*session.problems, *problems))


def correct_turn(turn: Turn, correction: Correction) -> Turn:
    """Return a turn with the label of a correction; without a picture it is no sample all the same."""
    return with_frames(dataclasses.replace(turn, decision=correct(turn.decision, correction)))


def read_time(timestamp: str) -> datetime | None:
    """Return the time of an ISO 8601 text, None for any other text."""
    try:
        return datetime.fromisoformat(timestamp)
    except ValueError:
        return None


def find_inside(folder: Path, names: Sequence[str]) -> Path | None:
    """Return the first of some paths, relative to a folder, that is a file inside it; None if there is none."""
    root = folder.resolve()
    for name in names:
        try:
            path = folder / name
            if path.is_file() and path.resolve().is_relative_to(root):
                return path
        except (OSError, ValueError):  # a name that is too long, or has a NUL byte
            continue
    return None


def with_frames(turn: Turn) -> Turn:
    """Return a turn that, as a decision without a picture, counts as `frame_missing`."""
    if turn.decision.status != DECISION or turn.frames:
        return turn
    return dataclasses.replace(turn, decision=dataclasses.replace(turn.decision, status="frame_missing"))


def build_session(folder: Path, goal: str, turns: Sequence[Turn], problems: Sequence[str]) -> Session:
    """Return the session of another recorder than Eevee v1, with a line for buttons that are none of the eight."""
    known = [
        {"timestamp": turn.timestamp, "button_presses": turn.decision.pressed, "ai_analysis": turn.decision.reasoning}
        for turn in turns
    ]
    dated = any(turn.time for turn in turns)
    fingerprint = take_fingerprint(session_id=None, start=None, goal=goal, raw_turns=known, dated=dated)
    wrong = Counter(turn.decision.chosen for turn in turns if turn.decision.status == "invalid_button")
    if wrong:
        names = ", ".join(f"{clean_text(name)[:20]} ({count})" for name, count in sorted(wrong.items())[:8])
        problems = [
            *problems,
            f"{folder.name}: {wrong.total()} turns press first what is none of the 8 buttons: {names}",
        ]
    return Session(folder, goal, tuple(turns), "none", fingerprint, None, tuple(problems))
