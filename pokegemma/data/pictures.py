"""Open pictures."""

import struct
from pathlib import Path

from PIL import Image

from pokegemma.errors import PokegemmaError

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
"""What Pillow raises for damaged files: SyntaxError for a broken PNG chunk, ValueError for impossible headers, ..."""


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
