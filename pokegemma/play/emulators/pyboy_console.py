"""GB and GBC games in PyBoy, which runs where stable-retro has no wheel."""

import io
import warnings
from importlib.metadata import version
from importlib.util import find_spec

from PIL import Image

from pokegemma.data.prompts import BUTTONS
from pokegemma.errors import PokegemmaError
from pokegemma.play.emulators.rom_file import RomFile

_FIRST_INSTRUCTION = 0x100
"""Where every game begins. Before it the boot animation runs, for about 65 frames, in which presses are lost."""

_MAX_BOOT_FRAMES = 600


def has_pyboy() -> bool:
    """Return whether PyBoy is installed."""
    return find_spec("pyboy") is not None


class PyBoyConsole:
    """A `Console` on PyBoy. Its frames are not a clock: where a game switches the LCD on, one ends early."""

    core = "PyBoy"

    def __init__(self, rom: RomFile):
        """Start the game and let it boot; raises PokegemmaError where PyBoy refuses the ROM."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SDL2's binding reports where its library is; no window is opened
            from pyboy import PyBoy
            from pyboy.utils import PyBoyException

        self.name, self.game = f"PyBoy {version('pyboy')}", rom.sha256
        try:
            # As a file in memory: for a path, PyBoy reads and writes battery saves next to the ROM.
            self._pyboy = PyBoy(
                io.BytesIO(rom.path.read_bytes()), window="null", sound_emulated=False, log_level="CRITICAL"
            )
        except PyBoyException as error:
            raise PokegemmaError(f"{rom.path}: PyBoy could not load it ({error})") from None
        self._pyboy.set_emulation_speed(0)
        self.frame_size = (160, 144)
        self._boot(rom)

    def _boot(self, rom: RomFile) -> None:
        reached: list[bool] = []
        self._pyboy.hook_register(0, _FIRST_INSTRUCTION, reached.append, True)
        for _ in range(_MAX_BOOT_FRAMES):
            if reached:
                break
            self._pyboy.tick()
        else:
            raise PokegemmaError(f"{rom.path}: did not start within {_MAX_BOOT_FRAMES} frames in {self.name}")
        self._pyboy.hook_deregister(0, _FIRST_INSTRUCTION)

    def set_button(self, button: str | None) -> None:
        """Press one button and release the others, at the next frame; None releases all."""
        for name in BUTTONS:
            if name != button:
                self._pyboy.button_release(name)
        if button is not None:
            self._pyboy.button_press(button)

    def step(self, frames: int) -> None:
        """Go on by one or more frames, of which the last is drawn."""
        self._pyboy.tick(frames, render=True, sound=False)

    def picture(self) -> Image.Image:
        """Return a copy of the latest frame; PyBoy's own picture is one object for ever."""
        return self._pyboy.screen.image.convert("RGB")

    def pixels(self) -> bytes:
        """Return the bytes of the latest frame."""
        return self.picture().tobytes()

    def get_state(self) -> bytes:
        """Return PyBoy's state."""
        state = io.BytesIO()
        self._pyboy.save_state(state)
        return state.getvalue()

    def set_state(self, data: bytes) -> None:
        """Go back to a state; raises PokegemmaError where PyBoy refuses it. It restores buttons that were held."""
        from pyboy.utils import PyBoyException

        try:
            self._pyboy.load_state(io.BytesIO(data))
        except PyBoyException as error:
            raise PokegemmaError(f"{self.name} refused the saved state ({error}); was another version used?") from None
        self.set_button(None)

    def close(self) -> None:
        """End the game; without `save=False`, PyBoy would write battery memory to a file."""
        self._pyboy.stop(save=False)
