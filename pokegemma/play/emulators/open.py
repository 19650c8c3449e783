"""Open what is to be played: the toy game, a ROM, or a SkyEmu that runs already."""

from pokegemma.errors import PokegemmaError
from pokegemma.play.emulators.emulator import Emulator, PressTiming
from pokegemma.play.emulators.toy import ToyEmulator


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
    raise PokegemmaError(f"{game}: only the toy game can be played so far")
