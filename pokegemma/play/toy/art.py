"""Drawings of the toy game: 32-pixel tiles, the player always at the centre of 240x160 pixels.

Floor and obstacles take their colours from the room's seed and stay dark; cues have the same bright colours everywhere.
All colours are multiples of 8, which the Game Boy Advance shows as they are (five bits a part, in mGBA and SkyEmu).
"""

import colorsys
import functools
import random
from collections.abc import Sequence

from PIL import Image, ImageDraw

from pokegemma.play.toy.rooms import ROOM_SIZE, Cell, Room

SCREEN_SIZE = (240, 160)
TILE = 32

Colour = tuple[int, int, int]

CENTRE = ((SCREEN_SIZE[0] - TILE) // 2, (SCREEN_SIZE[1] - TILE) // 2)
MARGIN = 4  # tiles drawn around the room, so that the screen never leaves the drawing
_TRAIL, _TRAIL_EDGE = (248, 232, 40), (184, 136, 0)
_SPEECH, _BELL, _MENU = (0, 184, 248), (240, 40, 40), (120, 24, 160)
_ARROW = (56, 240, 88)
_PAPER, INK, _WOOD, _SKIN = (248, 248, 240), (24, 24, 40), (144, 88, 40), (240, 200, 160)

ARROW_SIZE = 48
ARROW_PLACE = ((SCREEN_SIZE[0] - ARROW_SIZE) // 2, 8)
"""Left and top edge of the arrow on the screen: over the player's head."""
_LEFT, _DOWN, _RIGHT = Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270


class RoomArt:
    """Pictures of one room; everything that does not change is drawn once."""

    def __init__(self, room: Room, rng: random.Random):
        self._room = room
        self.ground = _draw_ground(room, rng)
        self.num_text_lines = rng.randint(2, 3)

    def draw(
        self,
        player: Cell,
        *,
        facing: str,
        situation: str,
        trail: Sequence[Cell] = (),
        marked: Cell | None = None,
        looks_alike: bool = False,
        arrow: str | None = None,
    ) -> Image.Image:
        """Return the screen.

        Args:
            trail: the cells of the way to go that are drawn.
            marked: the one of them to step on, which is marked most.
            looks_alike: whether all of them are drawn as one kind of bright cell instead.
            arrow: direction of the arrow over the player, if there is one.
        """
        left = (player[0] + MARGIN) * TILE - CENTRE[0]
        top = (player[1] + MARGIN) * TILE - CENTRE[1]
        screen = self.ground.crop((left, top, left + SCREEN_SIZE[0], top + SCREEN_SIZE[1]))
        pen = ImageDraw.Draw(screen)
        for cell in sorted(trail, key=lambda cell: cell == marked):
            x, y = CENTRE[0] + (cell[0] - player[0]) * TILE, CENTRE[1] + (cell[1] - player[1]) * TILE
            if looks_alike:
                draw_painted_cell(pen, x, y)
            elif cell == marked:
                draw_next_cell(pen, x, y)
            else:
                draw_trail_dot(pen, x, y)
            if cell in self._room.signs:
                draw_sign(pen, x, y)
            elif cell == self._room.door:
                draw_door(pen, x, y)
        draw_player(pen, *CENTRE, facing)
        if arrow is not None:
            picture, mask = draw_arrow(arrow)
            screen.paste(picture, ARROW_PLACE, mask)
        if situation == "sign":
            draw_speech_cue(pen)
        elif situation == "bell":
            draw_bell_cue(pen)
        elif situation == "dialogue":
            draw_text_box(pen, self.num_text_lines)
        elif situation == "menu":
            draw_menu(pen)
        elif situation == "done":
            pen.rectangle((0, 0, *SCREEN_SIZE), fill=INK)
            draw_door(pen, *CENTRE)
        return screen


@functools.cache
def draw_arrow(direction: str) -> tuple[Image.Image, Image.Image]:
    """Return an arrow on a round plate, RGB, and its mask. The four are rotations of one another, pixel for pixel.

    A first arrow was drawn by polygons, which PIL does not draw symmetrically; a model read up as down.
    """
    size, shown = ARROW_SIZE, {"up": None, "left": _LEFT, "down": _DOWN, "right": _RIGHT}[direction]
    picture, mask = Image.new("RGB", (size, size)), Image.new("L", (size, size))
    half = (size - 1) / 2
    for x in range(size):
        for y in range(size):
            from_middle = abs(x - half)
            is_head = 6 <= y < 26 and from_middle < y - 5
            is_shaft = 26 <= y < 42 and from_middle < 6
            picture.putpixel((x, y), _ARROW if is_head or is_shaft else INK)
            mask.putpixel((x, y), 255 if (x - half) ** 2 + (y - half) ** 2 <= (size / 2) ** 2 else 0)
    return (picture, mask) if shown is None else (picture.transpose(shown), mask)


def _random_colour(rng: random.Random, *, saturation: tuple[float, float], value: tuple[float, float]) -> Colour:
    red, green, blue = colorsys.hsv_to_rgb(rng.random(), rng.uniform(*saturation), rng.uniform(*value))
    return _console_colour((int(red * 255), int(green * 255), int(blue * 255)))


def _draw_ground(room: Room, rng: random.Random) -> Image.Image:
    """Return the whole room with a margin: floor, obstacles of three kinds, signs and the door."""
    floor_colour = _random_colour(rng, saturation=(0.15, 0.45), value=(0.42, 0.58))
    floors = [_floor_tile(rng, floor_colour) for _ in range(4)]
    dark = [_random_colour(rng, saturation=(0.3, 0.7), value=(0.2, 0.36)) for _ in range(3)]
    obstacles = [
        obstacle(floor, colour)
        for obstacle, colour in zip((_tree_tile, _rock_tile, _crate_tile), dark, strict=True)
        for floor in floors
    ]
    rng.shuffle(obstacles)
    obstacles = obstacles[:6]
    num_tiles = ROOM_SIZE + 2 * MARGIN
    ground = Image.new("RGB", (num_tiles * TILE, num_tiles * TILE))
    for x in range(-MARGIN, ROOM_SIZE + MARGIN):
        for y in range(-MARGIN, ROOM_SIZE + MARGIN):
            is_free = (x, y) in room.floor or (x, y) in room.signs or (x, y) == room.door
            tile = rng.choice(floors if is_free else obstacles)
            ground.paste(tile, ((x + MARGIN) * TILE, (y + MARGIN) * TILE))
    pen = ImageDraw.Draw(ground)
    for x, y in room.signs:
        draw_sign(pen, (x + MARGIN) * TILE, (y + MARGIN) * TILE)
    draw_door(pen, (room.door[0] + MARGIN) * TILE, (room.door[1] + MARGIN) * TILE)
    return ground


def _lighter(colour: Colour, by: int) -> Colour:
    red, green, blue = (min(255, max(0, part + by)) for part in colour)
    return _console_colour((red, green, blue))


def _console_colour(colour: Colour) -> Colour:
    red, green, blue = (part & 0b11111000 for part in colour)
    return red, green, blue


def _floor_tile(rng: random.Random, colour: Colour) -> Image.Image:
    tile = Image.new("RGB", (TILE, TILE), colour)
    pen = ImageDraw.Draw(tile)
    for _ in range(rng.randint(2, 5)):
        x, y = rng.randrange(TILE - 4), rng.randrange(TILE - 2)
        pen.rectangle((x, y, x + rng.randint(1, 4), y + 1), fill=_lighter(colour, rng.choice((-14, 12))))
    return tile


def _tree_tile(floor: Image.Image, colour: Colour) -> Image.Image:
    tile = floor.copy()
    pen = ImageDraw.Draw(tile)
    pen.rectangle((13, 20, 18, 31), fill=_lighter(_WOOD, -70))
    pen.ellipse((2, 1, 29, 26), fill=colour)
    pen.ellipse((8, 5, 19, 15), fill=_lighter(colour, 18))
    return tile


def _rock_tile(floor: Image.Image, colour: Colour) -> Image.Image:
    tile = floor.copy()
    pen = ImageDraw.Draw(tile)
    pen.polygon([(1, 29), (5, 9), (15, 3), (26, 8), (31, 29)], fill=colour)
    pen.polygon([(7, 11), (15, 5), (18, 13), (10, 18)], fill=_lighter(colour, 22))
    return tile


def _crate_tile(floor: Image.Image, colour: Colour) -> Image.Image:
    tile = floor.copy()
    pen = ImageDraw.Draw(tile)
    pen.rectangle((1, 2, 30, 30), fill=colour, outline=_lighter(colour, -25), width=2)
    pen.line((3, 4, 28, 28), fill=_lighter(colour, 18), width=3)
    pen.line((28, 4, 3, 28), fill=_lighter(colour, 18), width=3)
    return tile


def draw_next_cell(pen: ImageDraw.ImageDraw, x: int, y: int) -> None:
    pen.rectangle((x - 4, y - 4, x + TILE + 3, y + TILE + 3), fill=_TRAIL)


def draw_trail_dot(pen: ImageDraw.ImageDraw, x: int, y: int) -> None:
    pen.ellipse((x + 12, y + 12, x + 19, y + 19), fill=_TRAIL_EDGE)


def draw_painted_cell(pen: ImageDraw.ImageDraw, x: int, y: int) -> None:
    pen.rectangle((x + 2, y + 2, x + TILE - 3, y + TILE - 3), fill=_TRAIL)


def draw_sign(pen: ImageDraw.ImageDraw, x: int, y: int) -> None:
    pen.rectangle((x + 14, y + 18, x + 17, y + 29), fill=_lighter(_WOOD, -60))
    pen.rectangle((x + 5, y + 5, x + 26, y + 19), fill=_WOOD, outline=_lighter(_WOOD, -60), width=2)
    for line in (9, 13):
        pen.line((x + 9, y + line, x + 22, y + line), fill=INK)


def draw_door(pen: ImageDraw.ImageDraw, x: int, y: int) -> None:
    pen.pieslice((x + 6, y + 2, x + 25, y + 22), 180, 360, fill=_lighter(_WOOD, -60))
    pen.rectangle((x + 6, y + 12, x + 25, y + 29), fill=_lighter(_WOOD, -60))
    pen.rectangle((x + 9, y + 12, x + 22, y + 29), fill=_WOOD)
    pen.ellipse((x + 18, y + 19, x + 21, y + 22), fill=_PAPER)


def draw_player(pen: ImageDraw.ImageDraw, x: int, y: int, facing: str) -> None:
    pen.ellipse((x + 6, y + 26, x + 25, y + 31), fill=INK)
    pen.rectangle((x + 9, y + 16, x + 22, y + 28), fill=(40, 80, 200))
    pen.rectangle((x + 9, y + 25, x + 22, y + 28), fill=INK)
    pen.ellipse((x + 7, y + 2, x + 24, y + 19), fill=_SKIN)
    pen.pieslice((x + 6, y + 0, x + 25, y + 19), 180, 360, fill=(16, 128, 104))
    if facing == "up":
        pen.ellipse((x + 7, y + 2, x + 24, y + 17), fill=(16, 128, 104))
        return
    eyes = {"down": (11, 18), "left": (8, 13), "right": (16, 21)}[facing]
    for eye in eyes:
        pen.rectangle((x + eye, y + 11, x + eye + 2, y + 14), fill=INK)


def draw_speech_cue(pen: ImageDraw.ImageDraw) -> None:
    """Draw a blue balloon with three dots over the player: there is something to read."""
    pen.polygon([(112, 44), (128, 44), (120, 62)], fill=_SPEECH)
    pen.rounded_rectangle((72, 4, 167, 47), radius=12, fill=_SPEECH, outline=_PAPER, width=3)
    for x in (92, 114, 136):
        pen.ellipse((x, 20, x + 11, 31), fill=_PAPER)


def draw_bell_cue(pen: ImageDraw.ImageDraw) -> None:
    """Draw a big red bell over the player: the menu is asked for."""
    pen.ellipse((110, 40, 129, 59), fill=_BELL, outline=_PAPER, width=2)
    pen.pieslice((94, 4, 145, 56), 180, 360, fill=_BELL)
    pen.polygon([(94, 28), (145, 28), (158, 50), (81, 50)], fill=_BELL)
    for left, start in ((66, 120), (146, -60)):
        pen.arc((left, 8, left + 27, 42), start, start + 120, fill=_BELL, width=6)


def draw_text_box(pen: ImageDraw.ImageDraw, num_lines: int) -> None:
    pen.rounded_rectangle((4, 92, 235, 156), radius=8, fill=_PAPER, outline=INK, width=3)
    for line in range(num_lines):
        for word, (start, end) in enumerate(((18, 58), (66, 96), (104, 160), (168, 214))):
            if line + 1 < num_lines or word < 3:
                pen.rectangle((start, 104 + 17 * line, end, 109 + 17 * line), fill=INK)


def draw_menu(pen: ImageDraw.ImageDraw) -> None:
    pen.rounded_rectangle((132, 4, 235, 155), radius=8, fill=_MENU, outline=_PAPER, width=3)
    for item in range(5):
        y = 18 + 27 * item
        pen.rectangle((158, y, 158 + (52, 40, 60, 34, 46)[item], y + 9), fill=_PAPER)
    pen.polygon([(142, 16), (152, 22), (142, 28)], fill=_TRAIL_EDGE)
