"""Press, wait, save and load, for every emulator that runs frame by frame."""

import io
import logging
from typing import Protocol

from PIL import Image

from pokegemma.data.prompts import BUTTONS
from pokegemma.errors import PokegemmaError
from pokegemma.play.emulators.emulator import PressTiming
from pokegemma.play.emulators.state_file import GameState, read_state

logger = logging.getLogger(__name__)


class Console(Protocol):
    """What an emulator's own library offers; `FrameEmulator` makes an `Emulator` of it.

    Attributes:
        name: of the emulator and its core with their versions.
        core: the part of the name that decides who can load a saved state.
        game: identifies what is played, as saved states name it.
        frame_size: width and height of the screen in pixels.
    """

    name: str
    core: str
    game: str
    frame_size: tuple[int, int]

    def set_button(self, button: str | None) -> None:
        """Press this of the eight buttons and release the others; None releases all."""

    def step(self, frames: int) -> None:
        """Let the game go on by one or more frames."""

    def picture(self) -> Image.Image:
        """Return the picture of the latest frame as a copy, RGB."""

    def pixels(self) -> bytes:
        """Return the picture's bytes, red, green and blue of one pixel after the other."""

    def get_state(self) -> bytes:
        """Return the state of the game."""

    def set_state(self, data: bytes) -> None:
        """Go back to a state; its picture need not be that state's before the next step."""

    def close(self) -> None:
        """End the emulator."""


class FrameEmulator:
    """An emulator that plays a `Console` with a `PressTiming`. No button is held outside `press`."""

    def __init__(self, console: Console, *, timing: PressTiming):
        """Release all buttons and go on until the game shows something, and that stays still."""
        self.name, self.frame_size, self.timing = console.name, console.frame_size, timing
        self._console, self._is_closed = console, False
        self._pixels: bytes | None = None  # None: the console has a newer picture
        console.set_button(None)
        console.step(1)
        for _ in range(timing.max_wait_frames):
            if console.picture().getbbox() is not None:  # None: black
                break
            console.step(1)
        self._wait_until_still()

    def screen(self) -> Image.Image:
        """Return a copy of the screen."""
        return Image.frombytes("RGB", self.frame_size, self._look())

    def press(self, button: str) -> None:
        """Hold a button, release it, and wait until the game has answered.

        Raises:
            ValueError: there is no such button.
            PokegemmaError: the emulator failed; all buttons are released where it still answers.
        """
        if button not in BUTTONS:
            raise ValueError(f"{button!r} is not one of {', '.join(BUTTONS)}")
        try:
            self._console.set_button(button)
            self._step(self.timing.hold_frames)
        finally:
            self._console.set_button(None)
        self._wait_until_still()

    def advance(self, frames: int) -> None:
        """Let the game go on for `frames` frames with no button held."""
        if frames > 0:
            self._step(frames)

    def save(self) -> bytes:
        """Return the state of the game with its picture."""
        encoded = io.BytesIO()
        self.screen().save(encoded, "PNG")
        console = self._console
        return GameState(console.core, console.game, console.get_state(), encoded.getvalue()).to_bytes()

    def load(self, state: bytes) -> None:
        """Go back to a state; the screen is the picture that was saved with it, until the game goes on.

        Raises:
            PokegemmaError: it is not a state of this game and emulator.
        """
        saved = read_state(state, core=self._console.core, game=self._console.game)
        self._console.set_button(None)
        self._console.set_state(saved.data)
        self._pixels = Image.open(io.BytesIO(saved.picture)).convert("RGB").tobytes()

    def close(self) -> None:
        """Release all buttons and end the emulator; closing twice does nothing."""
        if not self._is_closed:
            self._is_closed = True
            try:
                self._console.set_button(None)
            except PokegemmaError as error:  # it may be gone, which is often why this is called
                logger.warning("the buttons could not be released: %s", error)
            finally:
                self._console.close()

    def _look(self) -> bytes:
        if self._pixels is None:
            self._pixels = self._console.pixels()
        return self._pixels

    def _step(self, frames: int) -> None:
        self._pixels = None
        self._console.step(frames)

    def _wait_until_still(self) -> None:
        """Go on until the picture was the same `still_frames` times in a row, at most `max_wait_frames`."""
        before, times_same = self._look(), 0
        for _ in range(self.timing.max_wait_frames):
            self._step(1)
            now = self._look()
            times_same = times_same + 1 if now == before else 0
            if times_same == self.timing.still_frames:
                return
            before = now
