"""Saved states as bytes: the emulator and game they belong to, and a checksum, before the emulator's own data."""

import hashlib
import json
from dataclasses import dataclass

from pokegemma.errors import PokegemmaError

_FIRST_LINE = b"pokegemma state 1\n"


@dataclass(frozen=True)
class GameState:
    """A saved state of a game.

    Attributes:
        core: the program that can read `data`, without a version: "mgba", "toy game".
        game: what is played; for ROMs their SHA-256.
        data: the core's own state.
        picture: the screen at that moment as a PNG; empty where `data` alone gives it.
    """

    core: str
    game: str
    data: bytes
    picture: bytes = b""

    def to_bytes(self) -> bytes:
        """Return the state as `read_state` reads it: a line that names the format, a line of JSON, data, picture."""
        body = self.data + self.picture
        header = {
            "core": self.core,
            "game": self.game,
            "data_bytes": len(self.data),
            "sha256": hashlib.sha256(body).hexdigest(),
        }
        return _FIRST_LINE + json.dumps(header).encode() + b"\n" + body


def read_state(state: bytes, *, core: str, game: str) -> GameState:
    """Return a state that `GameState.to_bytes` wrote.

    Raises:
        PokegemmaError: it is not such a state, it is damaged, or it belongs to another core or game.
    """
    first, _, rest = state.removeprefix(_FIRST_LINE).partition(b"\n")
    try:
        header = json.loads(first) if state.startswith(_FIRST_LINE) else None
        saved_core, saved_game, size, digest = (header[key] for key in ("core", "game", "data_bytes", "sha256"))
    except (ValueError, TypeError, KeyError):
        raise PokegemmaError("this is not a saved state of pokegemma; take one that scripts/play.py wrote") from None
    if hashlib.sha256(rest).hexdigest() != digest:
        raise PokegemmaError(f"the saved state is damaged ({len(rest)} bytes); take an earlier one")
    for what, saved, wanted in (("emulator", saved_core, core), ("game", saved_game, game)):
        if saved != wanted:
            raise PokegemmaError(f"the saved state is of another {what}: {saved}, and this is {wanted}")
    return GameState(core=core, game=game, data=rest[:size], picture=rest[size:])
