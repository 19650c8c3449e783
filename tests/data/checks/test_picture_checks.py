from dataclasses import replace

import pytest
from PIL import Image

from pokegemma.data.checks.pictures import check_grids, check_pictures, check_windows, scan_pictures
from pokegemma.data.grids import draw_label
from tests.datasets import draw_frame, make_sample, with_grids, write_dataset, write_split


def scan_and_check(*splits, num_workers=1):
    return check_pictures(splits, scan_pictures(splits, num_workers=num_workers))


@pytest.fixture
def split(tmp_path):
    """Return a split of four samples with a frame each."""
    return write_split(tmp_path / "train.jsonl", [make_sample("s", turn, "up") for turn in (1, 2, 3, 4)])


def frame(split, turn):
    return split.folder / f"frames/s/{turn:04d}.png"


def test_good_pictures_pass_and_each_is_decoded_once(tmp_path):
    samples = [make_sample("s", 1, "up"), make_sample("s", 2, "up", frames=("frames/s/0001.png", "frames/s/0002.png"))]
    check = scan_and_check(write_split(tmp_path / "train.jsonl", samples))
    assert (check.status, check.summary) == ("PASS", "2 distinct pictures (240x160) decode, none of one colour")


def test_a_missing_picture_fails_and_names_its_sample(split):
    frame(split, 2).unlink()
    check = scan_and_check(split)
    assert check.status == "FAIL"
    assert check.details == (
        "train.jsonl:2 (s/2): frames/s/0002.png: not found (paths are relative to the JSONL file)",
    )


def test_a_name_too_long_for_a_file_system_fails(tmp_path):
    split = write_split(tmp_path / "train.jsonl", [make_sample("s", 1, "up", frames=("x" * 300,))], draw=False)
    assert scan_and_check(split).details[0].endswith("x: File name too long")


def test_a_truncated_picture_fails_though_its_header_reads(split):
    data = frame(split, 3).read_bytes()
    frame(split, 3).write_bytes(data[: len(data) - 60])
    check = scan_and_check(split)
    assert check.status == "FAIL"
    assert check.details[0].startswith("train.jsonl:3 (s/3): frames/s/0003.png: does not decode")


def test_a_file_that_is_no_picture_fails(split):
    frame(split, 3).write_text("<html>404</html>")
    assert "does not decode" in scan_and_check(split).details[0]


def test_a_link_out_of_the_dataset_fails_and_one_inside_does_not(split, tmp_path_factory):
    outside = tmp_path_factory.mktemp("elsewhere") / "frame.png"
    draw_frame(outside, 9)
    frame(split, 1).unlink()
    frame(split, 1).symlink_to(outside)
    frame(split, 2).unlink()
    frame(split, 2).symlink_to(frame(split, 3))
    assert scan_and_check(split).details == (
        "train.jsonl:1 (s/1): frames/s/0001.png: a symbolic link leads out of the dataset folder",
    )


@pytest.mark.parametrize("size", [(16, 16), (5000, 100), (900, 100)])
def test_a_picture_that_is_no_screen_fails(split, size):
    Image.effect_noise(size, 50).save(frame(split, 1))
    assert f"{size[0]}x{size[1]} px is not a screen" in scan_and_check(split).details[0]


@pytest.mark.parametrize("colour", [(0, 0, 0), (128, 128, 128)])
def test_a_sample_that_shows_one_colour_only_fails(split, colour):
    Image.new("RGB", (240, 160), colour).save(frame(split, 4))
    check = scan_and_check(split)
    assert check.status == "FAIL"
    assert "train.jsonl:4 (s/4): every frame has one colour only" in check.details


def test_a_grid_picture_of_one_colour_fails(split):
    Image.new("RGB", (480, 320), (0, 0, 0)).save(split.folder / "grid.png")
    samples = [replace(sample, image="grid.png") for sample in split.samples()]
    check = scan_and_check(write_split(split.path, samples))
    assert check.status == "FAIL"
    assert "train.jsonl:1 (s/1): grid.png has one colour only" in check.details


def test_a_fade_to_black_among_other_frames_warns(tmp_path):
    names = tuple(f"frames/s/{turn:04d}.png" for turn in range(1, 31))
    split = write_split(tmp_path / "train.jsonl", [make_sample("s", 30, "up", frames=names)])
    Image.new("RGB", (240, 160)).save(frame(split, 7))
    check = scan_and_check(split)
    assert (check.status, check.details) == ("WARN", ("0007.png: one colour only",))


