"""Options of the converter that leave out decisions: presses without effect, and repeats."""

import json
from pathlib import Path

import pytest

from pokegemma.data.convert import WindowOptions
from pokegemma.data.corpus import convert_corpus
from pokegemma.data.samples import Sample, read_samples
from pokegemma.errors import CheckFailedError
from tests.conftest import failed_turn, raw_frame, turn_record, write_session
from tests.processes import call_script


def convert_screens(tmp_path: Path, screens: list[int], turns: list, **window) -> tuple[list[Sample], dict]:
    """Convert one session whose turn N shows `screens[N - 1]`; return its samples and the report's reasons."""
    raw = [raw_frame(turn, red) for turn, red in enumerate(screens, start=1)]
    write_session(tmp_path / "runs" / "session_s", turns, steps=[], enhanced_turns=raw)
    report = convert_corpus(
        tmp_path / "runs", tmp_path / "out", window=WindowOptions(**window), eval_fraction=0, num_workers=1
    )
    written = json.loads((tmp_path / "out" / "conversion_report.json").read_text())
    assert written == report
    return list(read_samples(tmp_path / "out" / "train.jsonl")), report["turns_without_sample"]


def turns_of(samples: list[Sample]) -> list[int]:
    return [sample.metadata["turn"] for sample in samples]


def test_a_press_that_leaves_the_screen_as_it_was_is_left_out_and_counted(tmp_path):
    turns = [turn_record(number, button) for number, button in enumerate(["up", "up", "a", "b"], start=1)]
    samples, reasons = convert_screens(tmp_path, [5, 5, 9, 9], turns, drop_no_effect=True)
    assert turns_of(samples) == [2, 4]  # the effect of the last one is unknown
    assert reasons["no_effect"] == 2
    assert samples[1].question == "Buttons pressed so far: up, up, a\nNext button?"
    assert samples[1].metadata["frame_turns"] == [1, 2, 3, 4]


def test_without_the_options_nothing_is_left_out_or_named(tmp_path):
    samples, reasons = convert_screens(tmp_path, [5, 5, 5], [turn_record(number) for number in (1, 2, 3)])
    assert turns_of(samples) == [1, 2, 3]
    assert not {"no_effect", "repeated"} & set(reasons)


def test_an_unknown_effect_keeps_the_decision(tmp_path):
    turns = [turn_record(1), turn_record(2), turn_record(3)]
    raw = [raw_frame(1, 5), raw_frame(3, 5)]
    write_session(tmp_path / "runs" / "session_s", turns, steps=[], enhanced_turns=raw)
    window = WindowOptions(drop_no_effect=True)
    report = convert_corpus(tmp_path / "runs", tmp_path / "out", window=window, eval_fraction=0, num_workers=1)
    assert report["samples"] == 2
    assert report["turns_without_sample"]["frame_missing"] == 1


def test_the_frame_of_a_turn_without_a_decision_shows_the_effect(tmp_path):
    turns = [turn_record(1), failed_turn(2), turn_record(3)]
    samples, reasons = convert_screens(tmp_path, [5, 5, 7], turns, drop_no_effect=True)
    assert turns_of(samples) == [3]
    assert (reasons["no_effect"], reasons["parse_failed"]) == (1, 1)


def test_a_press_that_was_corrected_keeps_its_label(tmp_path):
    corrected = turn_record(1, "up", correction={"button": "down", "by": "human"})
    samples, _ = convert_screens(tmp_path, [5, 5], [corrected, turn_record(2)], drop_no_effect=True)
    assert turns_of(samples) == [1, 2]


def test_a_loaded_state_shows_no_effect_of_the_press_before(tmp_path):
    turns = [turn_record(1), turn_record(2, new_start=True)]
    assert turns_of(convert_screens(tmp_path, [5, 5], turns, drop_no_effect=True)[0]) == [1, 2]


@pytest.mark.parametrize(("most", "kept"), [(1, [1, 4, 6]), (2, [1, 2, 4, 6]), (4, [1, 2, 3, 4, 5, 6])])
def test_equal_decisions_on_equal_screens_of_a_session_are_thinned(tmp_path, most, kept):
    buttons, screens = ["a", "a", "a", "b", "a", "a"], [5, 5, 5, 5, 5, 9]
    turns = [turn_record(number, button) for number, button in enumerate(buttons, start=1)]
    samples, reasons = convert_screens(tmp_path, screens, turns, max_repeats=most)
    assert turns_of(samples) == kept
    assert reasons.get("repeated", 0) == 6 - len(kept)


def test_the_same_sessions_are_held_out_with_the_options(tmp_path):
    for name, screens in (("a", [1, 1, 1, 1, 2]), ("b", [1, 2, 3]), ("c", [4, 5, 6, 7])):
        turns = [turn_record(number) for number in range(1, len(screens) + 1)]
        raw = [raw_frame(turn, red) for turn, red in enumerate(screens, start=1)]
        changes = {"start_time": name, "goal": name}
        write_session(tmp_path / "runs" / f"session_{name}", turns, steps=[], enhanced_turns=raw, **changes)
    splits = []
    for output, window in (("all", WindowOptions()), ("left", WindowOptions(drop_no_effect=True))):
        report = convert_corpus(tmp_path / "runs", tmp_path / output, window=window, eval_fraction=0.4, num_workers=1)
        splits.append({session["session"]: session["split"] for session in report["per_session"]})
    assert splits[0] == splits[1]
    assert set(splits[0].values()) == {"train", "eval"}


def test_a_session_that_loses_all_its_decisions_is_explained(tmp_path):
    with pytest.raises(CheckFailedError, match="--drop_no_effect"):
        convert_screens(tmp_path, [5, 5], [turn_record(1), failed_turn(2)], drop_no_effect=True)


def test_the_real_sessions_lose_53_and_36_decisions(real_runs, tmp_path):
    flags = ("--drop_no_effect", "--max_repeats", "1", "--no_grid_images", "--num_workers", "1")
    done = call_script("convert_eevee_data_v2", "--eevee_data_dir", real_runs, "--output_dir", tmp_path / "out", *flags)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "conversion_report.json").read_text())
    assert report["samples"] == 441
    assert [report["turns_without_sample"][reason] for reason in ("no_effect", "repeated")] == [53, 9]


def test_no_repeats_at_all_is_refused(tmp_path):
    done = call_script("convert_eevee_data_v2", "--eevee_data_dir", tmp_path, "--max_repeats", "0")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--max_repeats" in done.stderr
