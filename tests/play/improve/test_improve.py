"""Learning from play: what is recorded, aggregated and kept, and a run that is continued."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pokegemma.data.samples import read_samples
from pokegemma.environment import usable_cores
from pokegemma.errors import CheckFailedError
from pokegemma.parallel.script_runner import SCRIPT_MODULES, ScriptRunner
from pokegemma.play.improve.plot import improvement_table, plot_improvement, pool_arms
from pokegemma.play.improve.rounds import choose_best, link_sessions
from pokegemma.provenance import PROJECT_ROOT, read_run_record
from tests.processes import call_script, fork_server, killed_after, wait_until, wait_until_ended


@pytest.fixture(autouse=True)
def imports_once() -> None:
    fork_server(SCRIPT_MODULES)


def result(arm: str, number: int, *, seed: int = 0, solved: int = 50, also: int = 100) -> dict:
    play, other = ({"num_solved": count, "num_episodes": 100, "success": count / 100} for count in (solved, also))
    fields = {"arm": arm, "round": number, "seed": seed, "num_samples": 1000 + 100 * number, "model": f"{arm}{number}"}
    return {**fields, "play": play, "also": other}


def test_the_model_that_plays_best_without_forgetting_the_other_level_is_kept() -> None:
    results = [result("dagger", 0, solved=40), result("dagger", 1, solved=80), result("dagger", 2, solved=95, also=90)]
    assert choose_best(results)["round"] == 1
    assert choose_best(results[2:])["round"] == 2


def test_seeds_are_pooled_in_table_and_plot(tmp_path: Path) -> None:
    results = [result("dagger", number, seed=seed, solved=40 + 20 * number) for seed in (0, 1) for number in (0, 1)]
    results += [result("dart", 1, seed=seed, solved=50 + seed, also=94 + seed) for seed in (0, 1)]
    rows = pool_arms(results)
    assert [(row["arm"], row["round"], row["success"]) for row in rows] == [
        ("dagger", 0, 0.4),
        ("dagger", 1, 0.6),
        ("dart", 1, 0.505),
    ]
    assert rows[2]["of_seeds"] == [0.5, 0.51]
    assert (rows[2]["also"], rows[2]["also_lowest"]) == (0.945, 0.94)
    assert rows[0]["interval"] == pytest.approx([0.3346, 0.4691], abs=1e-4)
    assert "60.0 %" in improvement_table(rows, level=5, also_level=1).splitlines()[2]
    plot_improvement(tmp_path / "plot.png", rows, level=5, noise=0.2)
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_sessions_of_several_recordings_are_joined_also_after_a_stop(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "session_a" / "sshots").mkdir(parents=True)
        (tmp_path / name / "session_a" / "sshots" / "step.png").write_text(name)
    for _ in range(2):
        link_sessions([tmp_path / "one", tmp_path / "two"], tmp_path / "runs")
    files = {str(path.relative_to(tmp_path / "runs")): path.read_text() for path in (tmp_path / "runs").rglob("*.png")}
    assert files == {"session_0_a/sshots/step.png": "one", "session_1_a/sshots/step.png": "two"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--level", 3), "level 3"),
        (("--seeds", 1, 1), "--seeds 1 1"),
        (("--training_config", "nowhere.yaml"), "nowhere.yaml"),
        (("--noise", -0.1), "--noise -0.1"),
    ],
)
def test_what_cannot_be_learned_is_refused_in_one_line(
    tiny_model: Path, tmp_path: Path, options: tuple, expected: str
) -> None:
    answer = call_script("improve", "--model_path", tiny_model, "--output_dir", tmp_path / "out", *options)
    assert (answer.returncode, answer.stdout) == (2, "")
    assert expected in answer.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_stopped_runner_starts_nothing(tmp_path: Path) -> None:
    runner = ScriptRunner(tmp_path / "logs", num_threads=1)
    runner.stop()
    with pytest.raises(CheckFailedError, match="not started"):
        runner.run("record_toy_game", tmp_path / "recorded", output_dir=tmp_path / "recorded")
    assert not (tmp_path / "recorded").exists()


@pytest.mark.slow(20)
def test_sigterm_ends_the_training_that_runs_with_a_checkpoint(tiny_model: Path, tmp_path: Path) -> None:
    output, options = tmp_path / "out", ("--rounds", 0, "--seeds", 0, 1, "--num_sessions", 2, "--max_steps", 10_000)
    command = ["scripts/improve.py", "--model_path", tiny_model, "--output_dir", output, *options]
    log, adapter = output / "logs" / "seed0_round0_trained.log", output / "seed0" / "round0" / "trained"
    with killed_after(subprocess.Popen([sys.executable, *map(str, command)], cwd=PROJECT_ROOT)) as process:
        wait_until(lambda: log.exists() and "'loss'" in log.read_text())
        steps = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 128 + signal.SIGTERM
        wait_until_ended(steps)
    assert read_run_record(adapter)["status"] == "interrupted"
    assert list(adapter.glob("checkpoint-*"))
    assert [path.name for path in output.glob("seed*/*")] == ["recorded", "round0"]


@pytest.mark.slow(55)
def test_a_round_is_played_corrected_trained_on_and_measured_and_a_second_call_repeats_nothing(
    tiny_model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    sizes = ("--level", 4, "--num_sessions", 2, "--rooms_per_round", 1, "--num_rooms", 1, "--max_steps", 2)
    command = ("--model_path", tiny_model, "--output_dir", output, "--rounds", 1, "--seeds", 0, *sizes)
    command += ("--num_parallel", usable_cores())  # one thread
    answer = call_script("improve", *command)
    assert answer.returncode == 0, answer.stderr
    results = json.loads((output / "results.json").read_text())
    assert [(row["arm"], row["round"]) for row in results] == [("dagger", 0), ("dagger", 1), ("expert", 1), ("dart", 1)]
    assert results[1]["num_samples"] > results[0]["num_samples"]
    assert (output / "best" / "model.safetensors").is_file()
    labels = {
        sample.metadata.get("label_by")
        for sample in read_samples(output / "seed0" / "round1" / "dataset" / "train.jsonl")
    }
    assert "expert" in labels
    before = {path: path.stat().st_mtime_ns for path in output.rglob("run.json") if "best" not in path.parts}
    again = call_script("improve", *command)
    assert again.stdout == answer.stdout
    assert before == {path: path.stat().st_mtime_ns for path in output.rglob("run.json") if "best" not in path.parts}
    assert call_script("improve", *command, "--noise", 0.3).returncode == 2
