"""Notice that a player goes round in a loop, and draw another button."""

import hashlib
import random
from collections import Counter, deque

import numpy as np
from PIL import Image

from pokegemma.data.prompts import BUTTONS
from pokegemma.errors import check_range

STUCK_DEFAULT = 3
"""`--stuck` of scripts/play.py."""

_NUM_REMEMBERED = 64
"""Turns that are remembered, so that loops over several screens are found, too."""


class StuckEscape:
    """Replace a button that was pressed on the same screen `limit` times within the last 64 turns.

    A greedy player decides the same on the same screen and earlier buttons, for ever. The button drawn instead is one
    of those pressed least often on this screen, with the player's probabilities where it has some.

    Example:
        >>> escape = StuckEscape(2, rng=random.Random(0))
        >>> for _ in range(3):
        ...     button = escape.choose(screen, "up", probabilities=None)
        ...     escape.pressed(button)
        >>> button == "up"  # pressed twice already
        False
    """

    def __init__(self, limit: int, *, rng: random.Random) -> None:
        check_range("--stuck", limit, at_least=1)
        self._limit, self._rng = limit, rng
        self._turns: deque[tuple[bytes, str]] = deque(maxlen=_NUM_REMEMBERED)
        self._screen = b""

    def choose(self, screen: Image.Image, button: str, *, probabilities: np.ndarray | None) -> str:
        """Return the player's button, or another one."""
        self._screen = hashlib.sha256(screen.tobytes()).digest()
        counts = Counter(pressed for seen, pressed in self._turns if seen == self._screen)
        if counts[button] < self._limit:
            return button
        fewest = min(counts[other] for other in BUTTONS)
        untried = [other for other in BUTTONS if counts[other] == fewest and other != button]
        if not untried:  # all eight equally often
            untried = [other for other in BUTTONS if other != button]
        weights = None
        if probabilities is not None:
            weights = [max(float(probabilities[BUTTONS.index(other)]), 1e-6) for other in untried]
        return self._rng.choices(untried, weights)[0]

    def pressed(self, button: str) -> None:
        """Remember the button that was pressed on the screen of the last `choose`."""
        self._turns.append((self._screen, button))
