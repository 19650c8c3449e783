"""How rooms are played in closed-loop evaluation."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RoomRules:
    """How rooms are played.

    Attributes:
        game: toy: in Python; rom: in mGBA.
        noise: share of the presses that are replaced by another button.
        stuck: after this many presses of one button on one screen, another is drawn; None: never.
        turns_per_expert_turn: an episode ends after this many times the turns that the expert needs without noise.
    """

    level: int = 1
    noise: float = 0.0
    game: Literal["toy", "rom"] = "toy"
    stuck: int | None = None
    turns_per_expert_turn: float = 3.0
