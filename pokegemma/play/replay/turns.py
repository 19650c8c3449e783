"""What a replay shows of recorded sessions: screens, presses, mistakes, and where the player was stuck."""

import base64
import hashlib
import io
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from pokegemma.data.eevee_v1.sessions import read_record
from pokegemma.data.frame_pictures import FrameError, read_frame, read_recorded
from pokegemma.data.prompts import BUTTONS
from pokegemma.data.recordings.readers import EEVEE_V1, Recording
from pokegemma.data.recordings.session import Turn

_STUCK_WINDOW, _STUCK_TIMES = 32, 3
"""A turn is stuck where its button was pressed on the same screen this often within this many turns."""

_NUM_COLOURS = 128


@dataclass(frozen=True)
class ReplayTurn:
    """One turn of a replay.

    Attributes:
        screen: key of its picture in `ReplaySession.screens`; None where the picture is missing or damaged.
        pressed: the buttons, in order.
        chosen: what the player had chosen.
        right: the label of a correction or of an expert; None where nobody said.
        probabilities: of `BUTTONS` in percent; None without any.
    """

    number: int | None
    screen: str | None
    pressed: tuple[str, ...]
    chosen: str
    right: str | None
    decided_by: str
    reasoning: str
    situation: str
    time: str
    probabilities: tuple[int, ...] | None
    is_stuck: bool

    @property
    def is_mistake(self) -> bool:
        """Whether another button was right."""
        return self.right is not None and self.pressed[:1] != (self.right,)


@dataclass(frozen=True)
class ReplaySession:
    """A session of a replay; `screens` are PNG pictures as base64, by their key."""

    name: str
    goal: str
    turns: tuple[ReplayTurn, ...]
    screens: dict[str, str]


def read_replay(recording: Recording) -> ReplaySession:
    """Read a recorded session of any reader, also while it is being recorded.

    Raises:
        SessionError: it cannot be read.
    """
    session = recording.read()
    raw_turns: Sequence[Any] = [{}] * len(session.turns)
    if recording.reader is EEVEE_V1:  # probabilities are only in the record
        record, _ = read_record(recording.path)
        raw_turns = record.get("turns") or record.get("gameplay_history") or []
    screens: dict[str, str] = {}
    keys = [_store_screen(turn, screens) for turn in session.turns]
    stuck = find_stuck(keys, [turn.decision.pressed[:1] for turn in session.turns])
    turns = tuple(
        _replay_turn(turn, raw if isinstance(raw, dict) else {}, key, is_stuck=is_stuck)
        for turn, raw, key, is_stuck in zip(session.turns, raw_turns, keys, stuck, strict=True)
    )
    return ReplaySession(recording.named_path.resolve().name, session.goal, turns, screens)


def find_stuck(screens: Sequence[str | None], pressed: Sequence[tuple[str, ...]]) -> list[bool]:
    """Return for each turn whether its button was pressed three times on its screen within 32 turns, itself included.

    All turns from the first of these presses on are marked, so that a loop over several screens is one stretch.
    """
    stuck = [False] * len(screens)
    recent: deque[tuple[int, tuple[str | None, tuple[str, ...]]]] = deque(maxlen=_STUCK_WINDOW)
    for at, place in enumerate(zip(screens, pressed, strict=True)):
        recent.append((at, place))
        counts = Counter(other for _, other in recent)
        if place[0] is not None and place[1] and counts[place] >= _STUCK_TIMES:
            first = next(number for number, other in recent if other == place)
            stuck[first : at + 1] = [True] * (at + 1 - first)
    return stuck


def _replay_turn(turn: Turn, raw: dict[str, Any], screen: str | None, *, is_stuck: bool) -> ReplayTurn:
    decision = turn.decision
    values = raw.get("probabilities")
    probabilities = None
    if isinstance(values, dict) and all(isinstance(values.get(name), int | float) for name in BUTTONS):
        probabilities = tuple(round(100 * values[name]) for name in BUTTONS)
    labelled = decision.label_by is not None and decision.label_by.partition(":")[0] in ("human", "expert")
    return ReplayTurn(
        number=turn.number,
        screen=screen,
        pressed=decision.pressed,
        chosen=decision.chosen or "",
        right=decision.label if labelled and decision.label in BUTTONS else None,
        decided_by=str(raw.get("decided_by") or decision.label_by or ""),
        reasoning=decision.reasoning,
        situation=decision.situation,
        time=turn.timestamp or "",
        probabilities=probabilities,
        is_stuck=is_stuck,
    )


def _store_screen(turn: Turn, screens: dict[str, str]) -> str | None:
    """Add a turn's picture to `screens` with few colours, and return its key; None if none decodes."""
    for source in turn.frames:
        try:
            tile = read_frame(read_recorded(source)).tile
        except FrameError:
            continue
        key = hashlib.sha256(tile.tobytes()).hexdigest()[:16]
        if key not in screens:
            buffer = io.BytesIO()
            Image.fromarray(tile).quantize(_NUM_COLOURS, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
            screens[key] = base64.b64encode(buffer.getvalue()).decode("ascii")
        return key
    return None
