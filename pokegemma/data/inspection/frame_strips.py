"""The pictures of a session in few files: distinct frames below each other, each strip one lossless WebP."""

import hashlib
import io

import numpy as np
from PIL import Image

from pokegemma.data.frame_pictures import FRAME_SIZE_PX

FRAMES_PER_STRIP = 32
"""Frames of a session repeat each other's tiles, which the compressor finds within one picture. The 657 real frames
have 8.7 kB each as single pictures, 4.3 kB in strips of 32 (of a whole page), and 2.8 kB in strips of 64; lossy ones
have 7.4 kB."""

_DIGEST_BYTES = 8


class FrameStrips:
    """Collect the distinct frames of a session, by their pixels."""

    def __init__(self) -> None:
        self._tiles: dict[str, np.ndarray] = {}
        self._places: dict[str, int] = {}

    def add(self, tile: np.ndarray) -> int:
        """Return the place of a frame, uint8 (160, 240, 3), among the distinct ones."""
        digest = hashlib.blake2b(np.ascontiguousarray(tile), digest_size=_DIGEST_BYTES).hexdigest()
        self._tiles.setdefault(digest, tile)
        return self._places.setdefault(digest, len(self._places))

    @property
    def digests(self) -> tuple[str, ...]:
        """The hash of each distinct frame's pixels, in the order of their places."""
        return tuple(self._places)

    def encode(self) -> tuple[bytes, ...]:
        """Return the strips: frame k is row `k % FRAMES_PER_STRIP` of strip `k // FRAMES_PER_STRIP`."""
        tiles = list(self._tiles.values())
        parts = [tiles[start : start + FRAMES_PER_STRIP] for start in range(0, len(tiles), FRAMES_PER_STRIP)]
        return tuple(_encode_webp(np.concatenate(part)) for part in parts)


def _encode_webp(pixels: np.ndarray) -> bytes:
    assert pixels.shape[1:] == (FRAME_SIZE_PX[0], 3)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "WEBP", lossless=True, quality=60, method=4)
    return buffer.getvalue()
