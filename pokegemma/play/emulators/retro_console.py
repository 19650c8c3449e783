"""GBA, GB and GBC games in mGBA and Gambatte, which stable-retro brings in its wheel."""

import gc
import tempfile
import weakref
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from pokegemma.errors import PokegemmaError
from pokegemma.play.emulators.rom_file import RomFile

_SYSTEMS = {"GBA": ("GbAdvance", "mGBA"), "GB": ("GameBoy", "Gambatte"), "GBC": ("GbColor", "Gambatte")}
"""stable-retro's name of a system, and the core that runs it."""

_running: weakref.ref["RetroConsole"] | None = None
"""The console of this process: stable-retro runs one, and its error for a second does not name the way out."""


def has_stable_retro() -> bool:
    """Return whether stable-retro is installed."""
    return find_spec("stable_retro") is not None


def _find_running() -> "RetroConsole | None":
    """Return the console that runs in this process."""
    console = _running() if _running is not None else None
    return console if console is not None and console.is_running else None


class RetroConsole:
    """A `Console` on stable-retro's `RetroEmulator`."""

    def __init__(self, rom: RomFile):
        """Start the game.

        Raises:
            PokegemmaError: stable-retro already runs a game in this process, or its core refuses the ROM.
        """
        import numpy as np
        import stable_retro

        global _running
        if _find_running() is not None:
            gc.collect()  # one that was dropped without close() may wait for the collector
        if (other := _find_running()) is not None:
            raise PokegemmaError(
                f"{rom.path}: stable-retro runs one game in a process, and {other.path} is running; "
                "close it first, or play each game in a process of its own"
            )
        system, core = _SYSTEMS[rom.system]
        self.path, self.core, self.game = rom.path, core, rom.sha256
        self.name = f"stable-retro {version('stable-retro')} ({core})"
        names = stable_retro.get_system_info(system)["buttons"]
        # Its filtered actions never let START through, so buttons are set one by one.
        self._places = {name.lower(): place for place, name in enumerate(names) if name}
        self._mask = np.zeros(len(names), np.uint8)
        with tempfile.TemporaryDirectory() as folder:
            # The core is chosen by the end of the name, in lower case.
            link = Path(folder) / f"game.{rom.system.lower()}"
            link.symlink_to(rom.path.resolve())
            try:
                self._emulator = stable_retro.RetroEmulator(str(link))
            except RuntimeError as error:
                raise PokegemmaError(f"{rom.path}: {core} could not load it ({error})") from None
        _running = weakref.ref(self)
        self._emulator.step()
        self.frame_size: tuple[int, int] = self._emulator.get_resolution()

    @property
    def is_running(self) -> bool:
        """Whether it has not been closed."""
        return self._emulator is not None

    def set_button(self, button: str | None) -> None:
        """Press one button and release the others; None releases all."""
        self._mask[:] = 0
        if button is not None:
            self._mask[self._places[button]] = 1
        self._emulator.set_button_mask(self._mask, 0)

    def step(self, frames: int) -> None:
        """Go on by one or more frames."""
        for _ in range(frames):
            self._emulator.step()

    def picture(self) -> Image.Image:
        """Return the latest frame."""
        return Image.fromarray(self._emulator.get_screen())

    def pixels(self) -> bytes:
        """Return the bytes of the latest frame, in half the time that a picture takes."""
        return self._emulator.get_screen().tobytes()

    def get_state(self) -> bytes:
        """Return the core's state."""
        return self._emulator.get_state()

    def set_state(self, data: bytes) -> None:
        """Go back to a state; raises PokegemmaError where the core refuses it."""
        if not self._emulator.set_state(data):
            raise PokegemmaError(f"{self.core} of {self.name} refused the saved state; was another version used?")

    def read_memory(self, address: int, num_bytes: int) -> bytes:
        """Return bytes of the console's memory, at an address as its programs use it.

        Raises:
            ValueError: the core shows no memory there.
        """
        import stable_retro

        data = stable_retro.data.GameData()
        self._emulator.configure_data(data)
        for start, block in data.memory.blocks.items():
            if start <= address and address + num_bytes <= start + len(block):
                return bytes(block[address - start : address - start + num_bytes])
        raise ValueError(f"{self.core} shows no memory at {address:#x}")

    def close(self) -> None:
        """End the game: stable-retro has no close(), it ends with the last reference."""
        self._emulator = None
