"""A turn with what was on the screen: the unit that the converter and the inspection page read a session in."""

import hashlib
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from pokegemma.data.copies import FrameHash
from pokegemma.data.decisions import DECISION
from pokegemma.data.recordings.session import Turn


@dataclass
class ShownFrame:
    """A turn's frame: in memory while a window may show it, on disk (`stored`) once a sample does."""

    turn: int
    path: str
    png: bytes
    tile: np.ndarray
    hash: FrameHash
    stored: bool = False


@dataclass(frozen=True)
class ShownTurn:
    """A turn with what its player saw and had pressed.

    `status` is DECISION or why the turn is not a sample. `frame` is None where no picture decodes; it is the last one
    of `window`. `previous` are the buttons pressed before, oldest first. `start_turn` is the last turn up to this one
    that has `new_start`, None where there is none.
    """

    turn: Turn
    status: str
    frame: ShownFrame | None
    window: tuple[ShownFrame, ...]
    previous: tuple[str, ...]
    start_turn: int | None = None

    def shows_same(self, other: "ShownTurn | None") -> bool:
        """Return whether both turns have a frame, and these have equal pixels."""
        if other is None or self.frame is None or other.frame is None:
            return False
        return self.frame.hash == other.frame.hash or np.array_equal(self.frame.tile, other.frame.tile)


def has_no_effect(shown: ShownTurn, after: ShownTurn | None) -> bool:
    """Return whether the label of a decision was pressed, and `after`, the turn that follows, shows the same screen.

    Without a frame of the turn that follows, or after another game state was loaded, the effect is unknown.
    """
    decision = shown.turn.decision
    is_pressed = decision.pressed[:1] == (decision.label,)
    return is_pressed and after is not None and not after.turn.new_start and shown.shows_same(after)


def is_repeat_of(shown: ShownTurn, before: ShownTurn) -> bool:
    """Return whether two decisions have the same label and show the same screen."""
    return before.turn.decision.label == shown.turn.decision.label and shown.shows_same(before)


class TurnFilter:
    """Find decisions that options leave out. `judge` is called once for every decision of a session, in order."""

    def __init__(
        self, *, drop_no_effect: bool = False, max_repeats: int | None = None, label_by: Collection[str] = ()
    ) -> None:
        self.drop_no_effect, self.max_repeats, self.label_by = drop_no_effect, max_repeats, label_by
        self._num_equal: Counter[tuple[str, bytes]] = Counter()

    def judge(self, shown: ShownTurn, after: ShownTurn | None) -> str:
        """Return DECISION, or one of `LEFT_OUT`.

        Args:
            after: the turn that follows, whose frame shows what the press did; None after the last one.
        """
        if self.label_by and (shown.turn.decision.label_by or "").partition(":")[0] not in self.label_by:
            return "other_label"
        if self.drop_no_effect and has_no_effect(shown, after):
            return "no_effect"
        if self.max_repeats is not None and shown.frame is not None:
            key = shown.turn.decision.label, hashlib.sha256(shown.frame.tile.tobytes()).digest()
            self._num_equal[key] += 1
            if self._num_equal[key] > self.max_repeats:
                return "repeated"
        return DECISION
