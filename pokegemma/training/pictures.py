"""Files of pictures to what SigLIP takes."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from transformers import Gemma3Processor

from pokegemma.errors import PokegemmaError


def read_pictures(processor: Gemma3Processor, paths: Sequence[str | Path]) -> torch.Tensor:
    """Return pictures resized and normalised, (pictures, 3, height, width) float32.

    Raises:
        PokegemmaError: one cannot be read.
    """
    images = [_open(path) for path in paths]
    # Pan-and-scan would add crops that the prompt has no tokens for.
    return processor.image_processor(images, return_tensors="pt", do_pan_and_scan=False)["pixel_values"]


def _open(path: str | Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError) as error:
        raise PokegemmaError(f"{path} cannot be read as a picture: {error}") from error
