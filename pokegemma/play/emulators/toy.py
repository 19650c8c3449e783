"""The toy game in Python as an emulator."""

import json

from PIL import Image

from pokegemma.play.emulators.state_file import GameState, read_state
from pokegemma.play.toy.art import SCREEN_SIZE
from pokegemma.play.toy.world import ToyWorld

_CORE = "toy game"


class ToyEmulator:
    """A room of the toy game; every press is answered at once, so it needs no timing.

    Attributes:
        world: the room that is played. Press buttons through the emulator: only those are part of a saved state.

    Example:
        >>> game = ToyEmulator(5, level=1)
        >>> game.press(game.world.expert_button())
        >>> game.screen().size
        (240, 160)
    """

    name = "toy game in Python"
    frame_size = SCREEN_SIZE

    def __init__(self, seed: int | str = 0, *, level: int = 1):
        """Raises PokegemmaError where there is no such level."""
        self._seed, self._level = seed, level
        self.world = ToyWorld(seed, level=level)
        self._pressed: list[str] = []

    def screen(self) -> Image.Image:
        """Return a copy of the screen."""
        return self.world.render()

    def press(self, button: str) -> None:
        """Press a button; raises ValueError where there is no such button."""
        self.world.press(button)
        self._pressed.append(button)

    def advance(self, frames: int) -> None:
        """Do nothing: the game moves only when a button is pressed."""

    def save(self) -> bytes:
        """Return the room's seed and the buttons pressed so far, from which `load` plays the room again."""
        return GameState(core=_CORE, game=self._game, data=json.dumps(self._pressed).encode()).to_bytes()

    def load(self, state: bytes) -> None:
        """Go back to a state of the same room; raises PokegemmaError for another."""
        pressed = json.loads(read_state(state, core=_CORE, game=self._game).data)
        world = ToyWorld(self._seed, level=self._level)
        for button in pressed:
            world.press(button)
        self.world, self._pressed = world, pressed

    def close(self) -> None:
        """Do nothing: no button stays pressed."""

    @property
    def _game(self) -> str:
        return f"room {self._seed} on level {self._level}"
