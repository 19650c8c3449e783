"""Presses that go wrong on purpose, so that a player also meets the screens after a mistake."""

import random

from pokegemma.data.prompts import BUTTONS


def replace_press(button: str, *, noise: float, rng: random.Random) -> str:
    """Return `button`, or with probability `noise` one of the seven others, all equally likely."""
    if rng.random() >= noise:
        return button
    return rng.choice([other for other in BUTTONS if other != button])
