"""Convert one recorded session into samples (docs/format_spec.md)."""

import base64
import collections
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import numpy as np

from pokegemma.data import prompts
from pokegemma.data.checks.still_pictures import find_still
from pokegemma.data.copies import Fingerprint, FrameHash
from pokegemma.data.decisions import DECISION, REASONS, clean_text
from pokegemma.data.eevee_v1.named_pictures import NamedPictures
from pokegemma.data.eevee_v1.sessions import read_session
from pokegemma.data.frame_pictures import FrameError, read_frame
from pokegemma.data.grids import GridEncoder
from pokegemma.data.recordings.corrections import Correction
from pokegemma.data.recordings.session import Session, Turn, correct_session
from pokegemma.data.samples import Sample, find_control_token

MAX_FRAME_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class WindowOptions:
    """Which frames a sample shows: up to `num_frames`, the last of them the target turn's.

    If there are fewer than `min_frames`, the first is repeated. A new window starts after a pause of more than
    `max_gap_s` seconds between two frames.
    """

    num_frames: int = 4
    min_frames: int = 4
    max_gap_s: float = 30.0
    grid_images: bool = True


@dataclass
class SessionResult:
    """The result of one session. Every turn is counted once, as a sample or under its reason.

    `labellers` has the number of samples by who gave the label, where the recording states it.

    `pictures` are the turns' frames, None where there is none. `missing_picture` is the name of the picture that the
    first decision without one should have. `outside_pictures` are those that are not in the session's folder.
    """

    session: str
    folder: str
    fingerprint: Fingerprint
    numbering: str = "none"
    num_turns: int = 0
    num_corrected: int = 0
    num_samples: int = 0
    num_frames: int = 0
    goal_shortened: bool = False
    reasons: dict[str, int] = field(default_factory=dict)
    buttons: dict[str, int] = field(default_factory=dict)
    labellers: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    pictures: list[FrameHash | None] = field(default_factory=list)
    missing_picture: str | None = None
    outside_pictures: list[Path] = field(default_factory=list)


@dataclass
class _Shown:
    """A turn's frame: in memory while a window may show it, on disk once a sample does."""

    turn: int
    path: str
    png: bytes
    tile: np.ndarray
    stored: bool = False


class SessionConverter:
    """Write one session's samples, frames and grid pictures under `output`, with one window of frames in memory."""

    def __init__(self, session: Session, session_id: str, *, output: Path, options: WindowOptions) -> None:
        self.session, self.id, self.output, self.options = session, session_id, output, options
        goal = " ".join(session.goal.split())
        self.context = prompts.build_context(goal)
        self.result = SessionResult(
            session_id, clean_text(session.folder.name), session.fingerprint, session.numbering, len(session.turns)
        )
        self.result.missing_picture = session.missing_picture
        self.result.outside_pictures = [
            frame
            for turn in session.turns
            for frame in turn.frames
            if isinstance(frame, Path) and not frame.is_relative_to(session.folder)
        ]
        self.result.goal_shortened = goal not in self.context
        self.result.problems += session.problems
        if session.numbering == "ambiguous":
            self.result.problems.append(
                f"{self.result.folder}: screenshots cannot be matched to all turns (some are missing, and turn numbers "
                "have gaps); turns whose screenshot is uncertain have none"
            )
        self.previous: collections.deque[str] = collections.deque(maxlen=prompts.MAX_PREVIOUS_BUTTONS)
        self.window: collections.deque[_Shown] = collections.deque(maxlen=options.num_frames)
        self.last_time: datetime | None = None
        self.shown_since = 0  # frames without a usable time after the one of `last_time`
        self.grid_encoder = GridEncoder()
        self.buttons: collections.Counter[str] = collections.Counter()
        self.reasons: collections.Counter[str] = collections.Counter()
        self.labellers: collections.Counter[str] = collections.Counter()
        self.decisions: list[tuple[int, FrameHash, str]] = []

    def convert(self) -> Iterator[Sample]:
        """Yield the session's samples in turn order, each after its pictures are written; then `result` is complete."""
        for turn in self.session.turns:
            if turn.new_start:
                self.window.clear()
                self.previous.clear()
            if turn.decision.problem:
                self.result.problems.append(f"{self.result.folder} turn {turn.number}: {turn.decision.problem}")
            shown = self._show(turn)
            self.result.pictures.append(shown)
            status = turn.decision.status
            if status in (DECISION, "frame_missing") and self._spells_control_token(turn):
                status = "control_token"
            if status == DECISION and not shown:
                status = "frame_unreadable"
            if status == DECISION:
                self.buttons[turn.decision.label] += 1
                self.decisions.append((turn.number, shown, turn.decision.label))
                self.result.num_corrected += turn.decision.is_corrected
                if turn.decision.label_by is not None:
                    self.labellers[turn.decision.label_by] += 1
                yield self._sample(turn)
            else:
                self.reasons[status] += 1
            self.previous.extend(turn.decision.pressed)
        self.result.problems += [f"{self.result.folder} {still.describe()}" for still in find_still(self.decisions)]
        self.result.num_samples = self.buttons.total()
        self.result.buttons = {name: self.buttons[name] for name in prompts.BUTTONS if self.buttons[name]}
        self.result.labellers = dict(sorted(self.labellers.items()))
        self.result.reasons = {name: self.reasons[name] for name in REASONS if self.reasons[name]}

    def _spells_control_token(self, turn: Turn) -> bool:
        if token := find_control_token(self.context):
            problem = f"{self.result.folder}: its goal contains {token}, a control token of the model"
            if problem not in self.result.problems:
                self.result.problems.append(problem)
        elif token := find_control_token(_write_output(turn)):
            self.result.problems.append(
                f"{self.result.folder} turn {turn.number}: its answer contains {token}, a control token of the model"
            )
        return token is not None

    def _show(self, turn: Turn) -> FrameHash | None:
        """Append the turn's frame to the window (emptied after a long pause); return it, None if none decodes."""
        for source in turn.frames:
            try:
                frame = read_frame(_read_bytes(source))
            except FrameError as error:
                name = "its raw frame" if isinstance(source, str) else source.name
                self.result.problems.append(f"{self.result.folder} turn {turn.number}: {name} unreadable: {error}")
                continue
            self.shown_since += 1
            if _is_gap(self.last_time, turn.time, max_gap_s=self.options.max_gap_s * self.shown_since):
                self.window.clear()
            if turn.time is not None:
                self.last_time, self.shown_since = turn.time, 0
            self.window.append(_Shown(turn.number, f"frames/{self.id}/{turn.number:04d}.png", frame.png, frame.tile))
            return FrameHash.of(frame.png, raw=isinstance(source, str))
        return None

    def _sample(self, turn: Turn) -> Sample:
        window = list(self.window)
        window = [window[0]] * (self.options.min_frames - len(window)) + window
        for shown in self.window:
            if not shown.stored:
                (self.output / shown.path).write_bytes(shown.png)
                shown.stored, shown.png = True, b""
                self.result.num_frames += 1
        image = None
        if self.options.grid_images:
            image = f"grid_images/{self.id}_{turn.number:04d}.png"
            (self.output / image).write_bytes(self.grid_encoder.encode([shown.tile for shown in window]))
        decision, previous = turn.decision, list(self.previous)
        recorded = {} if decision.label_by is None else {"label_by": decision.label_by}
        recorded |= {"corrected": True} if decision.is_corrected else {}
        recorded |= {"new_start": True} if turn.new_start else {}
        return Sample(
            id=f"{self.id}/{turn.number}",
            frames=tuple(shown.path for shown in window),
            image=image,
            context=self.context,
            question=prompts.build_question(previous),
            output=_write_output(turn),
            metadata={
                "session": self.id,
                "turn": turn.number,
                "goal": self.session.goal,
                "buttons": list(decision.pressed),
                "previous_buttons": previous,
                "situation": decision.situation,
                "timestamp": turn.timestamp,
                "template": decision.template,
                "confidence": decision.confidence,
                "frame_turns": [shown.turn for shown in window],
                **recorded,
            },
        )


