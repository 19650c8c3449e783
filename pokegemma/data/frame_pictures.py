"""The picture of a frame: opened, checked, and resized to the size of a tile."""

import base64
import io
import re
import stat
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from pokegemma.data.png import PNG_SIGNATURE, encode_png
from pokegemma.errors import PokegemmaError, one_line

FRAME_SIZE_PX = (240, 160)


MAX_FRAME_PIXELS = 4096 * 4096
MAX_FRAME_BYTES = 64 * 1024 * 1024


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
    """Return a picture as RGB, with transparent pixels on white, as transformers' image processors do.

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
        raise FrameError(one_line(error, length=None) or type(error).__name__) from error
    return Frame(png, np.asarray(fit_tile(rgb)))


def read_recorded(source: str | Path) -> bytes:
    """Return the content of a recorded picture: base64 text, or a file.

    Raises:
        FrameError: it cannot be read, or is larger than `MAX_FRAME_BYTES`.
    """
    if isinstance(source, str):
        source = re.sub(r"^\s*data:image/[\w.+-]+;base64,", "", source, flags=re.IGNORECASE)
        try:
            return base64.b64decode("".join(source.split()), validate=True)
        except ValueError as error:
            raise FrameError("not base64") from error
    try:
        status = source.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_FRAME_BYTES:
            raise FrameError("not a file, or too large for a screenshot")
        return source.read_bytes()
    except OSError as error:
        raise FrameError(error.strerror or "cannot be read") from error


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
