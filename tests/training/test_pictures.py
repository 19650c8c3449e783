"""Pictures are prepared as the image processor does it, only faster."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pokegemma.errors import PokegemmaError
from pokegemma.training import models
from pokegemma.training.pictures import read_pictures


@pytest.mark.parametrize("mean", [(0.5, 0.5, 0.5), (0.4, 0.5, 0.6)])
def test_pixels_are_bit_for_bit_the_image_processors(mean: tuple[float, ...], tiny_model: Path, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (160, 240, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "frame.png")
    Image.fromarray(noise).quantize(16).save(tmp_path / "palette.png")
    Image.fromarray(noise[:40, :40, 0]).save(tmp_path / "grey.png")
    Image.fromarray(np.dstack([noise, noise[:, :, :1]])).save(tmp_path / "alpha.png")
    paths = sorted(tmp_path.iterdir())
    processor = models.load_processor(tiny_model)
    processor.image_processor.image_mean = list(mean)
    images = [Image.open(path).convert("RGB") for path in paths]
    expected = processor.image_processor(images, return_tensors="pt", do_pan_and_scan=False)["pixel_values"]
    pixels = read_pictures(processor, paths)
    assert pixels.shape == (4, 3, 56, 56)
    assert pixels.dtype == torch.float32
    assert torch.equal(pixels, expected)


def test_a_damaged_picture_is_named(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "frame.png").write_bytes(b"not a picture")
    with pytest.raises(PokegemmaError, match=r"frame\.png cannot be read as a picture"):
        read_pictures(models.load_processor(tiny_model), [tmp_path / "frame.png"])
