"""Convert one recorded session into samples (docs/format_spec.md)."""

import collections
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from pokegemma.data import prompts
from pokegemma.data.checks.still_pictures import find_still
from pokegemma.data.copies import Fingerprint, FrameHash
from pokegemma.data.decisions import DECISION, LEFT_OUT, REASONS, clean_text
from pokegemma.data.eevee_v1.overlay import Overlay, remove_overlay
from pokegemma.data.frame_pictures import Frame, FrameError, read_frame, read_recorded
from pokegemma.data.grids import GridEncoder
from pokegemma.data.png import encode_png
from pokegemma.data.recordings.session import Session, Turn
from pokegemma.data.samples import Sample, find_control_token
from pokegemma.data.shown_turns import ShownFrame, ShownTurn, TurnFilter


@dataclass(frozen=True)
class WindowOptions:
    """Which frames a sample shows: up to `num_frames`, the last of them the target turn's; and what is left out.

    If there are fewer than `min_frames`, the first is repeated. A new window starts after a pause of more than
    `max_gap_s` seconds between two frames. `drop_no_effect` leaves out decisions after which the screen is the same,
    `max_repeats` all but so many of a session's equal decisions on equal screens, and `label_by`, unless it is empty,
    those whose label is by none of these `corrections.LABELLERS`. What is left out stays in the windows and among the
    earlier buttons of other samples. `remove_overlay` undoes Eevee v1's grid on screenshots.
    """

    num_frames: int = 4
    min_frames: int = 4
    max_gap_s: float = 30.0
    grid_images: bool = True
    drop_no_effect: bool = False
    max_repeats: int | None = None
    label_by: tuple[str, ...] = ()
    remove_overlay: bool = False


