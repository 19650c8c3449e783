"""The grid that Eevee v1 drew on its screenshots is undone exactly, and nothing else is touched."""

import base64
import io
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from pokegemma.data.convert import WindowOptions
from pokegemma.data.corpus import convert_corpus
from pokegemma.data.eevee_v1 import overlay
from pokegemma.data.eevee_v1.overlay import blend, draw_overlay, remove_overlay
from tests.conftest import turn_record, write_session


def random_screen(seed: int = 0) -> np.ndarray:
    """Return a screen whose colours are those of a Game Boy Advance."""
    return (8 * np.random.default_rng(seed).integers(0, 32, (160, 240, 3))).astype(np.uint8)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_the_grid_is_drawn_as_pillow_draws_it() -> None:
    screen, alpha = random_screen(), overlay._tables()[0]
    grey = Image.fromarray(np.dstack([np.full((160, 240, 3), 204, np.uint8), alpha]))
    drawn = Image.alpha_composite(Image.fromarray(screen).convert("RGBA"), grey).convert("RGB")
    assert np.array_equal(np.asarray(drawn), draw_overlay(screen))
    assert (blend(0, 100), blend(248, 100)) == (80, 231)


def test_the_undo_is_exact_for_every_colour() -> None:
    undone, found = remove_overlay(draw_overlay(random_screen()))
    assert found == "removed"
    assert np.array_equal(undone, random_screen())


def test_a_screen_without_the_grid_stays() -> None:
    undone, found = remove_overlay(random_screen())
    assert found == "none"
    assert np.array_equal(undone, random_screen())


def test_a_box_over_the_grid_leaves_the_lines_to_undo() -> None:
    drawn = draw_overlay(random_screen())
    drawn[:20, 180:] = 1
    undone, found = remove_overlay(drawn)
    assert found == "lines_removed"
    assert np.array_equal(undone[40], random_screen()[40])
    assert np.array_equal(undone[:20, 180:], drawn[:20, 180:])
    assert np.array_equal(undone[42:50, 1:9], drawn[42:50, 1:9])  # a label


def test_real_screenshots_are_undone_so_that_the_grid_gives_them_again(real_runs: Path) -> None:
    counts = {"removed": 0, "lines_removed": 0, "none": 0}
    for path in sorted(real_runs.glob("*/sshots/*.png"))[::8]:
        with Image.open(path) as image:
            recorded = np.asarray(image.convert("RGB"))
        undone, found = remove_overlay(recorded)
        counts[found] += 1
        if found == "removed":
            assert np.array_equal(draw_overlay(undone), recorded), path
            assert (undone % 8 == 0).all(), path
    assert counts["none"] == 0
    assert counts["removed"] > 5 * counts["lines_removed"] > 0


@pytest.mark.parametrize("remove", [False, True])
def test_the_converter_undoes_screenshots_and_counts_them(tmp_path: Path, remove: bool) -> None:
    screens = [draw_overlay(random_screen(1)), draw_overlay(random_screen(2)), random_screen(3)]
    raw = {"turn_number": 3, "screenshot_base64": base64.b64encode(png(screens[2])).decode()}
    turns = [turn_record(number) for number in (1, 2, 3)]
    folder = write_session(tmp_path / "runs" / "session_s", turns, steps=[], enhanced_turns=[raw])
    for number in (1, 2):
        (folder / "sshots" / f"step_{number:04d}_grid.png").write_bytes(png(screens[number - 1]))
    window = WindowOptions(remove_overlay=remove)
    report = convert_corpus(tmp_path / "runs", tmp_path / "out", window=window, eval_fraction=0, num_workers=1)
    assert report.get("overlays") == ({"removed": 2} if remove else None)
    assert json.loads((tmp_path / "out" / "conversion_report.json").read_text()) == report
    for number in (1, 2, 3):
        with Image.open(tmp_path / "out" / "frames" / "s" / f"{number:04d}.png") as image:
            expected = random_screen(number) if remove else screens[number - 1]
            assert np.array_equal(np.asarray(image), expected)
    with Image.open(tmp_path / "out" / "grid_images" / "s_0003.png") as grid:
        newest, before = np.asarray(grid)[180:, 270:], np.asarray(grid)[180:, :240]
    assert np.array_equal(newest, random_screen(3)[20:, 30:])
    assert np.array_equal(before, random_screen(2)[20:]) == remove


def overlap(pixels: np.ndarray, dx: int, dy: int) -> np.ndarray:
    """Return the part of a picture that a scroll by (dx, dy) pixels keeps in view."""
    return pixels[max(0, dy) : 160 + min(0, dy), max(0, dx) : 240 + min(0, dx)]


@pytest.mark.slow
def test_what_the_grid_covered_is_what_the_scrolled_screenshot_shows(real_runs: Path) -> None:
    """The same scene, scrolled by whole tiles: pixels under the grid in one screenshot are free in the next."""
    alpha, num_pairs, num_pixels, error = overlay._tables()[0], 0, 0, 0
    for folder in sorted(real_runs.glob("*/sshots")):
        screens = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.glob("*.png"))]
        undone = [screen for screen, found in map(remove_overlay, screens) if found == "removed"]
        for first, second in itertools.pairwise(undone):
            for dx, dy in [(0, 16), (0, -16), (16, 0), (-16, 0), (0, 32), (0, -32), (32, 0), (-32, 0)]:
                under, free = overlap(alpha, dx, dy) > 0, overlap(alpha, -dx, -dy) == 0
                difference = np.abs(overlap(first, dx, dy).astype(int) - overlap(second, -dx, -dy)).max(-1)
                moved = ~under & free & (difference > 0)  # sprites and text boxes do not scroll
                if np.array_equal(first, second) or moved[~under & free].mean() > 0.05:
                    continue
                near_moved = np.asarray(Image.fromarray(moved.astype(np.uint8)).filter(ImageFilter.MaxFilter(9))) > 0
                compared = difference[under & free & ~near_moved]
                num_pairs, num_pixels, error = num_pairs + 1, num_pixels + compared.size, max(error, compared.max())
    assert (num_pairs > 100, num_pixels > 300_000, error) == (True, True, 0)
