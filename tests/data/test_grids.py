import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from benchmarks.convert import convert_plainly
from pokegemma.data.frame_pictures import FrameError, read_frame
from pokegemma.data.grids import GridEncoder, compose_grid
from pokegemma.data.png import encode_png
from pokegemma.data.samples import Sample
from tests.conftest import frame_png


def noise_png(seed, size=(240, 160)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def middle(grid, column, row):
    return tuple(grid[80 + 160 * row, 120 + 240 * column].tolist())


def tile(value):
    return read_frame(frame_png(value)).tile


def test_the_newest_frame_is_bottom_right():
    grid = compose_grid([tile(value) for value in (1, 2, 3, 4)])
    assert grid.shape == (320, 480, 3)
    reds = [middle(grid, column, row)[0] for row in (0, 1) for column in (0, 1)]
    assert reds == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("values", "reds"), [((5,), [5, 5, 5, 5]), ((5, 6), [5, 5, 5, 6]), ((1, 2, 3, 4, 5, 6), [3, 4, 5, 6])]
)
def test_a_grid_repeats_the_first_of_few_frames_and_shows_the_last_of_many(values, reds):
    grid = compose_grid([tile(value) for value in values])
    assert [middle(grid, column, row)[0] for row in (0, 1) for column in (0, 1)] == reds


def test_each_tile_has_its_own_time_label():
    grid = compose_grid([tile(9)] * 4)
    labels = [grid[top : top + 12, left : left + 24].tobytes() for top in (0, 160) for left in (0, 240)]
    assert len(set(labels)) == 4
    assert all(np.frombuffer(label, np.uint8).max() == 255 for label in labels)


def test_the_grid_has_the_pixels_of_the_plain_way(tmp_path):
    frames = [f"{seed}.png" for seed in range(4)]
    for seed, name in enumerate(frames):
        (tmp_path / name).write_bytes(noise_png(seed))
    sample = Sample("s/1", tuple(frames), None, "c", "q", "o", {})
    convert_plainly([sample], tmp_path, tmp_path / "plain")
    plain = np.asarray(Image.open(tmp_path / "plain" / "grid_images" / "s_1.png"))
    ours = encode_png(compose_grid([read_frame(noise_png(seed)).tile for seed in range(4)]))
    with Image.open(io.BytesIO(ours)) as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(ours))), plain)


def test_the_encoder_of_a_session_has_the_pixels_of_single_grids():
    tiles = [read_frame(noise_png(seed)).tile for seed in range(9)]
    encoder = GridEncoder()
    windows = [tiles[max(0, last - 3) : last + 1] for last in range(len(tiles))]
    for window in [*windows, tiles[:1] * 4, tiles[:2], tiles[2:4] * 2]:
        content = encoder.encode(window)
        read_frame(content)  # checks every checksum
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(content))), compose_grid(window))


@given(st.integers(1, 9), st.integers(1, 9), st.randoms(use_true_random=False))
def test_an_encoded_png_decodes_to_the_same_pixels(width, height, random):
    pixels = np.frombuffer(random.randbytes(3 * width * height), np.uint8).reshape(height, width, 3)
    with Image.open(io.BytesIO(encode_png(pixels))) as image:
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), pixels)


def test_a_png_is_kept_byte_for_byte():
    content = noise_png(1)
    assert read_frame(content).png == content


@pytest.mark.parametrize("image_format", ["BMP", "WEBP", "GIF", "JPEG"])
def test_another_format_is_stored_as_png_with_the_same_pixels(image_format):
    content = frame_png(40, image_format=image_format)
    stored = read_frame(content).png
    with Image.open(io.BytesIO(stored)) as image, Image.open(io.BytesIO(content)) as original:
        assert image.format == "PNG"
        np.testing.assert_array_equal(np.asarray(image), np.asarray(original.convert("RGB")))


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGBA", "LA"])
@pytest.mark.parametrize("size", [(240, 160), (480, 320), (160, 144), (1, 1), (7, 3000)])
def test_every_size_and_mode_gives_a_tile(size, mode):
    frame = read_frame(frame_png(200, size=size, mode=mode))
    assert (frame.tile.shape, frame.tile.dtype) == ((160, 240, 3), np.uint8)


def test_a_doubled_frame_gives_the_same_tile_as_the_frame_itself():
    with Image.open(io.BytesIO(noise_png(3))) as image:
        buffer = io.BytesIO()
        image.resize((480, 320), Image.Resampling.NEAREST).save(buffer, "PNG")
    np.testing.assert_array_equal(read_frame(buffer.getvalue()).tile, read_frame(noise_png(3)).tile)


def bomb():
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return b"\x89PNG\r\n\x1a\n" + chunk + frame_png(1)[33:]


@pytest.mark.parametrize(
    "content",
    [b"", b"no picture", b"\x89PNG\r\n\x1a\n", frame_png(1)[:-12], frame_png(1)[:200], bomb(), b"%!PS-Adobe-3.0\n"],
    ids=["empty", "text", "signature", "no end", "cut off", "bomb", "postscript"],
)
def test_what_does_not_decode_completely_is_no_frame(content):
    with pytest.raises(FrameError) as error:
        read_frame(content)
    assert " at 0x" not in str(error.value), "an address in memory would make the report differ from run to run"


@given(st.integers(8, 5_000), st.integers(1, 255))
def test_a_changed_byte_is_noticed(position, change):
    content = bytearray(noise_png(2, size=(40, 30)))
    position = 8 + position % (len(content) - 20)
    content[position] ^= change
    with pytest.raises(FrameError):
        read_frame(bytes(content))


@given(st.binary(max_size=200))
def test_random_bytes_are_no_frame(content):
    with pytest.raises(FrameError):
        read_frame(b"\x89PNG\r\n\x1a\n" + content)
