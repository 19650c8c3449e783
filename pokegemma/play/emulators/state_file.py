"""Saved states as bytes: the emulator and game they belong to, and a checksum, before the emulator's own data."""

import hashlib
import json
from dataclasses import dataclass

from pokegemma.errors import PokegemmaError

_FIRST_LINE = b"pokegemma state 2\n"


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
        """Return the state as `read_state` reads it.

        A line that names the format, a line with the SHA-256 of the rest, a line of JSON, data, picture.
        """
        header = {"core": self.core, "game": self.game, "data_bytes": len(self.data)}
        body = json.dumps(header).encode() + b"\n" + self.data + self.picture
        return _FIRST_LINE + hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def read_state(state: bytes, *, core: str, game: str) -> GameState:
    """Return a state that `GameState.to_bytes` wrote.

    Raises:
        PokegemmaError: it is not such a state, it is damaged, or it belongs to another core or game.
    """
    if not state.startswith(_FIRST_LINE):
        raise PokegemmaError("this is not a saved state of pokegemma; take one that scripts/play.py wrote")
    digest, _, body = state.removeprefix(_FIRST_LINE).partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise PokegemmaError(f"the saved state is damaged ({len(state)} bytes); take an earlier one")
    header, _, content = body.partition(b"\n")
    saved = json.loads(header)
    for what, name, wanted in (("emulator", saved["core"], core), ("game", saved["game"], game)):
        if name != wanted:
            raise PokegemmaError(f"the saved state is of another {what}: {name}, and this is {wanted}")
    size = saved["data_bytes"]
    return GameState(core=core, game=game, data=content[:size], picture=content[size:])
