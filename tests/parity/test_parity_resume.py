"""A comparison that was interrupted goes on: finished engines are not asked again unless something changed."""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from pokegemma.data.samples import read_samples
from pokegemma.parity.engine_spec import EngineFailedError, EngineSpec
from pokegemma.parity.resume import FinishedEngines
from pokegemma.parity.task import Measured, Reading, Task
from pokegemma.provenance import PROJECT_ROOT
from tests.parity.test_parity import swap_rows_of_mmproj
from tests.processes import call_script, killed_after, wait_until

COUNT_WORKERS = """
import os, sys
if "--multiprocessing-fork" in sys.orig_argv:
    with open(os.environ["WORKERS"], "a") as file:
        file.write("started\\n")
"""
"""A sitecustomize.py: what multiprocessing starts for an engine leaves a line."""


# --- the script, killed


@dataclass(frozen=True)
class Work:
    """A folder with a checkpoint's copy and its GGUF file, and what is compared in it."""

    folder: Path
    model: Path
    dataset: Path

    def command(self, output: str) -> list[str]:
        command = [sys.executable, PROJECT_ROOT / "scripts/check_parity.py", "--model_path", self.model]
        command += ["--dataset_path", self.dataset / "train.jsonl", "--output_dir", self.folder / output]
        command += ["--gguf", self.folder / "gguf", "--transformers", self.folder / "same"]
        command += ["--max_new_tokens", 24, "--max_log_probability_difference", 0.02]
        return list(map(str, command))

    def environment(self) -> dict[str, str]:
        spy = self.folder / "spy"
        spy.mkdir(exist_ok=True)
        (spy / "sitecustomize.py").write_text(COUNT_WORKERS)
        paths = [str(spy), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "WORKERS": str(self.folder / "workers")}

    def run(self, output: str) -> tuple[subprocess.CompletedProcess[str], int]:
        """Run the script; return the process, and how many engines it started."""
        (self.folder / "workers").write_text("")
        with mock.patch.dict(os.environ, self.environment()):
            done = call_script("check_parity", *self.command(output)[2:])
        return done, len((self.folder / "workers").read_text().splitlines())


@pytest.fixture(scope="module")
def killed(
    colour_model: Path, colour_dataset: Path, colour_gguf: Path, tmp_path_factory: pytest.TempPathFactory
) -> Work:
    """Return the work of a comparison that was killed, with all that it started, after reference and GGUF file.

    What it left of the output "out" lies there once more, for an output "other".
    """
    folder = tmp_path_factory.mktemp("killed")
    shutil.copytree(colour_gguf, folder / "gguf")
    shutil.copytree(colour_model, folder / "same")
    work = Work(folder, colour_model, colour_dataset)
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            work.command("out"), env=work.environment(), stdout=log, stderr=log, start_new_session=True
        )
        with killed_after(process):
            wait_until(lambda: len(list(folder.glob(".out.finished/*.json"))) == 2, process)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert not (folder / "out").exists()
    shutil.copytree(folder / ".out.finished", folder / ".other.finished")
    return work


@pytest.mark.slow
def test_after_a_kill_only_unfinished_engines_are_measured(killed: Work) -> None:
    kept = [json.loads(file.read_text(encoding="utf-8")) for file in killed.folder.glob(".out.finished/*.json")]
    done, num_started = killed.run("out")
    assert done.returncode == 0, done.stderr
    assert num_started == 1  # transformers same, which the kill cut off
    for name in ("reference", "llama.cpp f16"):
        assert f"{name}: 2 answers from before the interruption are reused\n" in done.stderr
    result = json.loads((killed.folder / "out" / "parity.json").read_text(encoding="utf-8"))
    assert [engine["name"] for engine in result["engines"]] == ["llama.cpp f16", "transformers same"]
    assert result["engines"][0]["peak_memory_bytes"] in [one["peak_memory_bytes"] for one in kept]
    assert not (killed.folder / ".out.finished").exists()
    again, num_started = killed.run("out")
    assert (again.returncode, num_started) == (2, 0)
    assert "out exists; choose another path or pass --overwrite" in again.stderr


