"""Who decided a recorded turn, and corrections: labels that somebody wrote afterwards."""

from dataclasses import asdict, dataclass
from typing import Any

from pokegemma.data.prompts import BUTTONS

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

    The answer's reasoning is `reasoning`. Without one, the player's is kept only if `button` is what it had chosen.
    """

    button: str
    by: str
    reasoning: str | None = None

    def __post_init__(self) -> None:
        if self.button not in BUTTONS:
            raise ValueError(f"correction.button {self.button!r} is not one of {', '.join(BUTTONS)}")
        if not is_labeller(self.by):
            raise ValueError(f"correction.by {self.by!r} is not {', '.join(LABELLERS)} or one of these with :NAME")

    def to_record(self) -> dict[str, str]:
        """Return the correction as a recorded turn contains it."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def is_labeller(name: object) -> bool:
    """Return whether a label may be by `name`."""
    return isinstance(name, str) and name.partition(":")[0] in LABELLERS


def is_blind(name: str) -> bool:
    """Return whether `name` is one of `BLIND_PLAYERS`, with or without a name behind a colon."""
    return name.partition(":")[0] in BLIND_PLAYERS


def read_correction(value: Any) -> Correction:
    """Return a correction of a recorded turn or of a file: an object with button, by and, if it likes, reasoning.

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
