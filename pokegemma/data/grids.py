"""The 2x2 pictures that are made of four frames."""

import collections
import functools
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pokegemma.data.frame_pictures import FRAME_SIZE_PX
from pokegemma.data.png import Band, compress_rows, join_bands

GRID_SIZE_PX = (480, 320)
NUM_TILES = 4
LABEL_SIZE_PX = (24, 12)


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
