"""Open what is to be played: the toy game, a ROM, or a SkyEmu that runs already."""

import platform
import sys

from pokegemma.errors import PokegemmaError
from pokegemma.play.emulators.emulator import Emulator, PressTiming
from pokegemma.play.emulators.frames import Console, FrameEmulator
from pokegemma.play.emulators.pyboy_console import PyBoyConsole, has_pyboy
from pokegemma.play.emulators.retro_console import RetroConsole, has_stable_retro
from pokegemma.play.emulators.rom_file import RomFile, read_rom
from pokegemma.play.emulators.skyemu_console import SkyEmuConsole
from pokegemma.play.emulators.toy import ToyEmulator

_PLATFORMS_OF_STABLE_RETRO = {("linux", "x86_64"), ("darwin", "arm64")}
"""Those for which it has wheels, as in pyproject.toml."""


def open_emulator(game: str, *, timing: PressTiming, seed: int = 0, level: int = 1) -> Emulator:
    """Return a running game.

    Args:
        game: "toy", the path of a ROM (.gba, .gb, .gbc), or the http URL of SkyEmu's control server.
        timing: how buttons are pressed; the toy game in Python needs none.
        seed: of the toy game's room.
        level: of the toy game's room.

    Raises:
        PokegemmaError: there is no such game, its emulator is not installed, or it does not answer.
    """
    if game == "toy":
        return ToyEmulator(seed, level=level)
    console = SkyEmuConsole(game) if "://" in game else _start(read_rom(game))
    return FrameEmulator(console, timing=timing)


def _start(rom: RomFile) -> Console:
    """Start a ROM in stable-retro, or in PyBoy where only that is installed."""
    if has_stable_retro():
        return RetroConsole(rom)
    if rom.system != "GBA" and has_pyboy():
        return PyBoyConsole(rom)
    if (sys.platform, platform.machine()) in _PLATFORMS_OF_STABLE_RETRO:
        remedy = "it needs stable-retro: ./init.sh --with play, or pip install 'pokegemma[play]'"
    elif rom.system == "GBA":
        remedy = "stable-retro has no wheel for this machine; open the game in SkyEmu, and give its URL as --game"
    else:
        remedy = "it needs PyBoy: ./init.sh --with pyboy, or pip install 'pokegemma[pyboy]'"
    raise PokegemmaError(f"{rom.path}: {remedy}")
