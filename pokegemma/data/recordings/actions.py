"""How the actions of other recorders become decisions: one rule for all of them (docs/recordings.md).

1. Buttons that were pressed one after the other from one screen stay in their order. Buttons that were pressed together
   are ordered as `prompts.BUTTONS`, directions first.
2. The first press is the label; all presses count as pressed. How long a button was held does not matter.
3. A button that was already held on the row before is not pressed again. A row that presses nothing is no decision. If
   it is less than `HELD_S` after the row before, no sample shows its frame.
"""

import re
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any

from pokegemma.data.decisions import DECISION, Decision, clean_text
from pokegemma.data.prompts import BUTTONS
from pokegemma.data.recordings.corrections import is_blind, is_labeller
from pokegemma.data.recordings.session import read_time

HELD_S = 0.05
"""Rows closer than this are of one press: 3 frames of the game, faster than anybody presses a button twice."""

BUTTON_KEYS = ("buttons", "button", "button_presses", "presses", "keys", "actions", "action")
_NOTHING = ("", "none", "noop", "no_op", "wait", "nothing")
_EPOCH = datetime(1970, 1, 1)


def read_presses(value: Any) -> tuple[str, ...]:
    """Return the names of the buttons of an action in the order in which they count, lower-cased.

    Args:
        value: "up"; "up up a" or "up, a" (one after the other); "b+right" (together); a list of these; an object with
            one of `BUTTON_KEYS`; a list in a list (together); None.

    Raises:
        ValueError: it is none of these.
    """
    if value is None:
        return ()
    if isinstance(value, str):
        parts = [_together(part.split("+")) for part in re.split(r"[\s,;]+", value.replace(" + ", "+").strip())]
        return tuple(name for part in parts for name in part)
    if isinstance(value, dict):
        key = next((key for key in BUTTON_KEYS if key in value), None)
        if key is None:
            raise ValueError(f"no button in {str(value)[:60]!r}")
        return read_presses(value[key])
    if not isinstance(value, list):
        raise ValueError(f"{str(value)[:60]!r} is not a button")
    presses: list[str] = []
    for part in value:
        presses += _together(read_presses(part)) if isinstance(part, list) else read_presses(part)
    return tuple(presses)


def _together(names: Iterable[str]) -> list[str]:
    cleaned = [name.strip().lower() for name in names]
    order = {name: place for place, name in enumerate(BUTTONS)}
    return sorted((name for name in cleaned if name not in _NOTHING), key=lambda name: order.get(name, len(BUTTONS)))


def is_continued(before: datetime | None, now: datetime | None) -> bool:
    """Return whether a row follows the one before so closely that the same button is still held."""
    if before is None or now is None or (before.tzinfo is None) != (now.tzinfo is None):
        return False
    return timedelta(0) <= now - before < timedelta(seconds=HELD_S)


def decide(
    presses: tuple[str, ...],
    *,
    already_held: Iterable[str] = (),
    by: Any = None,
    reasoning: Any = None,
    situation: Any = None,
) -> Decision:
    """Return the decision of one row: its presses without those of `already_held`.

    Args:
        by: who decided, as `decided_by` in a recorded turn; None if that is not known.
        reasoning, situation: texts; anything else counts as none.
    """
    if by is not None and not is_labeller(by) and not is_blind(by):
        return Decision("malformed_turn", problem=clean_text(f"by {str(by)[:60]!r} is unknown"))
    new = tuple(name for name in presses if name not in set(already_held))
    pressed = tuple(name for name in new if name in BUTTONS)
    if not new:
        return Decision("held" if presses else "no_button", label_by=by)
    status = DECISION if new[0] in BUTTONS else "invalid_button"
    return Decision(
        "blind_press" if by is not None and is_blind(by) else status,
        pressed=pressed,
        reasoning=clean_text(reasoning).strip(),
        situation=clean_text(situation).strip() or "unknown",
        label=new[0] if status == DECISION else "",
        chosen=new[0],
        label_by=by,
    )


def read_moment(value: Any) -> tuple[str, datetime | None]:
    """Return a time as it is recorded and as a time: ISO 8601, or a number of seconds from any start."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return clean_text(value), read_time(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "", None
    try:
        return str(value), _EPOCH + timedelta(seconds=value)
    except (OverflowError, ValueError):
        return str(value), None
