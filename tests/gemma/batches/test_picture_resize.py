"""Pictures are prepared as the image processor does it, only faster; a damaged one is named."""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers.image_transforms import convert_to_rgb

from pokegemma.data.frame_pictures import fit_tile, read_frame, to_rgb
from pokegemma.engines.questions import read_picture
from pokegemma.errors import PokegemmaError
from pokegemma.gemma.batches.picture_resize import read_pictures
from pokegemma.gemma.loading import open_checkpoint


@pytest.mark.parametrize("mean", [(0.5, 0.5, 0.5), (0.4, 0.5, 0.6)])
def test_pixels_are_bit_for_bit_the_image_processors(mean: tuple[float, ...], tiny_model: Path, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (160, 240, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "frame.png")
    Image.fromarray(noise).quantize(16).save(tmp_path / "palette.png")
    Image.fromarray(noise[:40, :40, 0]).save(tmp_path / "grey.png")
    Image.fromarray(np.dstack([noise, noise[:, :, :1]])).save(tmp_path / "alpha.png")
    paths = sorted(tmp_path.iterdir())
    processor = open_checkpoint(tiny_model).processor
    processor.image_processor.image_mean = list(mean)
    images = [Image.open(path) for path in paths]
    expected = processor.image_processor(images, return_tensors="pt", do_pan_and_scan=False)["pixel_values"]
    pixels = read_pictures(processor, paths)
    assert pixels.shape == (4, 3, 56, 56)
    assert pixels.dtype == torch.float32
    assert torch.equal(pixels, expected)


def write_transparent_pictures(folder: Path) -> list[Path]:
    """Write noise as each kind of picture that may be transparent, as PNG, WebP and GIF."""
    generator = np.random.default_rng(0)
    rgba = Image.fromarray(generator.integers(0, 256, (40, 60, 4), dtype=np.uint8), "RGBA")
    palette = rgba.convert("RGB").quantize(16)
    rgba.save(folder / "rgba.png")
    rgba.save(folder / "rgba.webp", lossless=True)
    rgba.convert("LA").save(folder / "la.png")
    palette.save(folder / "palette.png", transparency=3)
    palette.save(folder / "palette_alpha.png", transparency=bytes(range(0, 256, 16)))
    palette.save(folder / "palette.gif", transparency=3)
    rgba.convert("RGB").save(folder / "rgb.png", transparency=rgba.convert("RGB").getpixel((0, 0)))
    rgba.convert("L").save(folder / "grey.png", transparency=rgba.convert("L").getpixel((0, 0)))
    return sorted(folder.iterdir())


def test_transparency_is_composited_as_the_image_processor_does(tiny_model: Path, tmp_path: Path) -> None:
    paths = write_transparent_pictures(tmp_path)
    processor = open_checkpoint(tiny_model).processor
    images = [Image.open(path) for path in paths]
    expected = processor.image_processor(images, return_tensors="pt", do_pan_and_scan=False)["pixel_values"]
    assert torch.equal(read_pictures(processor, paths), expected)


def test_transparency_is_the_same_in_conversion_questions_and_play(tiny_model: Path, tmp_path: Path) -> None:
    for path in write_transparent_pictures(tmp_path):
        expected = convert_to_rgb(Image.open(path), return_numpy=True)
        with Image.open(path) as image:
            assert np.array_equal(np.asarray(to_rgb(image)), expected)
        tile = read_frame(path.read_bytes()).tile
        assert np.array_equal(tile, np.asarray(fit_tile(Image.fromarray(expected)))), path.name
        question = read_picture(path, size_px=56)
        assert np.array_equal(np.asarray(question), np.asarray(Image.fromarray(expected).resize((56, 56), 2)))


NO_HEADER = b"\x89PNG\r\n\x1a\n\0\0\0\0IHDR" + bytes(17)  # Pillow raises ValueError


@pytest.mark.parametrize("content", [b"not a picture", NO_HEADER])
def test_a_damaged_picture_is_named(content: bytes, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "frame.png").write_bytes(content)
    with pytest.raises(PokegemmaError, match=r"frame\.png cannot be read as a picture"):
        read_pictures(open_checkpoint(tiny_model).processor, [tmp_path / "frame.png"])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_picture_that_is_cut_off_is_named_in_one_line(num_workers: int, tiny_model: Path, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (160, 240, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "frame.png")
    (tmp_path / "frame.png").write_bytes((tmp_path / "frame.png").read_bytes()[:300])
    collate = functools.partial(read_pictures, open_checkpoint(tiny_model).processor)
    with pytest.raises(PokegemmaError) as caught:
        list(DataLoader([tmp_path / "frame.png"], num_workers=num_workers, collate_fn=collate))
    assert str(caught.value).startswith(f"{tmp_path / 'frame.png'} cannot be read as a picture")
    assert "\n" not in str(caught.value)
