from dataclasses import replace

from PIL import Image

from pokegemma.data.checks.contact_sheet import draw_samples, write_contact_sheet
from tests.datasets import make_sample, write_dataset, write_split


def test_the_sheet_shows_twelve_samples_and_is_the_same_for_the_same_seed(tmp_path):
    splits = write_dataset(tmp_path / "data")
    assert write_contact_sheet(splits, tmp_path / "one.png", layout="frames", seed=1) == 12
    write_contact_sheet(splits, tmp_path / "two.png", layout="frames", seed=1)
    write_contact_sheet(splits, tmp_path / "three.png", layout="frames", seed=2)
    one, two, three = ((tmp_path / f"{name}.png").read_bytes() for name in ("one", "two", "three"))
    assert one == two
    assert one != three
    with Image.open(tmp_path / "one.png") as sheet:
        assert sheet.size == (1980, 1578)
        assert sheet.getpixel((12 + 100, 12 + 100)) == (250, 250, 250)  # the frame's white square, doubled in size


def test_samples_are_drawn_from_the_whole_of_both_splits(tmp_path):
    train, held_out = write_dataset(tmp_path, num_turns=4)
    everything = [sample.id for split in (train, held_out) for sample in split.samples()]
    assert [sample.id for _, sample in draw_samples([train, held_out], number=100)] == everything
    seen = {sample.id for seed in range(200) for _, sample in draw_samples([train, held_out], number=3, seed=seed)}
    assert seen == set(everything)


def test_a_picture_that_cannot_be_read_is_drawn_as_a_red_frame(tmp_path):
    split = write_split(tmp_path / "train.jsonl", [make_sample("s", 1, "up", output="?")])
    (tmp_path / "frames/s/0001.png").write_text("no picture")
    assert write_contact_sheet([split], tmp_path / "sheet.png", layout="frames") == 1
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.getpixel((12, 12)) == (0xB0, 0x00, 0x20)


def test_the_grid_layout_shows_the_grid_picture(tmp_path):
    split = write_split(tmp_path / "train.jsonl", [replace(make_sample("s", 1, "up"), image="grid.png")])
    Image.new("RGB", (480, 320), (1, 200, 3)).save(tmp_path / "grid.png")
    write_contact_sheet([split], tmp_path / "sheet.png", layout="grid")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.getpixel((12 + 479, 12 + 319)) == (1, 200, 3)


def test_without_samples_nothing_is_written(tmp_path):
    assert write_contact_sheet([write_split(tmp_path / "train.jsonl", [])], tmp_path / "s.png", layout="grid") == 0
    assert not (tmp_path / "s.png").exists()
