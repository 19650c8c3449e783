"""Rooms played by a model and by players that need none, and the sessions that are recorded of it."""

import json
from pathlib import Path

import pytest

from pokegemma.data.prompts import parse_answer
from pokegemma.data.samples import read_samples
from pokegemma.evaluation.predict import load_predictor
from pokegemma.play.closed_loop.episodes import summarize_episodes
from pokegemma.play.closed_loop.measure import play_view
from pokegemma.play.closed_loop.rooms import play_baseline, play_rooms
from pokegemma.play.closed_loop.rules import RoomRules
from pokegemma.play.toy.rooms import LEVELS
from tests.processes import call_script


@pytest.mark.parametrize("level", LEVELS)
def test_the_expert_solves_every_room_in_its_own_number_of_turns(level: int) -> None:
    summary = summarize_episodes(play_baseline("expert", range(12), RoomRules(level=level)))
    assert (summary["success"], summary["turns_over_expert"]) == (1.0, 1.0)
    assert (summary["useless_presses"], summary["right_buttons"]) == (0.0, 1.0)


def test_with_noise_the_expert_needs_more_turns_and_still_solves_the_rooms() -> None:
    summary = summarize_episodes(play_baseline("expert", range(30), RoomRules(level=5, noise=0.2)))
    assert summary["num_solved"] >= 29
    assert 1.2 < summary["turns_over_expert"] < 2.0
    assert {row["situation"] for row in summary["situations"]} >= {"off_trail", "navigation", "menu"}


@pytest.mark.parametrize("name", ["random", "repeat"])
def test_players_that_see_no_screen_solve_nothing(name: str) -> None:
    summary = summarize_episodes(play_baseline(name, range(20), RoomRules(level=1)))
    assert summary["num_solved"] == 0
    assert summary["useless_presses"] > 0.2


def test_the_rooms_of_an_evaluation_are_the_same_each_time() -> None:
    rules = RoomRules(level=4, noise=0.2, stuck=3)
    assert play_baseline("random", range(3), rules) == play_baseline("random", range(3), rules)


def test_only_mistakes_of_a_recorded_room_are_samples(tiny_model: Path, tmp_path: Path) -> None:
    predictor = load_predictor(tiny_model, layout="grid", device="cpu")
    rules, folder = RoomRules(level=5, noise=0.2, stuck=2, turns_per_expert_turn=0.3), tmp_path / "sessions"
    rooms = {"record_to": folder, "only_mistakes": True}
    turns = [
        turn
        for episode in play_rooms(predictor, play_view(tiny_model), ["a", "b"], rules, **rooms)
        for turn in episode.turns
    ]
    assert 0 < sum(turn.is_right for turn in turns) < len(turns)
    options = ("--eevee_data_dir", folder, "--output_dir", tmp_path / "out", "--num_frames", 1, "--eval_fraction", 0)
    assert call_script("convert_eevee_data_v2", *options).returncode == 0
    answers = [parse_answer(sample.output).button for sample in read_samples(tmp_path / "out" / "train.jsonl")]
    assert sorted(answers) == sorted(turn.expert for turn in turns if not turn.is_right)
    report = json.loads((tmp_path / "out" / "conversion_report.json").read_text())
    assert report["turns_without_sample"]["rejected"] == sum(turn.is_right for turn in turns)


def test_a_recorded_room_converts_to_the_expert_s_answers(tiny_model: Path, tmp_path: Path) -> None:
    predictor = load_predictor(tiny_model, layout="grid", device="cpu")
    rules = RoomRules(level=5, noise=0.2, turns_per_expert_turn=0.2)
    folder = tmp_path / "sessions"
    episodes = play_rooms(predictor, play_view(tiny_model), ["a", "b"], rules, record_to=folder)
    sessions = [json.loads(path.read_text()) for path in sorted(folder.glob("*/session_data.json"))]
    pressed = [turn["button_presses"][0] for session in sessions for turn in session["turns"]]
    assert pressed == [turn.pressed for episode in episodes for turn in episode.turns]
    assert sessions[0]["session_metadata"]["session_id"]

    options = ("--eevee_data_dir", folder, "--output_dir", tmp_path / "out", "--num_frames", 1, "--eval_fraction", 0)
    assert call_script("convert_eevee_data_v2", *options).returncode == 0
    samples = list(read_samples(tmp_path / "out" / "train.jsonl"))
    answers = {sample.id: parse_answer(sample.output) for sample in samples}
    turns = [turn for episode in episodes for turn in episode.turns]
    assert len(samples) == len(turns)
    assert sorted(answer.button for answer in answers.values()) == sorted(turn.expert for turn in turns)
    assert {answer.context for answer in answers.values()} == {turn.situation for turn in turns}
    assert all(answer.reasoning for answer in answers.values())
