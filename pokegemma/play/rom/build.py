"""Build the toy game as a Game Boy Advance ROM: a compiled engine, and one room as the Python game draws it.

The layout of the room is that of `struct room` in engine.c.
"""

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from pokegemma.play.toy import art
from pokegemma.play.toy.rooms import LEVELS, STEPS, Cell, Level, Room
from pokegemma.play.toy.world import ToyWorld

ENGINE = Path(__file__).with_name("engine.bin")
ROOM_OFFSET = 0x2000
"""Where the room begins in the ROM: the engine may become that long."""

_STRIDE, _NUM_ROWS, _MAX_PLACES, _NOWHERE = 32, 22, 8, 0xFFFF
_SPRITE, _GROUND = "<hhHHI", "<I"
_TRAILS = ("redrawn", "painted", "none")
_MARGIN = 8  # pixels around a tile, which some drawings exceed


@dataclass(frozen=True)
class Sprite:
    """A picture with its place: relative to the corner of a tile, or of the screen; RGBA, transparent or opaque."""

    left: int
    top: int
    picture: Image.Image


def build_rom(seed: int | str, level: int = 1) -> bytes:
    """Return the ROM of the room that `ToyWorld(seed, level=level)` plays: less than 1 MB, the same bytes each time.

    Raises:
        PokegemmaError: there is no such level.
    """
    world = ToyWorld(seed, level=level)
    sprites = _draw_sprites(world.art)
    pictures = [np.asarray(sprite.picture) for sprite in sprites]
    ground = np.asarray(world.art.ground)
    palette = _find_colours([ground, *(picture[..., :3] for picture in pictures)])
    indices = [_indices(picture[..., :3], palette) * (picture[..., 3] > 0) for picture in pictures]
    rules = _pack_rules(world.room, LEVELS[level])
    colours = np.pad(palette, (1, 255 - len(palette))).tobytes()
    table_bytes = struct.calcsize(_SPRITE) * len(sprites) + struct.calcsize(_GROUND)
    ground_offset = len(rules) + len(colours) + table_bytes
    assert ground_offset % 4 == 0, "the engine copies the ground by words"
    offsets = np.cumsum([ground_offset + ground[..., 0].size, *(picture.size for picture in indices)]).tolist()
    table = b"".join(
        struct.pack(_SPRITE, sprite.left, sprite.top, *sprite.picture.size, offset)
        for sprite, offset in zip(sprites, offsets, strict=False)
    )
    pixels = [picture.tobytes() for picture in (_indices(ground, palette), *indices)]
    engine = ENGINE.read_bytes().ljust(ROOM_OFFSET, b"\0")
    return b"".join((engine, rules, colours, table, struct.pack(_GROUND, ground_offset), *pixels))


def _pack_rules(room: Room, level: Level) -> bytes:
    directions = list(STEPS)
    floor = np.zeros((_NUM_ROWS, _STRIDE), np.uint8)
    for x, y in room.floor:
        floor[y, x] = 1
    places = [_number(room.start), _number(room.door), *_pad(room.signs), *_pad(sorted(room.bells))]
    order = [directions.index(direction) for direction in room.directions]
    trail = _TRAILS.index(level.trail)
    head = struct.pack("<18H7Bx", *places, directions.index(room.heading), trail, *order, level.marks_next)
    return head + floor.tobytes()


def _number(cell: Cell) -> int:
    return cell[1] * _STRIDE + cell[0]


def _pad(cells: Iterable[Cell]) -> list[int]:
    numbers = [_number(cell) for cell in cells]
    return numbers + [_NOWHERE] * (_MAX_PLACES - len(numbers))


def _draw_sprites(room_art: art.RoomArt) -> list[Sprite]:
    """Return the pictures in the order of the engine's list."""
    tiles: list[Callable[[ImageDraw.ImageDraw, int, int], None]] = [
        art.draw_next_cell,
        art.draw_trail_dot,
        art.draw_painted_cell,
        art.draw_sign,
        art.draw_door,
    ]
    return [
        *(_tile_sprite(lambda pen, x, y, facing=facing: art.draw_player(pen, x, y, facing)) for facing in STEPS),
        *map(_arrow_sprite, STEPS),
        *map(_tile_sprite, tiles),
        _screen_sprite(art.draw_speech_cue),
        _screen_sprite(art.draw_bell_cue),
        _screen_sprite(lambda pen: art.draw_text_box(pen, room_art.num_text_lines)),
        _screen_sprite(art.draw_menu),
        _screen_sprite(_draw_closed_room),
    ]


def _tile_sprite(draw: Callable[[ImageDraw.ImageDraw, int, int], None]) -> Sprite:
    size = art.TILE + 2 * _MARGIN
    canvas = Image.new("RGBA", (size, size))
    draw(ImageDraw.Draw(canvas), _MARGIN, _MARGIN)
    return _crop(canvas, origin=_MARGIN)


def _screen_sprite(draw: Callable[[ImageDraw.ImageDraw], None]) -> Sprite:
    canvas = Image.new("RGBA", art.SCREEN_SIZE)
    draw(ImageDraw.Draw(canvas))
    return _crop(canvas, origin=0)


def _arrow_sprite(direction: str) -> Sprite:
    canvas = Image.new("RGBA", art.SCREEN_SIZE)
    picture, mask = art.draw_arrow(direction)
    canvas.paste(picture, art.ARROW_PLACE, mask)
    return _crop(canvas, origin=0)


def _draw_closed_room(pen: ImageDraw.ImageDraw) -> None:
    pen.rectangle((0, 0, *art.SCREEN_SIZE), fill=art.INK)
    art.draw_door(pen, *art.CENTRE)


def _crop(canvas: Image.Image, *, origin: int) -> Sprite:
    """Return what is drawn; the console writes two pixels at a time, so left edge and width are even."""
    left, top, right, bottom = canvas.getbbox()
    left, right = left - left % 2, right + right % 2
    return Sprite(left - origin, top - origin, canvas.crop((left, top, right, bottom)))


def _five_bits(picture: np.ndarray) -> np.ndarray:
    """Return the console's colours (height, width) of RGB (height, width, 3): five bits each, blue highest."""
    parts = (picture >> 3).astype(np.uint16)
    return parts[..., 0] | parts[..., 1] << 5 | parts[..., 2] << 10


def _find_colours(pictures: Iterable[np.ndarray]) -> np.ndarray:
    """Return the colours of all pictures; the first of the console's 256 is transparent, so at most 255 can be used."""
    is_used = np.zeros(1 << 15, bool)
    for picture in pictures:
        is_used[_five_bits(picture)] = True
    colours = np.flatnonzero(is_used).astype("<u2")
    assert len(colours) < 256, f"{len(colours)} colours in one room"
    return colours


def _indices(picture: np.ndarray, palette: np.ndarray) -> np.ndarray:
    index_of = np.zeros(1 << 15, np.uint8)
    index_of[palette] = np.arange(1, len(palette) + 1)
    return index_of[_five_bits(picture)]
