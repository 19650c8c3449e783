"""Weights & Biases and TensorBoard that fail or hang while a real trainer runs, and W&B runs that are continued."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from pokegemma.errors import PokegemmaError
from pokegemma.provenance import PROJECT_ROOT, read_run_record, write_run_record
from pokegemma.training import sft
from pokegemma.training.options import DataOptions, ModelOptions, TrainingOptions
from pokegemma.training.run_folder import COMPLETE_FILE
from pokegemma.training.tracking import trackers
from pokegemma.training.tracking.settings import earlier_run_id, make_run_id, read_summary, track
from pokegemma.training.tracking.trackers import guarded_trackers
from tests.processes import WAIT_S, is_running
from tests.wandb_server import WandbServer, wandb_server

NOBODY = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def environ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set W&B up as a user with a key does."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("DIR", "CONFIG_DIR", "CACHE_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path))
    for name, value in {"API_KEY": "k" * 40, "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    with wandb_server() as running:
        monkeypatch.setenv("WANDB_BASE_URL", running.url)
        yield running


class Line(torch.nn.Module):
    """A model of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": ((self.weight * x - 2) ** 2).mean()}


class AtStep(TrainerCallback):
    """Call a function after a step."""

    def __init__(self, step: int, function: Callable[[], object]) -> None:
        self.step, self.function = step, function

    def on_step_begin(self, args: TrainingArguments, state: Any, control: Any, **objects: Any) -> None:
        if state.global_step == self.step:
            self.function()


def train_line(
    output: Path,
    *,
    tracker: str = "wandb",
    at_step_2: Callable[[], object] = lambda: None,
    first_step: int = 0,
    run_id: str = "abc",
    earlier_id: str | None = None,
) -> Trainer:
    """Train for three steps, the trackers guarded."""
    args = TrainingArguments(
        output_dir=str(output),
        max_steps=first_step + 3,
        logging_steps=1,
        save_strategy="no",
        report_to=[tracker],
        use_cpu=True,
        disable_tqdm=True,
    )
    callbacks = [AtStep(2, at_step_2)]
    trainer = Trainer(Line(), args, train_dataset=[{"x": torch.ones(1)}] * 24, callbacks=callbacks)
    with guarded_trackers(trainer, run_id=run_id, earlier_id=earlier_id):
        trainer.train()
    return trainer


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == trackers.__name__]


def services() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if child.name() == "wandb-core" and is_running(child)]


def test_training_goes_on_when_the_wandb_service_dies(tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    trainer = train_line(tmp_path, at_step_2=lambda: services()[0].kill())
    assert trainer.state.global_step == 3
    (warning,) = warnings_of(caplog)
    (run,) = (tmp_path / "wandb").glob("offline-run-*-abc")
    assert warning.endswith(f"wandb sync {run}")


@pytest.mark.slow(4)
def test_training_goes_on_when_the_wandb_service_hangs(tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "1")

    def hang() -> None:
        monkeypatch.setattr(trackers, "_MARGIN_S", 1.0)  # not before: a busy machine needs it to begin
        services()[0].send_signal(signal.SIGSTOP)

    trainer = train_line(tmp_path, at_step_2=hang)
    assert trainer.state.global_step == 3
    assert len(warnings_of(caplog)) == 1
    assert not services()


@pytest.mark.slow(4)
def test_the_rest_can_be_uploaded_after_the_server_went_away(
    server: WandbServer, tmp_path: Path, monkeypatch, caplog
) -> None:
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "1")
    trainer = train_line(tmp_path, at_step_2=server.stop)
    assert trainer.state.global_step == 3
    (warning,) = warnings_of(caplog)
    with wandb_server() as later:
        monkeypatch.setenv("WANDB_BASE_URL", later.url)
        command = warning.rpartition(": ")[2].split()
        assert command[:3] == ["wandb", "sync", "--no-skip-online"]
        subprocess.run([sys.executable, "-m", *command], check=True, capture_output=True, timeout=WAIT_S)
    assert [row["_step"] for row in later.rows["abc"] if "train/loss" in row] == [1, 2, 3]


