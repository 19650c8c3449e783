"""Frames as they are recorded, and the 2x2 pictures that are made of them."""

import collections
import functools
import io
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError

from pokegemma.data.png import PNG_SIGNATURE, Band, compress_rows, encode_png, join_bands
from pokegemma.errors import PokegemmaError

FRAME_SIZE_PX = (240, 160)
GRID_SIZE_PX = (480, 320)
NUM_TILES = 4
MAX_FRAME_PIXELS = 4096 * 4096
LABEL_SIZE_PX = (24, 12)
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")

UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    ArithmeticError,
    LookupError,
    TypeError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)
"""What Pillow raises for damaged files, such as SyntaxError for a broken PNG chunk."""


class FrameError(ValueError):
    """A picture that does not decode."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Return a picture as RGB, what is transparent on white, as transformers' image processors do it.

    Pillow alone would show the stored colour of a transparent pixel.
    """
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def open_picture(path: str | Path) -> Image.Image:
    """Return a picture as RGB; see `to_rgb`.

    Raises:
        PokegemmaError: it cannot be read.
    """
    try:
        with Image.open(path) as image:
            return to_rgb(image)
    except UNREADABLE as error:
        raise PokegemmaError(f"{path} cannot be read as a picture: {error}") from error


@dataclass(frozen=True)
class Frame:
    """A decoded frame: `png` is the file's content, `tile` its pixels at 240x160, uint8 (160, 240, 3)."""

    png: bytes
    tile: np.ndarray


def read_frame(content: bytes) -> Frame:
    """Decode a picture completely. PNG bytes are kept as they are; another format is stored as PNG, pixel for pixel.

    Raises:
        FrameError: it is empty, cut off, corrupt, or larger than 4096x4096.
    """
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            if image.width * image.height > MAX_FRAME_PIXELS:
                raise FrameError(f"{image.width}x{image.height} pixels is no game screen")
            if image.format == "PNG":
                _check_chunks(content)
            image.load()
            rgb = to_rgb(image)
            png = content if image.format == "PNG" else encode_png(np.asarray(rgb))
    except UnidentifiedImageError:
        raise FrameError("not a picture") from None
    except (*UNREADABLE, MemoryError) as error:
        raise FrameError(" ".join(str(error).split()) or type(error).__name__) from error
    return Frame(png, np.asarray(fit_tile(rgb)))


def _check_chunks(png: bytes) -> None:
    """Check every chunk's length and checksum up to IEND: Pillow skips those of the pixels, stricter readers do not."""
    view, position = memoryview(png), len(PNG_SIGNATURE)
    while position + 12 <= len(png):
        length = int.from_bytes(view[position : position + 4])
        end = position + 12 + length
        if end > len(png):
            break
        if zlib.crc32(view[position + 4 : end - 4]) != int.from_bytes(view[end - 4 : end]):
            raise FrameError("a PNG chunk has a wrong checksum")
        if view[position + 4 : position + 8] == b"IEND":
            return
        position = end
    raise FrameError("PNG is cut off")


def fit_tile(image: Image.Image) -> Image.Image:
    """Return `image` as RGB at 240x160; another size is resized with a box filter, exact for whole multiples."""
    image = image if image.mode == "RGB" else to_rgb(image)
    return image if image.size == FRAME_SIZE_PX else image.resize(FRAME_SIZE_PX, Image.Resampling.BOX)


def draw_label(image: Image.Image, index: int) -> None:
    """Write a tile's time label into its top left corner: white on black, t=0 is the oldest."""
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, LABEL_SIZE_PX[0] - 1, LABEL_SIZE_PX[1] - 1), fill=(0, 0, 0))
    # The bitmap font is part of Pillow and the same in every build; its TrueType default is not.
    draw.text((3, 0), f"t={index}", fill=(255, 255, 255), font=ImageFont.load_default_imagefont())


@functools.cache
def label(index: int) -> np.ndarray:
    """Return the pixels of a tile's time label, which covers its top left corner."""
    image = Image.new("RGB", LABEL_SIZE_PX)
    draw_label(image, index)
    return np.asarray(image)


def four_tiles(tiles: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return the last four of `tiles`, the first repeated where there are fewer."""
    tiles = list(tiles[-NUM_TILES:])
    return [tiles[0]] * (NUM_TILES - len(tiles)) + tiles


def compose_grid(tiles: Sequence[np.ndarray]) -> np.ndarray:
    """Return the last four of `tiles` (each (160, 240, 3), oldest first) as one picture, uint8 (320, 480, 3).

    t=0 is top left, t=3, the newest, bottom right; of fewer than four the first is repeated.
    """
    grid = np.empty((GRID_SIZE_PX[1], GRID_SIZE_PX[0], 3), np.uint8)
    width, height = FRAME_SIZE_PX
    for index, tile in enumerate(four_tiles(tiles)):
        top, left = index // 2 * height, index % 2 * width
        grid[top : top + height, left : left + width] = tile
        grid[top : top + LABEL_SIZE_PX[1], left : left + LABEL_SIZE_PX[0]] = label(index)
    return grid


class GridEncoder:
    """Encode the grids of one session, in order: the same pixels as `compose_grid`, about half the work.

    Two frames that follow each other are the lower half of one grid and, two turns later, the upper half of another.
    Apart from the labels in the first rows both are the same pixels, so these are compressed once.
    """

    def __init__(self) -> None:
        self._halves: collections.deque[tuple[np.ndarray, np.ndarray, Band]] = collections.deque(maxlen=3)

    def encode(self, tiles: Sequence[np.ndarray]) -> bytes:
        """Return the PNG of the last four of `tiles`."""
        tiles = four_tiles(tiles)
        bands = []
        for first in (0, 2):
            left, right = tiles[first : first + 2]
            tops = [tile[: LABEL_SIZE_PX[1]].copy() for tile in (left, right)]
            for index, top in enumerate(tops, start=first):
                top[:, : LABEL_SIZE_PX[0]] = label(index)
            bands += [compress_rows(*tops), self._compress_below_labels(left, right)]
        return join_bands(bands, width=GRID_SIZE_PX[0], height=GRID_SIZE_PX[1])

    def _compress_below_labels(self, left: np.ndarray, right: np.ndarray) -> Band:
        for known_left, known_right, band in self._halves:
            if known_left is left and known_right is right:
                return band
        band = compress_rows(left[LABEL_SIZE_PX[1] :], right[LABEL_SIZE_PX[1] :])
        self._halves.append((left, right, band))
        return band
