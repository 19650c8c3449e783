"""train_battles.sh, in a temporary copy of the project whose steps only record their calls."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pokegemma.provenance import PROJECT_ROOT
from tests.processes import WAIT_S, killed_after, wait_until

STEPS = ("record", "pack", "check", "tiny_model", "arena", "card")

# Stands for each script: adds its name and arguments to calls.jsonl, and makes its output folder.
RECORDER = """
import json, os, sys
from pathlib import Path
name = Path(sys.argv[0]).stem
if name == "describe_environment":
    print("num_cores=2")
    sys.exit()
with open("calls.jsonl", "a") as calls:
    calls.write(json.dumps([name, sys.argv[1:], os.environ["OMP_NUM_THREADS"]]) + "\\n")
if "--output_dir" in sys.argv:
    Path(sys.argv[sys.argv.index("--output_dir") + 1]).mkdir(parents=True, exist_ok=True)
sys.exit(7 if name == os.environ.get("FAILING_STEP") else 0)
"""

# Stands for training that a signal stops: then run.json tells so, as of the real one.
INTERRUPTIBLE = """
import json, signal, sys, time
from pathlib import Path
folder = Path(sys.argv[sys.argv.index("--output_dir") + 1])
folder.mkdir(parents=True)
def save(number, frame):
    (folder / "run.json").write_text(json.dumps({"status": "interrupted"}, indent=2))
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
(folder / "started").touch()
time.sleep(600)
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "scripts").mkdir()
    shutil.copy(PROJECT_ROOT / "train_battles.sh", tmp_path)
    for name in ("describe_environment", "sft_battles", *(f"battles_{step}" for step in STEPS)):
        (tmp_path / "scripts" / f"{name}.py").write_text(RECORDER)
    return tmp_path


def environment(**variables: str) -> dict[str, str]:
    names = (
        "MODEL_NAME",
        "TRAJECTORIES",
        "OUTPUT_DIR",
        "BATTLE_FORMAT",
        "TEAMS_FILE",
        "NUM_BATTLES",
        "MAX_STEPS",
        "OMP_NUM_THREADS",
    )
    kept = {name: value for name, value in os.environ.items() if name not in names}
    return {**kept, "POKEGEMMA_PYTHON": sys.executable, **variables}


def launch(project: Path, *arguments: str, **variables: str) -> tuple[subprocess.CompletedProcess[str], list[list]]:
    command = ["bash", str(project / "train_battles.sh"), *arguments]
    done = subprocess.run(command, env=environment(**variables), capture_output=True, text=True, check=False)
    calls = project / "calls.jsonl"
    lines = calls.read_text().splitlines() if calls.exists() else []
    calls.unlink(missing_ok=True)
    return done, [json.loads(line) for line in lines]


def test_the_demonstration_runs_every_step(project: Path) -> None:
    done, calls = launch(project)
    assert done.returncode == 0, done.stderr
    assert [name for name, _, _ in calls] == [
        *("battles_record", "battles_pack", "battles_check", "battles_tiny_model", "sft_battles"),
        *("battles_arena", "battles_card"),
    ]
    options = {name: arguments for name, arguments, _ in calls}
    assert options["battles_record"][:4] == ["--battle_format", "gen1ou", "--num_battles", "500"]
    assert options["battles_record"][-2:] == ["--teams_file", "training_configs/battles_team.txt"]
    assert options["sft_battles"][-2:] == ["--config", "training_configs/battles.yaml"]
    assert "policy=outputs/battles/policy" in options["battles_arena"]
    assert {name: threads for name, _, threads in calls}["battles_arena"] == "1"
    assert "[7/7] took" in done.stdout


def test_a_second_demonstration_starts_over(project: Path) -> None:
    launch(project)
    (project / "outputs" / "battles" / "arena" / "old").touch()
    _, calls = launch(project, "--lora_r", "4", BATTLE_FORMAT="gen1randombattle")
    options = {name: arguments for name, arguments, _ in calls}
    assert options["sft_battles"][-3:] == ["--overwrite", "--lora_r", "4"]
    assert "--teams_file" not in options["battles_record"]
    assert not (project / "outputs" / "battles" / "arena" / "old").exists()


