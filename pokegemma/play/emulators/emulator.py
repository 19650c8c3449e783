"""What a game must offer to be played: a screen and eight buttons."""

from dataclasses import dataclass
from typing import Protocol

from PIL import Image

from pokegemma.errors import check_range


class Emulator(Protocol):
    """One running game.

    Attributes:
        name: of the emulator and its core with their versions, as recorded sessions state it.
        frame_size: width and height of the screen in pixels.
    """

    name: str
    frame_size: tuple[int, int]

    def screen(self) -> Image.Image:
        """Return a copy of the screen: RGB, `frame_size`."""

    def press(self, button: str) -> None:
        """Press one of `prompts.BUTTONS`, release it, and wait until the game has answered.

        Raises:
            ValueError: there is no such button.
            PokegemmaError: the emulator failed; all buttons are released where it still answers.
        """

    def advance(self, frames: int) -> None:
        """Let the game go on for `frames` frames (1/60 s each) with no button held."""

    def save(self) -> bytes:
        """Return the state of the game."""

    def load(self, state: bytes) -> None:
        """Go back to a state from `save`; the screen is that state's at once.

        Raises:
            PokegemmaError: it is not a state of this game.
        """

    def close(self) -> None:
        """Release all buttons and end the emulator; closing twice does nothing."""


@dataclass(frozen=True)
class PressTiming:
    """How a button is pressed, in frames (1/60 s). Sessions record it, since it decides what the model sees.

    A press holds `hold_frames`. Then the game goes on until the picture was the same `still_frames` times in a row, at
    most `max_wait_frames`. A tile step takes 16 frames, and a tap of 8 or fewer only turns the player.
    """

    hold_frames: int = 12
    still_frames: int = 4
    max_wait_frames: int = 60

    def __post_init__(self) -> None:
        check_range("hold_frames", self.hold_frames, at_least=1)
        check_range("still_frames", self.still_frames, at_least=1)
        check_range("max_wait_frames", self.max_wait_frames, at_least=self.still_frames)
