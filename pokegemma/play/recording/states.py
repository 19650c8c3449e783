"""The game's state next to a session, so that play continues after a crash: one file, whole or as it was before."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from pokegemma.errors import PokegemmaError
from pokegemma.outputs import atomic_file

STATE_FILE = "emulator_state.bin"
"""In the session's folder; a line of JSON (turn, emulator, SHA-256), then what `Emulator.save` returned."""


@dataclass(frozen=True)
class EmulatorState:
    """A state of a game: after which turn of its session, and with which emulator (`Emulator.name`) it was saved."""

    turn: int
    emulator: str
    data: bytes


def write_game_state(path: Path, state: EmulatorState) -> None:
    """Write a state; the one that was there before stays until the new one is whole and on the disk."""
    digest = hashlib.sha256(state.data).hexdigest()
    head = json.dumps({"turn": state.turn, "emulator": state.emulator, "sha256": digest})
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        file.write(head.encode() + b"\n" + state.data)
        file.flush()
        os.fsync(file.fileno())


def read_game_state(path: Path) -> EmulatorState:
    """Read what `write_game_state` wrote.

    Raises:
        PokegemmaError: there is no such file, or it is damaged, or another program wrote it.
    """
    try:
        head, _, data = Path(path).read_bytes().partition(b"\n")
    except OSError as error:
        raise PokegemmaError(f"{path} cannot be read: {error.strerror}") from error
    try:
        record = json.loads(head)
        turn, emulator, digest = (record[name] for name in ("turn", "emulator", "sha256"))
    except (ValueError, KeyError, TypeError, RecursionError):
        raise PokegemmaError(f"{path} is not a state that play saved") from None
    if hashlib.sha256(data).hexdigest() != digest:
        raise PokegemmaError(f"{path} is damaged ({len(data)} bytes of state after turn {turn})")
    return EmulatorState(turn, emulator, data)
