import json

import pytest

from pokegemma.data.checks.records import (
    Split,
    check_answers,
    check_buttons,
    check_records,
    check_sessions,
    find_splits,
)
from pokegemma.data.prompts import build_output
from pokegemma.errors import PokegemmaError
from tests.datasets import make_sample, write_dataset, write_split


@pytest.fixture
def write(tmp_path):
    """Return a function that writes samples (no pictures) as a split."""
    return lambda samples, name="train": write_split(tmp_path / f"{name}.jsonl", samples, draw=False)


def test_a_good_dataset_passes_every_check_of_its_lines(tmp_path):
    train, held_out = write_dataset(tmp_path)
    splits = [train, held_out]
    checks = [
        check_records(splits),
        check_answers(splits),
        check_buttons(train, held_out),
        check_sessions(train, held_out),
    ]
    assert [check.status for check in checks] == ["PASS"] * 4
    assert checks[0].summary == "80 train + 40 eval samples, every line a sample, every id once"


def test_every_bad_line_is_named_in_one_pass(tmp_path):
    good = make_sample("s", 1, "up").to_json()
    absolute = json.dumps({**json.loads(good), "id": "s/2", "frames": ["/home/me/1.png"]})
    path = tmp_path / "train.jsonl"
    path.write_text(f"{good}\nnot json\n\n[1]\n{absolute}\n", encoding="utf-8")
    check = check_records([Split("train", path)])
    assert check.status == "FAIL"
    assert [detail.split(": ", 1)[0] for detail in check.details] == [
        "train.jsonl:2",
        "train.jsonl:4",
        "train.jsonl:5",
    ]
    assert "is not a relative path" in check.details[2]


def test_an_id_in_both_splits_fails(write):
    train, held_out = write([make_sample("s", 1, "up")]), write([make_sample("s", 1, "up")], "eval")
    check = check_records([train, held_out])
    assert (check.status, check.details) == ("FAIL", ("eval.jsonl:1: id 's/1' was used before",))


def test_a_file_without_samples_fails_and_what_needs_samples_is_skipped(write):
    empty = write([])
    assert check_records([empty]).details == ("train.jsonl contains no sample",)
    assert check_answers([empty]).status == "SKIP"
    assert check_buttons(empty, None).status == "SKIP"
    assert check_sessions(empty, empty).status == "SKIP"


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("press up", "not JSON"),
        (build_output(button="jump", reasoning="", context=""), "button 'jump' is not one of"),
        ('{"reasoning": "go", "button": "up"}', "output does not begin with"),
        (build_output(button="down", reasoning="", context=""), "metadata.buttons ['up']"),
    ],
)
def test_a_bad_answer_fails_and_is_named(write, output, message):
    split = write([make_sample("s", 1, "up"), make_sample("s", 2, "up", output=output)])
    check = check_answers([split])
    assert check.status == "FAIL"
    assert len(check.details) == 1
    assert check.details[0].startswith("train.jsonl:2 (s/2): ")
    assert message in check.details[0]


def test_an_unknown_earlier_button_fails(write):
    check = check_answers([write([make_sample("s", 1, "up", ["jump"])])])
    assert check.status == "FAIL"
    assert "metadata.previous_buttons: 'jump'" in check.details[0]


def test_one_button_only_fails(write):
    check = check_buttons(write([make_sample("s", turn, "a") for turn in (1, 2, 3)]), None)
    assert (check.status, check.summary) == ("FAIL", "train presses a only: nothing to learn")


def test_a_lopsided_distribution_warns(write):
    samples = [make_sample("s", turn, "a" if turn % 5 else "up") for turn in range(1, 11)]
    check = check_buttons(write(samples), None)
    assert check.status == "WARN"
    assert check.summary == "a 80.0 %, up 20.0 %: a model that always presses a looks good"


def test_a_button_that_only_eval_has_warns(write):
    train = write([make_sample("s", 1, "a"), make_sample("s", 2, "up")])
    check = check_buttons(train, write([make_sample("t", 1, "select")], "eval"))
    assert check.status == "WARN"
    assert check.summary == "a 50.0 %, up 50.0 %; eval also has select"


def test_a_session_in_both_splits_fails_whatever_its_turns(write):
    train = write([make_sample("s", 1, "up"), make_sample("t", 1, "up")])
    check = check_sessions(train, write([make_sample("s", 2, "up")], "eval"))
    assert (check.status, check.summary) == ("FAIL", "1 shared by 2 train and 1 eval sessions")
    assert check.details == ("s",)


def test_splits_are_found_in_a_folder_or_named(tmp_path):
    train, held_out = write_dataset(tmp_path / "one", num_sessions=3, num_turns=2)
    assert find_splits(tmp_path / "one") == (train, held_out)
    other = write_split(tmp_path / "two" / "eval.jsonl", [make_sample("z", 1, "up")], draw=False)
    assert find_splits(tmp_path / "one", tmp_path / "two") == (train, other)
    assert find_splits(other.path)[1] is None
    with pytest.raises(PokegemmaError, match="three not found"):
        find_splits(tmp_path / "one", tmp_path / "three")
