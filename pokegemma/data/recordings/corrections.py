"""Who decided a recorded turn, and corrections: labels that somebody wrote afterwards."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pokegemma.data.prompts import BUTTONS
from pokegemma.errors import PokegemmaError

LABELLERS = ("human", "expert", "model")
"""Who may give a label, as it is or with a name behind a colon: "human", "human:anna", "model:outputs/merged"."""

BLIND_PLAYERS = ("random", "repeat", "noise", "stuck")
"""What pressed a button without looking at the screen: such a turn is a sample only with a correction.

random and repeat are players; noise replaces some of a player's presses; stuck drew another button because the screen
had not changed.
"""


@dataclass(frozen=True)
class Correction:
    """The right button of a recorded turn; `by` is one of `LABELLERS`, with or without a name.

    `button` None rejects the turn: nothing is to be learned from it, though later turns still show it. The answer's
    reasoning is `reasoning`. Without one, the player's is kept only if `button` is what it had chosen.
    """

    button: str | None
    by: str
    reasoning: str | None = None

    def __post_init__(self) -> None:
        if self.button is not None and self.button not in BUTTONS:
            raise ValueError(f"correction.button {self.button!r} is not one of {', '.join(BUTTONS)}")
        if not is_labeller(self.by):
            raise ValueError(f"correction.by {self.by!r} is not {', '.join(LABELLERS)} or one of these with :NAME")

    def to_record(self) -> dict[str, str | None]:
        """Return the correction as a recorded turn contains it."""
        return {name: value for name, value in asdict(self).items() if name == "button" or value is not None}


def is_labeller(name: object) -> bool:
    """Return whether a label may be by `name`."""
    return isinstance(name, str) and name.partition(":")[0] in LABELLERS


def is_blind(name: object) -> bool:
    """Return whether `name` is one of `BLIND_PLAYERS`, with or without a name behind a colon."""
    return isinstance(name, str) and name.partition(":")[0] in BLIND_PLAYERS


def read_correction(value: Any) -> Correction:
    """Return the correction of a recorded turn: an object with button and by; reasoning may follow.

    Raises:
        ValueError: it is not such an object; the message is one line.
    """
    if not isinstance(value, dict):
        raise ValueError(f"correction is not an object: {str(value)[:60]!r}")
    if missing := [name for name in ("button", "by") if name not in value]:
        raise ValueError(f"correction without {' and '.join(missing)}")
    if unknown := sorted(set(value) - {"button", "by", "reasoning"}):
        raise ValueError(f"correction with unknown key {unknown[0]!r}")
    reasoning = value.get("reasoning")
    if reasoning is not None and not isinstance(reasoning, str):
        raise ValueError(f"correction.reasoning is not a text: {str(reasoning)[:60]!r}")
    return Correction(value["button"], value["by"], reasoning)


def read_corrections(path: Path) -> dict[str, dict[int, Correction]]:
    """Read a file of corrections, one a line; return them by session and turn. Of two for one turn the later counts.

    Example:
        {"session": "session_20261129_190000", "turn": 17, "button": "left", "by": "human:anna"}

    Raises:
        PokegemmaError: the file cannot be read, or a line is not a correction; all such lines are counted.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PokegemmaError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    corrections: dict[str, dict[int, Correction]] = {}
    problems = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            session, turn = _read_place(record)
            rest = {key: value for key, value in record.items() if key not in ("session", "turn")}
            corrections.setdefault(session, {})[turn] = read_correction(rest)
        except (ValueError, RecursionError) as error:
            problems.append(f"line {number}: {' '.join(str(error).split())}")
    if problems:
        raise PokegemmaError(f"{path}: {len(problems)} lines are not corrections: {'; '.join(problems[:5])}")
    return corrections


def _read_place(record: Any) -> tuple[str, int]:
    session, turn = (record.get("session"), record.get("turn")) if isinstance(record, Mapping) else (None, None)
    if not isinstance(session, str) or not session:
        raise ValueError("it does not name a session")
    if type(turn) is not int:
        raise ValueError(f"turn {turn!r} is not a whole number")
    return session, turn
