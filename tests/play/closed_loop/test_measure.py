"""Closed-loop evaluation as a user calls it."""

import json
from pathlib import Path

import pytest

from tests.processes import call_script


@pytest.mark.slow(3)
def test_play_without_a_dataset_is_measured_and_reported(tiny_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "play"
    options = ("--model_path", tiny_model, "--closed_loop", 2, "--noise", 0.2, "--stuck", 2, "--output_dir", output)
    answer = call_script("evaluate", *options)
    assert answer.returncode == 0, answer.stderr
    assert [line.split()[0] for line in answer.stdout.splitlines()[1:5]] == ["model", "expert", "repeat", "random"]
    played = json.loads((output / "metrics.json").read_text())["closed_loop"]
    assert played["rules"] == {
        "level": 1,
        "noise": 0.2,
        "game": "toy",
        "stuck": 2,
        "turns_per_expert_turn": 3.0,
    }
    assert played["players"]["expert"]["num_solved"] == 2
    assert played["unsolved"] == [0, 1]
    page = (output / "report.html").read_text()
    assert "Play: 0 of 2 unseen rooms solved" in page
    assert "http" not in page.replace("http-equiv", "")


def test_play_is_part_of_the_report_on_held_out_sessions(tiny_model: Path, toy_dataset: Path, tmp_path: Path) -> None:
    output = tmp_path / "evaluation"
    data = ("--dataset_path", toy_dataset, "--max_samples", 4, "--no_generate")
    answer = call_script("evaluate", "--model_path", tiny_model, *data, "--closed_loop", 1, "--output_dir", output)
    assert answer.returncode == 0, answer.stderr
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["closed_loop"]["players"]["model"]["num_episodes"] == 1
    assert metrics["rows"]
    assert "Play: 0 of 1 unseen rooms solved" in (output / "report.html").read_text()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--closed_loop", 2, "--level", 3), "--level 3"),
        (("--closed_loop", 0), "--closed_loop 0"),
        (("--closed_loop", 2, "--noise", 1.5), "--noise 1.5"),
        ((), "--dataset_path or --closed_loop"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    tiny_model: Path, tmp_path: Path, options: tuple, expected: str
) -> None:
    answer = call_script("evaluate", "--model_path", tiny_model, "--output_dir", tmp_path / "out", *options)
    assert (answer.returncode, answer.stdout) == (2, "")
    assert expected in answer.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()