@pytest.mark.slow
def test_after_a_kill_an_export_that_has_changed_is_asked_again(killed: Work, colour_model: Path) -> None:
    whole = (killed.folder / "gguf" / "mmproj-f16.gguf").read_bytes()
    swap_rows_of_mmproj(killed.folder / "gguf" / "mmproj-f16.gguf", colour_model)
    try:
        done, num_started = killed.run("other")
    finally:
        (killed.folder / "gguf" / "mmproj-f16.gguf").write_bytes(whole)
    assert done.returncode == 1
    assert num_started == 2  # and transformers same
    assert "reference: 2 answers from before the interruption are reused\n" in done.stderr
    assert "llama.cpp f16: 2 answers" not in done.stderr
    assert "FAIL  llama.cpp f16: button_log_probability_difference" in done.stdout


# --- what is kept


MEASURED = Measured(
    (
        Reading(
            text='{"button": "up"}',
            seconds=0.1,
            tokens=(7, 8),
            prompt=(2, -1, 5),
            log_probabilities=np.array([-0.1, -1e-7], np.float32),
            likeliest=np.array([7, 8]),
            buttons=np.array([-0.1, *[-5.3] * 7], np.float32),
        ),
    ),
    peak_memory_bytes=5,
)


@pytest.fixture
def spec(tiny_model: Path, tmp_path: Path) -> EngineSpec:
    """Return a checkpoint of its own."""
    return EngineSpec("transformers", "reference", Path(shutil.copytree(tiny_model, tmp_path / "model")))


@pytest.fixture
def task(toy_dataset: Path, tmp_path: Path) -> Task:
    """Return two decisions of a dataset of its own."""
    folder = tmp_path / "dataset"
    shutil.copytree(toy_dataset, folder)
    samples = tuple(read_samples(folder / "eval.jsonl"))[:2]
    return Task(samples, "grid", folder, 56, (1,), ((2,),) * 8, max_new_tokens=4)


def keep(finished: FinishedEngines, spec: EngineSpec, task: Task) -> None:
    finished.reuse_or_ask(spec, task, lambda: MEASURED)


def is_asked(folder: Path, spec: EngineSpec, task: Task) -> bool:
    """Return whether a later run asks the engine."""
    calls = []
    FinishedEngines(folder).reuse_or_ask(spec, task, lambda: calls.append(spec) or MEASURED)
    return bool(calls)


def test_what_was_kept_is_what_was_measured_to_the_last_bit(spec: EngineSpec, task: Task, tmp_path: Path) -> None:
    keep(FinishedEngines(tmp_path / "kept"), spec, task)
    taken = FinishedEngines(tmp_path / "kept").reuse_or_ask(spec, task, pytest.fail)
    (theirs,), (ours,) = MEASURED.readings, taken.readings
    for name in ("log_probabilities", "likeliest", "buttons"):
        assert getattr(ours, name).dtype == getattr(theirs, name).dtype
        assert np.array_equal(getattr(ours, name), getattr(theirs, name))
    assert (ours.text, ours.seconds, ours.tokens, ours.prompt) == (theirs.text, 0.1, (7, 8), (2, -1, 5))
    assert (taken.peak_memory_bytes, taken.peak_gpu_memory_bytes) == (5, None)


def change_weights(spec: EngineSpec, task: Task) -> None:
    file = spec.path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")


def change_picture(spec: EngineSpec, task: Task) -> None:
    shutil.copy(task.dataset_folder / task.examples[0].image, task.dataset_folder / task.examples[1].image)


def change_template(spec: EngineSpec, task: Task) -> None:
    with (spec.path / "chat_template.jinja").open("a") as file:
        file.write(" ")