@dataclass
class SessionResult:
    """The result of one session. Every turn is counted once, as a sample or under its reason.

    `labellers` has the number of samples by who gave the label, where the recording states it.

    `pictures` are the turns' frames, None where there is none. `overlays` counts screenshots by what was undone on
    them. `missing_picture` is the name of the picture that the first decision without one should have.
    `outside_pictures` are those that are not in the session's folder.
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
    overlays: dict[Overlay, int] = field(default_factory=dict)
    missing_picture: str | None = None
    outside_pictures: list[Path] = field(default_factory=list)

    @property
    def num_left_out(self) -> int:
        """The number of decisions that an option leaves out."""
        return sum(self.reasons.get(reason, 0) for reason in LEFT_OUT)


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
        self.window: collections.deque[ShownFrame] = collections.deque(maxlen=options.num_frames)
        self.last_time: datetime | None = None
        self.shown_since = 0  # frames without a usable time after the one of `last_time`
        self.grid_encoder = GridEncoder()
        self.buttons: collections.Counter[str] = collections.Counter()
        self.reasons: collections.Counter[str] = collections.Counter()
        self.labellers: collections.Counter[str] = collections.Counter()
        self.decisions: list[tuple[int, FrameHash, str]] = []
        self.filter = TurnFilter(
            drop_no_effect=options.drop_no_effect, max_repeats=options.max_repeats, label_by=options.label_by
        )

    def convert(self) -> Iterator[Sample]:
        """Yield the session's samples in turn order, each after its pictures are written; then `result` is complete."""
        for shown, after in itertools.pairwise(itertools.chain(self.read_turns(), [None])):
            self.result.pictures.append(shown.frame and shown.frame.hash)
            decision, status = shown.turn.decision, shown.status
            if status == DECISION:
                self.decisions.append((shown.turn.number, shown.frame.hash, decision.label))
                status = self.filter.judge(shown, after)
            if status == DECISION:
                self.buttons[decision.label] += 1
                self.result.num_corrected += decision.is_corrected
                if decision.label_by is not None:
                    self.labellers[decision.label_by] += 1
                yield self._write_sample(shown)
            else:
                self.reasons[status] += 1
        self.result.problems += [f"{self.result.folder} {still.describe()}" for still in find_still(self.decisions)]
        self.result.num_samples = self.buttons.total()
        self.result.buttons = {name: self.buttons[name] for name in prompts.BUTTONS if self.buttons[name]}
        self.result.labellers = dict(sorted(self.labellers.items()))
        self.result.reasons = {name: self.reasons[name] for name in REASONS if self.reasons[name]}

    def read_turns(self) -> Iterator[ShownTurn]:
        """Yield every turn of the session in order, with its frame and window; write nothing."""
        start_turn = None
        for turn in self.session.turns:
            if turn.new_start:
                self.window.clear()
                self.previous.clear()
                start_turn = turn.number
            if turn.decision.problem:
                self.result.problems.append(f"{self.result.folder} turn {turn.number}: {turn.decision.problem}")
            frame = self._show(turn)
            status = turn.decision.status
            if status in (DECISION, "frame_missing") and self._spells_control_token(turn):
                status = "control_token"
            if status == DECISION and not frame:
                status = "frame_unreadable"
            yield ShownTurn(turn, status, frame, tuple(self.window), tuple(self.previous), start_turn)
            self.previous.extend(turn.decision.pressed)

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

    def _show(self, turn: Turn) -> ShownFrame | None:
        """Append the turn's frame to the window (emptied after a long pause); return it, None if none decodes."""
        for source in turn.frames:
            try:
                frame = read_frame(read_recorded(source))
            except FrameError as error:
                name = "its raw frame" if isinstance(source, str) else source.name
                self.result.problems.append(f"{self.result.folder} turn {turn.number}: {name} unreadable: {error}")
                continue
            if self.options.remove_overlay and isinstance(source, Path):
                frame = self._without_overlay(frame)
            self.shown_since += 1
            if _is_gap(self.last_time, turn.time, max_gap_s=self.options.max_gap_s * self.shown_since):
                self.window.clear()
            if turn.time is not None:
                self.last_time, self.shown_since = turn.time, 0
            path = f"frames/{self.id}/{turn.number:04d}.png"
            frame_hash = FrameHash.of(frame.png, raw=isinstance(source, str))
            self.window.append(ShownFrame(turn.number, path, frame.png, frame.tile, frame_hash))
            return self.window[-1]
        return None

    def _without_overlay(self, frame: Frame) -> Frame:
        tile, overlay = remove_overlay(frame.tile)
        self.result.overlays[overlay] = self.result.overlays.get(overlay, 0) + 1
        return frame if overlay == "none" else Frame(encode_png(tile), tile)

    def _write_sample(self, shown: ShownTurn) -> Sample:
        """Write the pictures that a decision's window needs and that are not written yet; return its sample."""
        sample = self.build_sample(shown)
        for frame in shown.window:
            if not frame.stored:
                (self.output / frame.path).write_bytes(frame.png)
                frame.stored, frame.png = True, b""
                self.result.num_frames += 1
        if sample.image is not None:
            tiles = [frame.tile for frame in self._fill_window(shown)]
            (self.output / sample.image).write_bytes(self.grid_encoder.encode(tiles))
        return sample

    def _fill_window(self, shown: ShownTurn) -> list[ShownFrame]:
        window = list(shown.window)
        return [window[0]] * (self.options.min_frames - len(window)) + window

    def build_sample(self, shown: ShownTurn) -> Sample:
        """Return a decision as a sample, whose pictures may not be written yet."""
        turn, decision = shown.turn, shown.turn.decision
        window, previous = self._fill_window(shown), list(shown.previous)
        recorded = {} if decision.label_by is None else {"label_by": decision.label_by}
        recorded |= {"corrected": True} if decision.is_corrected else {}
        recorded |= {} if shown.start_turn is None else {"start_turn": shown.start_turn}
        return Sample(
            id=f"{self.id}/{turn.number}",
            frames=tuple(frame.path for frame in window),
            image=f"grid_images/{self.id}_{turn.number:04d}.png" if self.options.grid_images else None,
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
                "frame_turns": [frame.turn for frame in window],
                **recorded,
            },
        )


def convert_session(
    session: Session,
    session_id: str,
    *,
    shard: Path,
    output: Path,
    options: WindowOptions,
    cancelled: Callable[[], bool] = lambda: False,
) -> SessionResult:
    """Convert one session: pictures under `output`, samples into the JSONL file `shard`.

    Raises:
        OSError: `output` cannot be written.
        KeyboardInterrupt: `cancelled()` became true.
    """
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


def _is_gap(last: datetime | None, now: datetime | None, *, max_gap_s: float) -> bool:
    """Return whether more than `max_gap_s` passed; times with and without a time zone are compared without it."""
    if last is None or now is None:
        return False
    if (last.tzinfo is None) != (now.tzinfo is None):
        last, now = last.replace(tzinfo=None), now.replace(tzinfo=None)
    return abs((now - last).total_seconds()) > max_gap_s
