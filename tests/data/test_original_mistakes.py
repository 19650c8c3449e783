"""One test for each mistake of the original conversion scripts."""

import json
import random
from itertools import pairwise

import pytest

from pokegemma.data.convert import WindowOptions
from pokegemma.data.corpus import convert_corpus
from pokegemma.data.prompts import (
    build_context,
    build_messages,
    build_output,
    build_question,
    parse_answer,
)
from pokegemma.data.samples import read_samples
from pokegemma.errors import CheckFailedError
from tests.conftest import failed_turn, turn_record


def convert(tmp_path, *, eval_fraction=0.0):
    report = convert_corpus(
        tmp_path / "runs", tmp_path / "out", window=WindowOptions(), eval_fraction=eval_fraction, num_workers=1
    )
    paths = sorted((tmp_path / "out").glob("*.jsonl"))
    return report, {path.stem: list(read_samples(path)) for path in paths}


def test_the_prompt_holds_nothing_of_the_target_turn(make_session, tmp_path):
    # 671 of 671 published samples showed the target turn's reasoning and observations.
    make_session("s", [turn_record(turn, "start" if turn == 3 else "up") for turn in range(1, 5)])
    _, splits = convert(tmp_path)
    for sample in splits["train"]:
        prompt = json.dumps(build_messages(sample, "grid")[:1])
        assert "secret" not in prompt
    # The turn's own button may not show either, nor those of later turns.
    assert splits["train"][2].question == "Buttons pressed so far: up, up\nNext button?"
    assert splits["train"][3].question == "Buttons pressed so far: up, up, start\nNext button?"


def test_the_prompt_does_not_change_with_what_the_target_turn_decided(make_session, tmp_path):
    prompts = []
    for button, reasoning in (("up", "north"), ("a", "talk")):
        record = turn_record(2, button)
        record["ai_analysis"]["parsed_json"].update(
            reasoning=reasoning, observations=reasoning, context_detected=button
        )
        make_session("s", [turn_record(1), record])
        _, splits = convert(tmp_path)
        sample = splits["train"][1]
        prompts.append((sample.context, sample.question))
        for name in ("train.jsonl", "conversion_report.json", "run.json"):
            (tmp_path / "out" / name).unlink()
        for name in ("frames", "grid_images"):
            (tmp_path / "out" / name).rename(tmp_path / f"{name}_{button}")
    assert prompts[0] == prompts[1]


def test_no_session_and_no_frame_is_in_both_splits(make_session, tmp_path):
    # Windows were split at random: 83 % of the "test" windows had all their frames in training.
    for hour, name in enumerate("abcdefgh"):
        times = [f"2025-06-25T{hour:02d}:00:{turn:02d}" for turn in range(1, 6)]
        make_session(name, [turn_record(turn, timestamp=time) for turn, time in enumerate(times, start=1)])
    _, splits = convert(tmp_path, eval_fraction=0.25)
    assert {name: len(samples) for name, samples in splits.items()} == {"train": 30, "eval": 10}
    for key in (lambda sample: {sample.session}, lambda sample: set(sample.frames)):
        train, held_out = (set().union(*map(key, splits[name])) for name in ("train", "eval"))
        assert not train & held_out


def test_select_stays_select_and_unknown_buttons_never_become_a(make_session, tmp_path):
    make_session("s", [turn_record(1, "select"), turn_record(2, "jump"), turn_record(3, ["jump", "left"])])
    report, splits = convert(tmp_path)
    assert [parse_answer(sample.output).button for sample in splits["train"]] == ["select", "left"]
    assert report["turns_without_sample"]["invalid_button"] == 1


def test_a_pathfinding_turn_is_no_label(make_session, tmp_path):
    record = turn_record(1, [])
    record["ai_analysis"]["parsed_json"] = {"pathfinding_action": "find_path", "target_x": 1, "target_y": 2}
    make_session("s", [record, turn_record(2)])
    report, splits = convert(tmp_path)
    assert [sample.metadata["turn"] for sample in splits["train"]] == [2]
    assert report["turns_without_sample"]["pathfinding"] == 1


def test_failed_turns_are_no_labels(make_session, tmp_path):
    make_session(
        "s",
        [failed_turn(1), failed_turn(2, text="API Error: 500"), turn_record(3, action_result=False), turn_record(4)],
    )
    report, splits = convert(tmp_path)
    assert [sample.metadata["turn"] for sample in splits["train"]] == [4]
    counts = {reason: count for reason, count in report["turns_without_sample"].items() if count}
    assert counts == {"failed_answer": 1, "parse_failed": 1, "action_failed": 1}


def test_a_missing_frame_is_never_replaced_by_a_made_up_picture(make_session, tmp_path):
    # A fresh clone, without the pictures, trained on 100 % black images, "successfully".
    make_session("s", [turn_record(turn) for turn in (1, 2, 3)], steps=[])
    with pytest.raises(CheckFailedError, match="3 frame_missing"):
        convert(tmp_path)
    assert not (tmp_path / "out").exists()


def test_paths_are_relative_and_lead_to_the_pictures(make_session, tmp_path):
    make_session("s", [turn_record(turn) for turn in (1, 2)])
    _, splits = convert(tmp_path)
    moved = tmp_path / "elsewhere"
    (tmp_path / "out").rename(moved)
    assert str(tmp_path) not in (moved / "train.jsonl").read_text()
    assert all((moved / path).is_file() for sample in splits["train"] for path in (*sample.frames, sample.image))


def test_a_frame_is_stored_once(make_session, tmp_path):
    # Every frame was copied once a window: 2,684 files for 866 frames.
    make_session("s", [turn_record(turn) for turn in range(1, 21)])
    report, splits = convert(tmp_path)
    assert report["frames"] == len(list((tmp_path / "out" / "frames").rglob("*.png"))) == 20
    assert len(splits["train"]) == 20


def test_a_window_never_shows_a_later_frame_than_its_decision(make_session, tmp_path):
    make_session("s", [turn_record(turn) for turn in range(1, 8)])
    _, splits = convert(tmp_path)
    for sample in splits["train"]:
        turns = sample.metadata["frame_turns"]
        assert turns[-1] == sample.metadata["turn"]
        assert all(earlier <= later for earlier, later in pairwise(turns))


def test_the_prompt_is_about_half_of_the_original_at_most(make_session, tmp_path):
    # The original spent about 600 tokens of prompt on an answer of 60.
    goal = "".join(random.Random(0).choices("abc é😀.1 ", k=500))
    make_session("s", [turn_record(1)], goal=goal)
    report, splits = convert(tmp_path)
    sample = splits["train"][0]
    goal_line = sample.context.rpartition("\n")[2]
    assert len(goal_line.encode()) + 80 + 24 <= 310  # tokens of the rules, and of the question at most
    assert report["goals_shortened"] == 1
    assert sample.metadata["goal"] == goal.strip()


def test_the_prompt_claims_no_time_between_frames(make_session, tmp_path):
    # It claimed 240 ms between frames; real turns are seconds apart.
    make_session("s", [turn_record(1)])
    _, splits = convert(tmp_path)
    assert "ms" not in (splits["train"][0].context + splits["train"][0].question).split()


def test_the_prompt_of_play_is_the_prompt_of_training(make_session, tmp_path):
    # The original tested with another prompt than it trained on: here both come from the same function.
    make_session("s", [turn_record(1)])
    _, splits = convert(tmp_path)
    sample = splits["train"][0]
    assert sample.context == build_context("heal your pokemon")
    assert sample.question == build_question([])
    assert sample.output == build_output(button="up", reasoning="secret-reasoning-1", context="navigation")