@pytest.mark.parametrize(
    "change",
    [
        change_weights,
        change_template,
        change_picture,
        lambda spec, task: replace(task, examples=task.examples[:1]),
        lambda spec, task: replace(task, examples=(replace(task.examples[0], question="?"), task.examples[1])),
        lambda spec, task: replace(task, layout="frames"),
        lambda spec, task: replace(task, max_new_tokens=5),
        lambda spec, task: replace(task, answers=((7,), (8,))),
    ],
    ids=["weights", "template", "picture", "samples", "question", "layout", "max_new_tokens", "answers"],
)
def test_an_engine_is_asked_again_after_a_change(
    change: Callable[[EngineSpec, Task], Task | None], spec: EngineSpec, task: Task, tmp_path: Path
) -> None:
    keep(FinishedEngines(tmp_path / "kept"), spec, task)
    other = change(spec, task) or task
    assert is_asked(tmp_path / "kept", spec, other)
    assert not is_asked(tmp_path / "kept", spec, other)  # the new answers are kept, too


def test_the_same_checkpoint_in_another_type_or_attention_is_another_engine(
    spec: EngineSpec, task: Task, tmp_path: Path
) -> None:
    keep(FinishedEngines(tmp_path / "kept"), spec, task)
    assert is_asked(tmp_path / "kept", replace(spec, dtype="bfloat16"), task)
    assert is_asked(tmp_path / "kept", replace(spec, image_attention="causal"), task)


def test_an_engine_is_asked_again_on_another_machine(
    spec: EngineSpec, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(FinishedEngines(tmp_path / "kept"), spec, task)
    monkeypatch.setattr(platform, "machine", lambda: "another")
    assert is_asked(tmp_path / "kept", spec, task)


def test_another_build_of_llama_cpp_of_the_same_version_is_another_engine(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "site" / "llama_cpp_python-9.9.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: llama-cpp-python\nVersion: 9.9\n")
    (installed / "RECORD").write_text("llama_cpp/lib/libllama.so,sha256=cpu,5\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    (tmp_path / "model.gguf").touch()
    spec = EngineSpec("llama.cpp", "llama.cpp", tmp_path / "model.gguf")
    keep(FinishedEngines(tmp_path / "kept"), spec, task)
    assert not is_asked(tmp_path / "kept", spec, task)
    (installed / "RECORD").write_text("llama_cpp/lib/libllama.so,sha256=cuda,5\n")
    assert is_asked(tmp_path / "kept", spec, task)


def test_what_an_engine_does_not_depend_on_may_change(spec: EngineSpec, task: Task, tmp_path: Path) -> None:
    keep(FinishedEngines(tmp_path / "kept"), spec, task)
    (spec.path / "model.safetensors").touch()
    (spec.path / "run.json").write_text("{}")
    unused = set(task.dataset_folder.glob("grid_images/*")) - {task.dataset_folder / one.image for one in task.examples}
    unused.pop().write_bytes(b"")
    assert not is_asked(tmp_path / "kept", replace(spec, name="another name"), task)


@pytest.mark.parametrize("damaged", [b"", b'{"depends_on": {}', b"[]"])
def test_answers_that_a_power_failure_damaged_are_asked_for_again(
    damaged: bytes, spec: EngineSpec, task: Task, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keep(FinishedEngines(tmp_path / "kept"), spec, task)
    (file,) = (tmp_path / "kept").iterdir()
    file.write_bytes(damaged)
    assert is_asked(tmp_path / "kept", spec, task)
    assert f"{file} is damaged" in caplog.text


def test_an_engine_whose_files_changed_while_it_ran_is_not_kept(spec: EngineSpec, task: Task, tmp_path: Path) -> None:
    def ask() -> Measured:
        change_weights(spec, task)
        return MEASURED

    FinishedEngines(tmp_path / "kept").reuse_or_ask(spec, task, ask)
    assert is_asked(tmp_path / "kept", spec, task)


def test_an_engine_that_failed_or_lacks_a_file_is_not_kept(spec: EngineSpec, task: Task, tmp_path: Path) -> None:
    finished = FinishedEngines(tmp_path / "kept")

    def fail() -> Measured:
        raise EngineFailedError("out of memory")

    with pytest.raises(EngineFailedError):
        finished.reuse_or_ask(spec, task, fail)
    blind = EngineSpec("llama.cpp", "blind", spec.path / "config.json", mmproj=tmp_path / "missing.gguf")
    assert finished.reuse_or_ask(blind, task, lambda: MEASURED) is MEASURED
    assert not finished.folder.exists()