def test_a_model_is_trained_on_given_trajectories(project: Path) -> None:
    (project / "recorded").mkdir()
    done, calls = launch(project, TRAJECTORIES="recorded", MODEL_NAME="google/gemma-3-270m")
    assert done.returncode == 0, done.stderr
    assert [name for name, _, _ in calls] == [
        *("battles_pack", "battles_check", "sft_battles", "battles_arena", "battles_card")
    ]
    assert calls[2][1][2:4] == ["--model_name_or_path", "google/gemma-3-270m"]
    again, _ = launch(project, TRAJECTORIES="recorded", MODEL_NAME="google/gemma-3-270m")
    assert again.returncode == 2
    assert "--resume_from_checkpoint" in again.stderr
    (project / "recorded" / "pack.json").touch()
    _, calls = launch(project, "--overwrite", TRAJECTORIES="recorded", OUTPUT_DIR="outputs/packed_before")
    assert [name for name, _, _ in calls] == ["battles_check", "sft_battles", "battles_arena", "battles_card"]


def test_settings_of_a_model_with_vision_in_the_file_of_settings_are_not_taken(project: Path) -> None:
    """The first pass, which makes the environment and reads .env; other settings of the file are taken."""
    (project / "init.sh").write_text(f'#!/bin/sh\ncase $1 in --print-python) echo "{sys.executable}" ;; esac\n')
    (project / "init.sh").chmod(0o755)
    (project / "recorded").mkdir()
    (project / ".env").write_text(
        "MODEL_NAME=google/gemma-3-4b-it\nOUTPUT_DIR=outputs/vision\nMAX_STEPS=7\nTRAJECTORIES=recorded\n"
    )
    first_pass = {"POKEGEMMA_PYTHON": "", "PYTHONPATH": str(PROJECT_ROOT)}
    done, calls = launch(project, **first_pass)
    assert done.returncode == 0, done.stderr
    options = {name: arguments for name, arguments, _ in calls}["sft_battles"]
    assert options[options.index("--model_name_or_path") + 1] == "google/gemma-3-270m"
    assert options[options.index("--output_dir") + 1] == "outputs/battles-gemma-3-270m/policy"
    assert "--max_steps" not in options
    _, calls = launch(project, **first_pass, OUTPUT_DIR="outputs/mine", MODEL_NAME="somebody/text", MAX_STEPS="3")
    options = {name: arguments for name, arguments, _ in calls}["sft_battles"]
    assert {"somebody/text", "outputs/mine/policy", "3"} <= set(options)


@pytest.mark.parametrize(
    ("arguments", "variables", "named"),
    [
        (("--output_dir", "x"), {}, "--output_dir: set OUTPUT_DIR"),
        (("--trajectories-dir=x",), {}, "--trajectories-dir: set TRAJECTORIES"),
        ((), {"MODEL_NAME": "google/gemma-3-270m"}, "TRAJECTORIES is not set"),
        ((), {"TRAJECTORIES": "nowhere"}, "TRAJECTORIES=nowhere: no such folder"),
        ((), {"OUTPUT_DIR": "scripts"}, "OUTPUT_DIR=scripts contains files"),
    ],
)
def test_a_mistake_is_one_line(project: Path, arguments, variables, named) -> None:
    done, calls = launch(project, *arguments, **variables)
    assert (done.returncode, calls) == (2, [])
    assert done.stderr.startswith("error: ") and named in done.stderr


def test_a_failed_step_is_named(project: Path) -> None:
    done, calls = launch(project, FAILING_STEP="battles_check")
    assert done.returncode == 7
    assert calls[-1][0] == "battles_check"
    assert "error: step 3 failed with exit status 7" in done.stderr


def test_a_signal_reaches_training(project: Path) -> None:
    (project / "scripts" / "sft_battles.py").write_text(INTERRUPTIBLE)
    command = ["bash", str(project / "train_battles.sh")]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with killed_after(process):
        wait_until((project / "outputs" / "battles" / "policy" / "started").exists, process)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=WAIT_S)
    assert process.returncode == 143
    assert "--resume_from_checkpoint" in errors
    assert not (project / "outputs" / "battles" / "arena").exists()
