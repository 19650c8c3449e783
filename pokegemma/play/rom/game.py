"""A room of the toy game in mGBA, together with the same room in Python, which knows the right button."""

import json
import tempfile
from pathlib import Path

from pokegemma.errors import CheckFailedError
from pokegemma.play.emulators.emulator import PressTiming
from pokegemma.play.emulators.frames import FrameEmulator
from pokegemma.play.emulators.retro_console import RetroConsole
from pokegemma.play.emulators.rom_file import read_rom
from pokegemma.play.rom.build import build_rom
from pokegemma.play.rom.state import STATE_ADDRESS, STATE_BYTES, RomState, parse_state
from pokegemma.play.toy.world import ToyWorld


class ToyRomEmulator(FrameEmulator):
    """A room as a ROM; stable-retro runs one in a process.

    Attributes:
        world: the same room in Python, where the same buttons are pressed.

    Example:
        >>> game = ToyRomEmulator(5, level=1)
        >>> while not game.world.is_done:
        ...     game.press(game.world.expert_button())
        >>> game.close()
    """

    def __init__(self, seed: int | str = 0, *, level: int = 1, timing: PressTiming | None = None):
        """Build the ROM and start it.

        Raises:
            PokegemmaError: there is no such level, or stable-retro already runs a game in this process.
        """
        self._seed, self._level, self._pressed = seed, level, list[str]()
        self.world = ToyWorld(seed, level=level)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "toy.gba"
            path.write_bytes(build_rom(seed, level))
            self._retro = RetroConsole(read_rom(path))
        super().__init__(self._retro, timing=timing or PressTiming())

    def state(self) -> RomState:
        """Return what the game wrote to the console's memory."""
        return parse_state(self._retro.read_memory(STATE_ADDRESS, STATE_BYTES))

    def press(self, button: str) -> None:
        """Press a button here and in `world`.

        Raises:
            ValueError: there is no such button.
            CheckFailedError: the two rooms differ afterwards: the press was too short or too long for the rules.
        """
        super().press(button)
        self.world.press(button)
        self._pressed.append(button)
        self._check_world()

    def save(self) -> bytes:
        """Return the state of both rooms."""
        return json.dumps(self._pressed).encode() + b"\n" + super().save()

    def load(self, state: bytes) -> None:
        """Go back to a state of the same room; raises PokegemmaError for another."""
        pressed, _, console_state = state.partition(b"\n")
        super().load(console_state)
        self.world, self._pressed = ToyWorld(self._seed, level=self._level), json.loads(pressed)
        for button in self._pressed:
            self.world.press(button)
        self._check_world()

    def _check_world(self) -> None:
        state = self.state()
        here, there = (state.facing, state.situation), (self.world.facing, self.world.situation)
        if here != there:
            raise CheckFailedError(
                f"room {self._seed}: {here} in mGBA and {there} in Python after {self._pressed[-3:]}"
            )
