"""The toy ROM in stable-retro's mGBA, frame by frame: buttons are held for as long as a test wants."""

from pathlib import Path

import numpy as np

from pokegemma.play.rom.build import build_rom
from pokegemma.play.rom.state import STATE_ADDRESS, STATE_BYTES, RomState, parse_state

BOOT_FRAMES = 10


class RomConsole:
    """One ROM; drop the last reference before the next, since stable-retro runs one in a process."""

    def __init__(self, folder: Path, *, seed: int, level: int):
        import stable_retro

        path = folder / "toy.gba"
        path.write_bytes(build_rom(seed, level))
        self._emulator = stable_retro.RetroEmulator(str(path))
        self._data = stable_retro.data.GameData()
        self._emulator.configure_data(self._data)
        self._names = stable_retro.get_system_info("GbAdvance")["buttons"]
        self.run(BOOT_FRAMES)

    def run(self, num_frames: int, button: str | None = None) -> None:
        """Let the game go on, with one button held or none."""
        mask = [name is not None and name.lower() == button for name in self._names]
        self._emulator.set_button_mask(np.array(mask, np.uint8), 0)
        for _ in range(num_frames):
            self._emulator.step()

    def hold(self, button: str, num_frames: int) -> None:
        """Hold a button, release it, and wait for longer than any answer takes."""
        self.run(num_frames, button)
        self.run(40)

    def screen(self) -> np.ndarray:
        """Return the screen: (160, 240, 3), whole numbers that can be subtracted."""
        return self._emulator.get_screen().astype(int)

    def state(self) -> RomState:
        """Return what the game wrote to its memory."""
        return parse_state(bytes(self._data.memory.blocks[STATE_ADDRESS][:STATE_BYTES]))
