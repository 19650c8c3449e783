"""What chooses the buttons of a game: the interface of all players, and players that need no model."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from PIL import Image

from pokegemma.data.prompts import BUTTONS

Decide = Literal["scored", "generate"]
"""scored: the eight buttons are scored in one pass; generate: the model writes its whole answer."""


@dataclass(frozen=True)
class ButtonChoice:
    """A decision.

    Attributes:
        button: one of `prompts.BUTTONS`; None where the model's answer names none of them.
        probabilities: (8,) of `BUTTONS`, normalised over the eight; None where the player has none.
        reasoning: the reason that the model wrote, "" without one.
        situation: what the model wrote about the screen, "" without it.
        decided_by: "model", or the name of another player.
    """

    button: str | None
    probabilities: np.ndarray | None = None
    reasoning: str = ""
    situation: str = ""
    decided_by: str = "model"


class ButtonPlayer(Protocol):
    """A player of one game at a time.

    Example:
        >>> player.start("leave the house")
        >>> while playing:
        ...     choice = player.decide(screen)
        ...     emulator.press(choice.button)
        ...     player.pressed(choice.button)
        ...     player.prepare()
    """

    name: str
    """What plays, as recorded sessions state it: a model's folder, a server's URL, "random"."""

    def start(self, goal: str | None) -> None:
        """Begin a session, also after a loaded state: frames, earlier buttons and the clock are forgotten.

        Raises:
            PokegemmaError: the goal contains control tokens of the model.
        """

    def decide(self, frame: Image.Image | str | Path, *, time: float | None = None) -> ButtonChoice:
        """Return the button for the screen that the player sees now.

        Args:
            time: when the frame was seen, in seconds of any clock; None where that is unknown. After a pause the window
                of frames begins anew, as in conversion.

        Raises:
            PokegemmaError: the frame cannot be read, or a server does not answer.
            CheckFailedError: the model returns NaN.
        """

    def pressed(self, *buttons: str) -> None:
        """Record which buttons were pressed after the last decision: its own, others, or none.

        Raises:
            ValueError: one of them is not a button.
        """

    def prepare(self) -> None:
        """Do now, while the game moves, what the next decision would have to do."""


class Expert(Protocol):
    """A game that knows the right button, as `ToyWorld` does."""

    def expert_button(self) -> str: ...


def require_buttons(buttons: tuple[str, ...]) -> None:
    """Check that buttons exist.

    Raises:
        ValueError: one of them does not.
    """
    for button in buttons:
        if button not in BUTTONS:
            raise ValueError(f"{button!r} is not one of {', '.join(BUTTONS)}")


def draw_button(probabilities: np.ndarray, *, temperature: float, rng: random.Random) -> str:
    """Return the likeliest of `BUTTONS`; with a temperature above 0, one drawn from probabilities^(1 / temperature)."""
    if temperature == 0:
        return BUTTONS[int(probabilities.argmax())]
    logits = np.log(np.maximum(probabilities, np.finfo(float).tiny)) / temperature
    return rng.choices(BUTTONS, np.exp(logits - logits.max()))[0]


class RandomPlayer:
    """Press any of the eight buttons, each as often as the others."""

    name = "random"

    def __init__(self, seed: int | str = 0) -> None:
        self._rng = random.Random(f"random player {seed}")

    def start(self, goal: str | None) -> None:
        pass

    def decide(self, frame: Image.Image | str | Path, *, time: float | None = None) -> ButtonChoice:
        return ButtonChoice(self._rng.choice(BUTTONS), np.full(len(BUTTONS), 1 / len(BUTTONS)), decided_by=self.name)

    def pressed(self, *buttons: str) -> None:
        require_buttons(buttons)

    def prepare(self) -> None:
        pass


class RepeatPlayer:
    """Press the button that was pressed before, and first a random one."""

    name = "repeat"

    def __init__(self, seed: int | str = 0) -> None:
        self._rng = random.Random(f"repeat player {seed}")
        self._last = self._rng.choice(BUTTONS)

    def start(self, goal: str | None) -> None:
        self._last = self._rng.choice(BUTTONS)

    def decide(self, frame: Image.Image | str | Path, *, time: float | None = None) -> ButtonChoice:
        return ButtonChoice(self._last, decided_by=self.name)

    def pressed(self, *buttons: str) -> None:
        require_buttons(buttons)
        if buttons:
            self._last = buttons[-1]

    def prepare(self) -> None:
        pass


class ExpertPlayer:
    """Press the button that the game itself knows to be right; it looks at the game's state and not at the screen."""

    name = "expert"

    def __init__(self, game: Expert) -> None:
        self._game = game

    def start(self, goal: str | None) -> None:
        pass

    def decide(self, frame: Image.Image | str | Path, *, time: float | None = None) -> ButtonChoice:
        return ButtonChoice(self._game.expert_button(), decided_by=self.name)

    def pressed(self, *buttons: str) -> None:
        require_buttons(buttons)

    def prepare(self) -> None:
        pass


def find_expert(emulator: object) -> Expert | None:
    """Return what knows the right button in an emulator's game: its `world`; None in games without an expert."""
    return getattr(emulator, "world", None)
