"""Training is killed or stopped at any moment, then resumed: the weights are those of an undisturbed run."""

import functools
import json
import os
import random
import runpy
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_post_hook

from pokegemma.provenance import PROJECT_ROOT, read_run_record
from tests.conftest import MakeOnce
from tests.processes import fork_server
from tests.training.launched_runs import TRAINING_MODULES

OPTIONS = {
    "finetuning": "lora",
    "lora_dropout": 0.1,
    "max_steps": 12,
    "save_steps": 3,
    "eval_steps": 3,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,  # 10 steps are an epoch
    "learning_rate": 1e-2,
    "warmup_steps": 0,
    "dataloader_num_workers": 0,
    "use_cpu": True,
    "report_to": "none",
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "metric_for_best_model": "eval_loss",
}
KILLS = [
    ("features/key.json", 1),
    ("features/chunks/*", 1),
    ("adapter/dataset_cache/**/*incomplete*", 1),
    (None, 40),  # while the model is loaded
    ("adapter/run.json", 4),  # before the first checkpoint
    ("adapter/checkpoint-3", 1),
    ("adapter/checkpoint-3/optimizer.pt", 1),
    ("adapter/checkpoint-3/complete", 5),  # in a step, or in the evaluation before the next checkpoint
    ("adapter/checkpoint-9/complete", 2),  # while an older one is deleted
    (None, 60),
    ("adapter/adapter_model.safetensors", 1),  # while the result is written
]
"""When to kill: as soon as a path of this pattern is there (or from the start), at one of so many events."""

FILE_EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir")


def die_at(folder: Path, pattern: str | None, num_events: int) -> None:
    """Have this process kill itself `num_events` after a path of this pattern has appeared in `folder`.

    An event is a file that is opened, renamed, made or removed, or an optimizer step. A process that watches from
    outside may be kept waiting until the run is over.
    """
    before, left = set(folder.glob(pattern)) if pattern else set(), num_events
    appeared = pattern is None

    def count(*_: object) -> None:
        nonlocal appeared, left
        appeared = appeared or bool(set(folder.glob(pattern)) - before)
        if appeared and left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= appeared

    def look(event: str, arguments: tuple) -> None:
        if event in FILE_EVENTS and str(arguments[0]).startswith(str(folder.parent.parent)):  # models and datasets, too
            count()

    sys.addaudithook(look)
    register_optimizer_step_post_hook(count)


def stop_in_the_second_step() -> None:
    """Have this process get a SIGTERM in the second step of its optimizer."""
    steps = []

    def count(*_: object) -> None:
        steps.append(1)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    register_optimizer_step_post_hook(count)


def run_script(arguments: list[str], log: Path, disturb: Callable[[], None] | None) -> None:
    """Be the training script."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if disturb:
        disturb()
    sys.argv = ["sft_pokemon_gemma3.py", *arguments]
    runpy.run_path(str(PROJECT_ROOT / "scripts/sft_pokemon_gemma3.py"), run_name="__main__")


def start(folder: Path, dataset: Path, model: Path, disturb: Callable[[], None] | None = None) -> BaseProcess:
    """Start training in `folder`/adapter as a requeued job would: from the beginning, or where the last one was.

    Processes are forked from a server that has imported everything, which takes seconds and writes nothing.
    """
    paths = {"dataset_path": dataset, "model_name_or_path": model, "output_dir": folder / "adapter"}
    options = {**OPTIONS, **paths, "vision_features": folder / "features"}
    arguments = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    if (folder / "adapter/run.json").is_file():
        arguments.append("--resume_from_checkpoint")
    folder.mkdir(exist_ok=True)
    process = fork_server(TRAINING_MODULES).Process(
        target=run_script, args=(arguments, folder / "log.txt", disturb), daemon=True
    )
    process.start()
    return process


def kill(process: BaseProcess, folder: Path, pattern: str | None, num_events: int) -> None:
    """Wait for a process to kill itself; where the first event would do, kill it before: in the middle of writing."""
    before = set(folder.glob(pattern)) if pattern else set()
    while pattern and num_events == 0 and process.is_alive():
        if set(folder.glob(pattern)) - before:
            process.kill()
        time.sleep(0.002)
    process.join()
    assert process.exitcode == -9, f"ended before {pattern}: {(folder / 'log.txt').read_text()[-3000:]}"


def wait(process: BaseProcess, folder: Path) -> None:
    process.join()
    assert process.exitcode == 0, (folder / "log.txt").read_text()[-3000:]


@pytest.fixture(scope="module")
def through(toy_dataset: Path, tiny_model: Path, make_once: MakeOnce) -> Path:
    """Return the folder of an undisturbed run."""

    def make(folder: Path) -> None:
        wait(start(folder, toy_dataset, tiny_model), folder)

    return make_once("undisturbed", make)


def assert_same_result(folder: Path, through: Path) -> None:
    assert read_run_record(folder / "adapter")["status"] == "completed"
    ours, expected = (load_file(path / "adapter/adapter_model.safetensors") for path in (folder, through))
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], expected[key]) for key in expected)


@pytest.mark.slow(60)
def test_a_run_stopped_by_sigterm_and_resumed_ends_with_the_same_weights(
    through: Path, toy_dataset: Path, tiny_model: Path, tmp_path: Path
) -> None:
    wait(start(tmp_path, toy_dataset, tiny_model, stop_in_the_second_step), tmp_path)
    assert "training interrupted" in (tmp_path / "log.txt").read_text()
    record = read_run_record(tmp_path / "adapter")
    assert (record["status"], record["global_step"]) == ("interrupted", 2)
    assert not (tmp_path / "adapter/adapter_model.safetensors").exists()
    wait(start(tmp_path, toy_dataset, tiny_model), tmp_path)
    assert_same_result(tmp_path, through)


@pytest.mark.slow(60)
def test_a_run_killed_at_every_stage_and_resumed_ends_with_the_same_weights(
    through: Path, toy_dataset: Path, tiny_model: Path, tmp_path: Path
) -> None:
    killed, chance = tmp_path / "killed", random.Random(0)
    for pattern, num_events in KILLS:
        death = (killed, pattern, chance.randrange(num_events))
        kill(start(killed, toy_dataset, tiny_model, functools.partial(die_at, *death)), *death)
    wait(start(killed, toy_dataset, tiny_model), killed)
    assert_same_result(killed, through)

    records = [read_run_record(folder / "adapter") for folder in (killed, through)]
    assert Path(records[0]["best_checkpoint"]).name == Path(records[1]["best_checkpoint"]).name
    histories = [
        json.loads((folder / "adapter/trainer_state.json").read_text())["log_history"] for folder in (killed, through)
    ]
    for key in ("loss", "eval_loss", "eval_button_accuracy"):
        ours, expected = ([(entry["step"], entry[key]) for entry in history if key in entry] for history in histories)
        assert ours == expected
    names = {path.name for path in (killed / "adapter").iterdir()}
    assert names == {path.name for path in (through / "adapter").iterdir()}