def test_without_a_server_a_run_is_logged_offline(tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", NOBODY)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    train_line(tmp_path)
    (run,) = (tmp_path / "wandb").glob("offline-run-*-abc")
    assert read_summary(run)["train/global_step"] == 3
    assert read_summary(run)["train/loss"] < 1
    (warning,) = warnings_of(caplog)
    assert str(run) in warning


def test_without_a_key_a_run_is_logged_offline(tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(sys, "stdin", None)
    train_line(tmp_path)
    assert len(list((tmp_path / "wandb").glob("offline-run-*-abc"))) == 1
    assert len(warnings_of(caplog)) == 1


def test_a_run_that_ctrl_c_stops_at_once_does_not_wait_for_the_server(
    server: WandbServer, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", str(10 * WAIT_S))
    monkeypatch.setattr(trackers, "_HURRIED_LIMIT_S", 0.5)

    def interrupt() -> None:
        server.stop()
        raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        train_line(tmp_path, at_step_2=interrupt)
    assert time.monotonic() - began < WAIT_S
    assert not services()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread
def test_training_goes_on_when_tensorboard_cannot_write(tmp_path: Path, monkeypatch, caplog) -> None:
    logs = tmp_path / "logs"
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(logs))
    trainer = train_line(tmp_path / "run", tracker="tensorboard", at_step_2=lambda: shutil.rmtree(logs))
    assert trainer.state.global_step == 3
    (warning,) = warnings_of(caplog)
    assert warning.startswith("TensorBoard failed (FileNotFoundError")


class ThreadNoter(TrainerCallback):
    """Note in which thread each event arrives."""

    def __init__(self) -> None:
        self.threads: list[int] = []

    def on_log(self, *event: Any, **objects: Any) -> None:
        self.threads.append(threading.get_ident())


def test_all_events_of_a_tracker_arrive_in_one_thread() -> None:
    """MLflow keeps the run that it logs to by thread."""
    noter, state = ThreadNoter(), TrainerState(is_world_process_zero=True)
    tracker = trackers.Tracker(noter)
    for _ in range(3):
        tracker.on_log(None, state, None)
    assert len(noter.threads) == 3
    assert set(noter.threads) != {threading.get_ident()}
    assert len(set(noter.threads)) == 1


@pytest.mark.parametrize("value", ["soon", "-1", "0", "inf"])
def test_a_timeout_must_be_a_number_of_seconds(value: str, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", value)
    with pytest.raises(PokegemmaError, match=rf"^WANDB_FINISH_TIMEOUT={value}: "):
        track(["wandb"])


def test_wandb_does_not_hook_into_backward_passes(monkeypatch, caplog) -> None:
    monkeypatch.setenv("WANDB_WATCH", "gradients")
    track(["wandb"])
    assert os.environ["WANDB_WATCH"] == "false"
    assert "WANDB_WATCH=gradients" in caplog.text


def test_a_run_and_its_continuation_reach_the_server_as_one(server: WandbServer, tmp_path: Path, caplog) -> None:
    train_line(tmp_path)
    losses = [row for row in server.rows["abc"] if "train/loss" in row]
    assert [(row["_step"], row["train/global_step"]) for row in losses] == [(1, 1), (2, 2), (3, 3)]
    assert not services()
    server.rows["abc"] = server.rows["abc"][:2]  # as if it had been killed after step 2
    train_line(tmp_path, earlier_id="abc")
    assert list(server.rows) == ["abc"]
    assert [row["_step"] for row in server.rows["abc"]] == [1, 2, 3]
    assert not warnings_of(caplog)


def test_a_trial_of_a_sweep_logs_under_the_agents_id(server: WandbServer, tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    monkeypatch.setenv("WANDB_RUN_ID", "trial")
    train_line(tmp_path, run_id="trial")
    assert list(server.rows) == ["trial"]
    assert [row["_step"] for row in server.rows["trial"] if "train/loss" in row] == [1, 2, 3]
    assert not warnings_of(caplog)


def write_run(folder: Path, *, steps: list[int]) -> Path:
    """Write the files of a run with checkpoints."""
    for step in steps:
        checkpoint = folder / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / COMPLETE_FILE).touch()
    write_run_record(folder, stage="train", options={}, wandb_run_id="kept")
    return folder


def test_a_run_keeps_its_id_when_it_continues_from_its_last_checkpoint(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=[20, 100])
    assert earlier_run_id(folder, folder / "checkpoint-100") == "kept"
    assert earlier_run_id(folder, None) == "kept"  # killed before the first one
    assert earlier_run_id(folder, folder / "checkpoint-20") is None
    assert earlier_run_id(tmp_path / "other", folder / "checkpoint-100") is None


def test_an_agents_run_id_wins(monkeypatch) -> None:
    assert make_run_id(["wandb"], "kept") == "kept"
    assert make_run_id(["tensorboard"], "kept") == "kept"
    assert make_run_id(["tensorboard"], None) is None
    assert len(make_run_id(["wandb"], None)) == 8
    monkeypatch.setenv("WANDB_RUN_ID", "trial")
    assert make_run_id(["wandb"], "kept") == "trial"


def train_toy(dataset: Path, model: Path, output: Path, *, max_steps: int, **changes: Any) -> None:
    training = TrainingOptions(
        output_dir=str(output),
        max_steps=max_steps,
        save_steps=2,
        eval_strategy="no",
        logging_steps=1,
        use_cpu=True,
        per_device_train_batch_size=2,
        dataloader_num_workers=0,
        report_to="wandb",
        **changes,
    )
    options = ModelOptions(model_name_or_path=str(model), finetuning="lora")
    assert sft.train(DataOptions(dataset_path=str(dataset)), training, options)


@pytest.mark.slow
def test_the_offline_parts_of_a_resumed_run_become_one_run(
    toy_dataset: Path, tiny_model: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    train_toy(toy_dataset, tiny_model, tmp_path / "run", max_steps=2)
    run_id = read_run_record(tmp_path / "run")["wandb_run_id"]
    time.sleep(1)  # W&B names folders by the second
    train_toy(toy_dataset, tiny_model, tmp_path / "run", max_steps=4, resume_from_checkpoint="True")
    assert read_run_record(tmp_path / "run")["wandb_run_id"] == run_id
    parts = sorted((tmp_path / "wandb").glob(f"offline-run-*-{run_id}"))
    assert [read_summary(part)["train/global_step"] for part in parts] == [2, 4]
    with wandb_server() as later:
        environ = {name: value for name, value in os.environ.items() if name != "WANDB_MODE"}
        subprocess.run(
            [sys.executable, "-m", "wandb", "sync", *parts],
            check=True,
            capture_output=True,
            timeout=WAIT_S,
            env=environ | {"WANDB_BASE_URL": later.url},
        )
    assert [row["_step"] for row in later.rows[run_id] if "train/loss" in row] == [1, 2, 3, 4]


@pytest.mark.slow
def test_the_process_ends_after_the_server_went_away(
    server: WandbServer, toy_dataset: Path, tiny_model: Path, tmp_path: Path, monkeypatch, forked_python: str
) -> None:
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "1")
    command = [
        forked_python,
        "scripts/sft_pokemon_gemma3.py",
        "--dataset_path",
        toy_dataset,
        "--model_name_or_path",
        tiny_model,
        "--output_dir",
        tmp_path / "run",
        "--finetuning",
        "lora",
        "--max_steps",
        3,
        "--logging_steps",
        1,
        "--eval_strategy",
        "no",
        "--use_cpu",
        "--report_to",
        "wandb",
        "--per_device_train_batch_size",
        2,
        "--gradient_accumulation_steps",
        1,
        "--dataloader_num_workers",
        0,
    ]
    server.leaves_at_upload = True
    words = list(map(str, command))
    done = subprocess.run(words, cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert done.returncode == 0, done.stderr
    record = read_run_record(tmp_path / "run")
    assert (record["status"], record["global_step"]) == ("completed", 3)
    assert done.stderr.count("Weights & Biases failed") == 1
