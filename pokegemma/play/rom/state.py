"""Read what the ROM's engine writes for tests into the console's work memory: `struct state` in engine.c."""

import struct
from dataclasses import dataclass

from pokegemma.play.toy.rooms import STEPS, Cell

STATE_ADDRESS = 0x02000000
STATE_BYTES = 16
SITUATIONS = ("navigation", "sign", "dialogue", "bell", "menu", "off_trail", "done")


@dataclass(frozen=True)
class RomState:
    """Where the game is.

    Attributes:
        player: cell; while the player walks, the one that they leave.
        situation: as `ToyWorld.situation`.
        is_busy: the player walks, or a window slides in.
        num_frames: since the game began.
    """

    player: Cell
    facing: str
    situation: str
    num_unread_signs: int
    is_done: bool
    is_busy: bool
    num_frames: int


def parse_state(memory: bytes) -> RomState:
    """Return the state in the `STATE_BYTES` bytes at `STATE_ADDRESS`; raises ValueError where there is none."""
    name, column, row, facing, situation, signs, is_done, is_busy, frames = struct.unpack("<4s7BxI", memory)
    if name != b"TOY1":
        raise ValueError(f"the memory begins with {name!r}, so no toy ROM is running")
    return RomState(
        player=(column, row),
        facing=list(STEPS)[facing],
        situation=SITUATIONS[situation],
        num_unread_signs=signs,
        is_done=bool(is_done),
        is_busy=bool(is_busy),
        num_frames=frames,
    )
