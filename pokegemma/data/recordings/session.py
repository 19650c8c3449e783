"""A recorded session, whatever recorded it: turns with a picture, what was pressed, and the label."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pokegemma.data.copies import Fingerprint
from pokegemma.data.decisions import DECISION, Decision, correct
from pokegemma.data.recordings.corrections import Correction
from pokegemma.errors import PokegemmaError


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
    decision = correct(turn.decision, correction)
    status = DECISION if turn.frames else "frame_missing"
    return dataclasses.replace(turn, decision=dataclasses.replace(decision, status=status))


def read_time(timestamp: str) -> datetime | None:
    """Return the time of an ISO 8601 text, None for any other text."""
    try:
        return datetime.fromisoformat(timestamp)
    except ValueError:
        return None
