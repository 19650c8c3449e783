"""kill -9 at any moment of training, then resume: the weights are those of a run that was left alone."""

import json
import multiprocessing
import os
import random
import runpy
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pokegemma.provenance import read_run_record

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = {
    "finetuning": "lora", "lora_dropout": 0.1, "max_steps": 24, "save_steps": 3, "eval_steps": 3,
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "learning_rate": 1e-2, "warmup_steps": 0,
    "dataloader_num_workers": 0, "use_cpu": True, "report_to": "none", "gradient_checkpointing": False,
    "logging_steps": 1, "metric_for_best_model": "eval_loss",
}  # fmt: skip
DEADLINE_S = 120
KILLS = [
    ("features/key.json", 0),
    ("features/chunks/*", 0),
    ("adapter/dataset_cache/**/*incomplete*", 0),
    (None, 1.0),  # while the model is loaded
    ("adapter/run.json", 1.0),  # before the first checkpoint
    ("adapter/checkpoint-*", 0),
    ("adapter/checkpoint-*/optimizer.pt", 0),
    ("adapter/checkpoint-*/complete", 1.0),  # in a step, or in the evaluation before the next checkpoint
    ("adapter/checkpoint-*/complete", 0),  # while an older one is deleted
    (None, 1.5),
    ("adapter/adapter_model.safetensors", 0),  # while the result is written
]
"""When to kill: as soon as a path of this pattern appears, then a random time of at most so many seconds later."""


def run_script(arguments: list[str], log: Path) -> None:
    """Be the training script."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = ["sft_pokemon_gemma3.py", *arguments]
    runpy.run_path(str(ROOT / "scripts/sft_pokemon_gemma3.py"), run_name="__main__")


def start(folder: Path, dataset: Path, model: Path) -> BaseProcess:
    """Start training in `folder`/adapter as a requeued job would: from the beginning, or where the last one was.

    Processes are forked from a server that has imported everything, which takes seconds and writes nothing.
    """
    paths = {"dataset_path": dataset, "model_name_or_path": model, "output_dir": folder / "adapter"}
    options = {**OPTIONS, **paths, "vision_features": folder / "features"}
    arguments = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    if (folder / "adapter/run.json").is_file():
        arguments.append("--resume_from_checkpoint")
    folder.mkdir(exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pokegemma.training.sft"])
    process = context.Process(target=run_script, args=(arguments, folder / "log.txt"))
    process.start()
    return process


def kill_when(process: BaseProcess, folder: Path, pattern: str | None, delay_s: float) -> None:
    before = set(folder.glob(pattern)) if pattern else set()
    deadline = time.monotonic() + DEADLINE_S
    while pattern and not set(folder.glob(pattern)) - before:
        assert process.is_alive(), f"ended before {pattern}: {(folder / 'log.txt').read_text()[-3000:]}"
        assert time.monotonic() < deadline, pattern
        time.sleep(0.0005)
    time.sleep(delay_s)
    process.kill()
    process.join()
    assert process.exitcode == -9


@pytest.mark.slow
def test_a_run_killed_at_every_stage_and_resumed_ends_with_the_same_weights(
    toy_dataset: Path, tiny_model: Path, tmp_path: Path
) -> None:
    through, killed = tmp_path / "through", tmp_path / "killed"
    undisturbed = start(through, toy_dataset, tiny_model)
    chance = random.Random(0)
    for pattern, at_most_s in KILLS:
        kill_when(start(killed, toy_dataset, tiny_model), killed, pattern, chance.uniform(0, at_most_s))
    last = start(killed, toy_dataset, tiny_model)
    for process, folder in ((last, killed), (undisturbed, through)):
        process.join()
        assert process.exitcode == 0, (folder / "log.txt").read_text()[-3000:]

    records = [read_run_record(folder / "adapter") for folder in (killed, through)]
    assert [record["status"] for record in records] == ["completed", "completed"]
    assert Path(records[0]["best_checkpoint"]).name == Path(records[1]["best_checkpoint"]).name
    histories = [
        json.loads((folder / "adapter/trainer_state.json").read_text())["log_history"] for folder in (killed, through)
    ]
    for key in ("loss", "eval_loss", "eval_button_accuracy"):
        ours, expected = ([(entry["step"], entry[key]) for entry in history if key in entry] for history in histories)
        assert ours == expected
    ours, expected = (load_file(folder / "adapter/adapter_model.safetensors") for folder in (killed, through))
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], expected[key]) for key in expected)
    names = {path.name for path in (killed / "adapter").iterdir()}
    assert names == {path.name for path in (through / "adapter").iterdir()}
