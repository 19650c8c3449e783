"""Captures that stood still are found, in conversion and in the check; a player who is stuck is not."""

from pathlib import Path

import pytest

from pokegemma.data.checks.pictures import scan_pictures
from pokegemma.data.checks.records import Split
from pokegemma.data.checks.still_pictures import check_still, find_still
from pokegemma.data.convert import WindowOptions
from pokegemma.data.corpus import convert_corpus
from tests.conftest import frame_png, turn_record, write_session
from tests.datasets import make_sample, write_split

BUTTONS = ["up", "down", "left", "a"]


def decisions(pictures, buttons):
    return list(zip(range(1, len(pictures) + 1), pictures, buttons, strict=True))


@pytest.mark.parametrize(
    ("pictures", "buttons", "found"),
    [
        ("111111", "uuuuud", [(1, 6)]),  # a whole session
        ("11111", "udlru", []),  # too short to tell
        ("111111", "aaaaaa", []),  # one button
        ("0" + "1" * 16, "u" + "udlr" * 4, [(2, 17)]),  # a stretch
        ("1" * 16 + "0" + "1" * 16, "udlr" * 8 + "u", [(1, 16), (18, 33)]),
        ("0" + "1" * 15, "u" + "udl" * 5, []),
        ("0" + "1" * 16, "u" + "ud" * 8, []),  # stuck, back and forth
        ("0" + "1" * 8, "u" + "udlr" * 2, []),  # as in a real session
        ("", "", []),
    ],
)
def test_stretches_are_found_where_one_picture_meets_several_buttons(pictures, buttons, found):
    stretches = find_still(decisions(pictures, buttons))
    assert [(still.first_turn, still.last_turn) for still in stretches] == found


def write_sessions(folder: Path, *, num_still: int, num_moving: int) -> Split:
    samples = []
    for number in range(num_still + num_moving):
        for turn in range(1, 9):
            name = f"frames/s{number}/{1 if number < num_still else turn:04d}.png"
            samples.append(make_sample(f"s{number}", turn, BUTTONS[turn % 4], frames=(name,)))
    return write_split(folder / "train.jsonl", samples)


@pytest.mark.parametrize(("num_still", "status"), [(0, "PASS"), (1, "WARN"), (2, "FAIL")])
def test_the_check_names_sessions_and_fails_above_five_percent(tmp_path, num_still, status):
    split = write_sessions(tmp_path, num_still=num_still, num_moving=22)
    check = check_still([split], scan_pictures([split], num_workers=1))
    assert check.status == status
    assert [detail.split(" turns ")[0] for detail in check.details] == [
        f"train.jsonl: s{number}" for number in range(num_still)
    ]


def test_the_conversion_report_names_a_session_that_stood_still(tmp_path):
    turns = [turn_record(turn, BUTTONS[turn % 4]) for turn in range(1, 9)]
    write_session(tmp_path / "in" / "session_moving", turns)
    still = write_session(tmp_path / "in" / "session_still", turns, start_time="later")
    for path in (still / "sshots").iterdir():
        path.write_bytes(frame_png(77))
    report = convert_corpus(tmp_path / "in", tmp_path / "out", window=WindowOptions(), eval_fraction=0.0, num_workers=1)
    assert [problem[:28] for problem in report["problems"]] == ["session_still turns 1 to 8: "]


def test_the_real_sessions_and_the_toy_game_pass(real_dataset, toy_dataset):
    for folder in (real_dataset, toy_dataset):
        splits = [Split(name, folder / f"{name}.jsonl") for name in ("train", "eval")]
        assert check_still(splits, scan_pictures(splits, num_workers=1)).status == "PASS"
