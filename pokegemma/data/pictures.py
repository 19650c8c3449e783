"""Open pictures."""

from pathlib import Path

from PIL import Image

from pokegemma.errors import PokegemmaError


def open_picture(path: str | Path) -> Image.Image:
    """Return a picture as RGB.

    Raises:
        PokegemmaError: it cannot be read.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError) as error:
        raise PokegemmaError(f"{path} cannot be read as a picture: {error}") from error