def convert_session(
    folder: Path,
    session_id: str,
    *,
    shard: Path,
    output: Path,
    options: WindowOptions,
    named_pictures: NamedPictures | None = None,
    corrections: Mapping[int, Correction] | None = None,
    cancelled: Callable[[], bool] = lambda: False,
) -> SessionResult:
    """Convert one session folder: pictures under `output`, samples into the JSONL file `shard`.

    Args:
        corrections: labels by turn number, which replace those of the recording.

    Raises:
        SessionError: the session cannot be read; nothing was written.
        OSError: `output` cannot be written.
        KeyboardInterrupt: `cancelled()` became true.
    """
    session = correct_session(read_session(folder, pictures=named_pictures), corrections or {})
    converter = SessionConverter(session, session_id, output=output, options=options)
    for folder in (output / "frames", output / "frames" / session_id):  # not `output`: it may have been removed
        folder.mkdir(exist_ok=True)
    if options.grid_images:
        (output / "grid_images").mkdir(exist_ok=True)
    with open(shard, "w", encoding="utf-8") as file:
        for sample in converter.convert():
            file.write(sample.to_json() + "\n")
            if cancelled():
                raise KeyboardInterrupt
    return converter.result


def _write_output(turn: Turn) -> str:
    decision = turn.decision
    return prompts.build_output(button=decision.label, reasoning=decision.reasoning, context=decision.situation)


def _read_bytes(source: str | Path) -> bytes:
    if isinstance(source, str):
        source = re.sub(r"^\s*data:image/[\w.+-]+;base64,", "", source, flags=re.IGNORECASE)
        try:
            return base64.b64decode("".join(source.split()), validate=True)
        except ValueError as error:
            raise FrameError("not base64") from error
    try:
        status = source.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_FRAME_BYTES:
            raise FrameError("not a file, or too large for a screenshot")
        return source.read_bytes()
    except OSError as error:
        raise FrameError(error.strerror or "cannot be read") from error


def _is_gap(last: datetime | None, now: datetime | None, *, max_gap_s: float) -> bool:
    """Return whether more than `max_gap_s` passed; times with and without a time zone are compared without it."""
    if last is None or now is None:
        return False
    if (last.tzinfo is None) != (now.tzinfo is None):
        last, now = last.replace(tzinfo=None), now.replace(tzinfo=None)
    return abs((now - last).total_seconds()) > max_gap_s