def test_worker_processes_find_the_same(tmp_path):
    splits = write_dataset(tmp_path, num_turns=80)
    (tmp_path / "frames/s1/0001.png").unlink()
    alone, together = (scan_pictures(splits, num_workers=number) for number in (1, 2))
    assert len(alone.digests) == 479
    assert alone == together


def compare_grids(split, *, num_workers=1):
    return check_grids([split], scan_pictures([split], num_workers=1), num_workers=num_workers)


def test_grids_that_show_their_frames_pass_whatever_their_labels(split):
    assert compare_grids(split).status == "SKIP"
    split = write_split(split.path, with_grids(split))
    grid = Image.open(split.folder / "grids/s_0002.png")
    draw_label(grid, 3)
    grid.save(split.folder / "grids/s_0002.png")
    check = compare_grids(split)
    assert (check.status, check.summary) == (
        "PASS",
        "0 of 4 grid pictures compared (of 4) differ from their frames",
    )


def test_a_black_grid_with_labels_fails_against_its_frames(split):
    split = write_split(split.path, with_grids(split))
    grid = Image.new("RGB", (480, 320))
    draw_label(grid, 0)
    grid.save(split.folder / "grids/s_0003.png")
    assert scan_and_check(split).status == "PASS"
    check = compare_grids(split)
    assert check.status == "FAIL"
    assert check.details == ("train.jsonl:3 (s/3): grids/s_0003.png: t=0, t=1, t=2, t=3 not as in the frames",)


def test_one_stale_tile_and_a_grid_of_another_size_fail(split):
    split = write_split(split.path, with_grids(split))
    path = split.folder / "grids/s_0001.png"
    grid = Image.open(path)
    grid.putpixel((479, 319), (1, 2, 3))
    grid.save(path)
    Image.effect_noise((240, 160), 50).save(split.folder / "grids/s_0004.png")
    assert compare_grids(split).details == (
        "train.jsonl:1 (s/1): grids/s_0001.png: t=3 not as in the frames",
        "train.jsonl:4 (s/4): grids/s_0004.png: 240x160 px, not 480x320",
    )


def test_worker_processes_find_the_same_grids_and_not_all_are_compared(tmp_path, monkeypatch):
    monkeypatch.setattr("pokegemma.data.checks.pictures.MAX_GRIDS_COMPARED", 110)
    train, _ = write_dataset(tmp_path, num_turns=30)
    train = write_split(train.path, with_grids(train))
    for path in sorted((tmp_path / "grids").iterdir())[:60]:
        Image.effect_noise((480, 320), 50).save(path)
    alone, together = compare_grids(train), compare_grids(train, num_workers=2)
    assert alone == together
    assert 40 < len(alone.details) < 60
    assert "of 110 grid pictures compared (of 120)" in alone.summary


def test_windows_of_other_names_but_the_same_pixels_are_found(tmp_path):
    train = write_split(tmp_path / "train.jsonl", [make_sample("s", turn, "up") for turn in (1, 2)])
    held_out = write_split(tmp_path / "eval.jsonl", [make_sample("t", turn, "up") for turn in (1, 2)])
    assert check_windows(train, held_out, scan_pictures([train, held_out], num_workers=1)).status == "PASS"
    Image.open(frame(train, 2)).save(tmp_path / "frames/t/0001.png", compress_level=1)
    check = check_windows(train, held_out, scan_pictures([train, held_out], num_workers=1))
    assert (check.status, check.summary) == ("FAIL", "1 of 2 eval windows are in train (50.0 %); at most 5 % may be")
    assert check.details == ("eval.jsonl:1 (t/1): the same frames are in train",)


def test_few_identical_windows_warn(tmp_path):
    train = write_split(tmp_path / "train.jsonl", [make_sample("s", 1, "up")])
    held_out = write_split(tmp_path / "eval.jsonl", [make_sample("t", turn, "up") for turn in range(1, 31)])
    Image.open(frame(train, 1)).save(tmp_path / "frames/t/0001.png")
    check = check_windows(train, held_out, scan_pictures([train, held_out], num_workers=1))
    assert (check.status, check.summary) == ("WARN", "1 of 30 eval windows are in train (3.3 %)")


def test_the_order_of_frames_belongs_to_a_window(tmp_path):
    names = ("frames/s/0001.png", "frames/s/0002.png")
    train = write_split(tmp_path / "train.jsonl", [make_sample("s", 2, "up", frames=names)])
    held_out = write_split(tmp_path / "eval.jsonl", [make_sample("t", 2, "up", frames=names[::-1])], draw=False)
    assert check_windows(train, held_out, scan_pictures([train, held_out], num_workers=1)).status == "PASS"
