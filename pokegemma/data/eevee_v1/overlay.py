"""Undo the grid that Eevee v1 drew on its screenshots: an alpha blend of one grey, so the screen is still there.

v1 drew lines every 30 by 20 pixels with an alpha of 100 of 255 and a label "x,y" in each cell with up to 120, in the
grey 204. A Game Boy Advance has 32 levels a colour, multiples of 8. For each alpha, they are blended into 32 different
levels: each blended level has exactly one original. On 554 of 657 real screenshots all pixels of the grid have such a
level, so the undo is exact. The other 103 have labels of map coordinates and an opaque text in a corner; there only the
lines are undone.
"""

import functools
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

Overlay = Literal["removed", "lines_removed", "none"]

GREY = 204
LINE_ALPHA = 100
GRID_PX = (30, 20)

MIN_LINE_SHARE = 0.9
"""Share of the lines' pixels with a possible level, from which the lines are undone. Real screenshots with map
coordinates have 94 %, since the box in the corner covers the rest."""

_ALPHA_FILE = Path(__file__).with_name("overlay_alpha.png")
"""The alpha of each pixel: the one at which all 554 screenshots have a possible level there."""


def blend(level: int | np.ndarray, alpha: int | np.ndarray) -> int | np.ndarray:
    """Return a level of 0 to 255 under the grid, as Pillow's `alpha_composite` computes it on an opaque picture."""
    coefficient = 255 * 128 * alpha // 255
    sum_ = GREY * coefficient + level * (255 * 128 - coefficient) + (0x80 << 7)
    return ((sum_ >> 8) + sum_) >> 8 >> 7


@functools.cache
def _tables() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the alpha of each pixel, where the lines are, and the original of each blended level by alpha, else -1."""
    with Image.open(_ALPHA_FILE) as image:
        alpha = np.asarray(image)
    lines = np.zeros(alpha.shape, bool)
    lines[:: GRID_PX[1]] = lines[:, :: GRID_PX[0]] = True
    originals = np.full((256, 256), -1, np.int16)
    for value in np.unique(alpha[alpha > 0]):
        for level in range(0, 256, 8):
            originals[value, blend(level, int(value))] = level
    return alpha, lines, originals


def remove_overlay(pixels: np.ndarray) -> tuple[np.ndarray, Overlay]:
    """Return a screenshot, uint8 (160, 240, 3), without v1's grid, and what was undone.

    A screenshot without the grid is returned as it is.
    """
    alpha, lines, originals = _tables()
    found = originals[alpha[..., None], pixels]
    is_possible = (found >= 0).all(-1)
    undone = pixels.copy()
    if is_possible[alpha > 0].all():
        undone[alpha > 0] = found[alpha > 0]
        return undone, "removed"
    if is_possible[lines].mean() >= MIN_LINE_SHARE:
        undone[lines & is_possible] = found[lines & is_possible]
        return undone, "lines_removed"
    return pixels, "none"


def draw_overlay(pixels: np.ndarray) -> np.ndarray:
    """Return a screen, uint8 (160, 240, 3), with v1's grid."""
    alpha = _tables()[0][..., None].astype(int)
    return np.where(alpha > 0, blend(pixels.astype(int), alpha), pixels).astype(np.uint8)
