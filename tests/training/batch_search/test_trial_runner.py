"""Trials of a batch size: what they train on, what their end means, and the whole search for real on a CPU."""

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from transformers import Gemma3Processor

from pokegemma.data.samples import Sample, read_samples
from pokegemma.errors import PokegemmaError
from pokegemma.gemma.batches.collator import Gemma3Collator, expand_pictures
from pokegemma.gemma.batches.processor_collator import make_collator
from pokegemma.gemma.loading import open_checkpoint
from pokegemma.provenance import PROJECT_ROOT
from pokegemma.settings import read_settings
from pokegemma.training.batch_search import runner
from pokegemma.training.batch_search.attempts import Trial
from pokegemma.training.batch_search.dataset import longest_first, write_rows, write_trial_dataset
from pokegemma.training.batch_search.options import is_checkpointing_given
from pokegemma.training.batch_search.ranks import in_lockstep, join_ranks
from pokegemma.training.batch_search.report import suggest_changes
from pokegemma.training.batch_search.runner import (
    Ended,
    TrialRunner,
    check_trial_mode,
    interpret_end,
    memory_budget,
    run_watched,
)
from pokegemma.training.batch_search.trial import GpuMemory, peak_resident_bytes
from pokegemma.training.inputs import read_examples
from pokegemma.training.options import DataOptions, ModelOptions, RunOptions, TrainingOptions
from tests.forked_python import start_by_forks
from tests.processes import call_script, wait_until_ended

SCRIPT = PROJECT_ROOT / "scripts" / "find_batch_size.py"
MIB, GIB = 2**20, 2**30
MEASURED = {"peak_bytes": 2 * GIB, "decisions_per_second": 3.5, "gradient_bytes": GIB}
NUM_SAMPLES = 19  # a prime: only 1 and 19 are tried


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


# --- what a trial trains on


def test_the_samples_with_the_most_tokens_come_first(samples: list[Sample], make_collator: Callable) -> None:
    collator = make_collator("grid")
    count = collator.count_tokens
    chosen = longest_first(iter(samples), collator, number=5)
    assert [length for length, _ in chosen] == sorted(map(count, samples), reverse=True)[:5]
    assert all(length == count(sample) for length, sample in chosen)


def test_a_quantised_base_is_refused(toy_dataset: Path, quantised_model: Path, tmp_path: Path) -> None:
    model = ModelOptions(model_name_or_path=str(quantised_model), finetuning="lora")
    with pytest.raises(PokegemmaError, match=f"{quantised_model}: .* stored quantised"):
        write_trial_dataset(DataOptions(dataset_path=str(toy_dataset)), model, tmp_path / "d", step_rows=1, num_steps=1)


@pytest.mark.parametrize("step_rows", [1, 3])
@pytest.mark.parametrize("layout", ["grid", "frames", "trajectory"])
def test_every_step_of_a_trial_sees_the_longest_rows_of_the_layout_first(
    layout: str, step_rows: int, toy_dataset: Path, tiny_model: Path, processor: Gemma3Processor, tmp_path: Path
) -> None:
    data = DataOptions(dataset_path=str(toy_dataset), layout=layout, max_decisions=3)
    model = ModelOptions(model_name_or_path=str(tiny_model), finetuning="lora")
    lengths = write_trial_dataset(data, model, tmp_path / "dataset", step_rows=step_rows, num_steps=2)
    collator = Gemma3Collator(processor=processor, layout=layout, dataset_folder=Path())
    every = sorted(map(collator.count_tokens, read_examples(toy_dataset / "train.jsonl", data)), reverse=True)
    written = list(read_examples(tmp_path / "dataset" / "train.jsonl", data))
    assert lengths == every[:step_rows]
    assert [collator.count_tokens(example) for example in written] == every[:step_rows] * 2
    assert collator(written)["input_ids"].shape == (2 * step_rows, every[0])


def test_a_trial_evaluates_on_the_longest_rows_that_are_held_out(
    toy_dataset: Path, tiny_model: Path, make_collator: Callable, tmp_path: Path
) -> None:
    data = DataOptions(dataset_path=str(toy_dataset))
    model = ModelOptions(model_name_or_path=str(tiny_model), finetuning="lora")
    steps = {"step_rows": 1, "num_steps": 2}
    write_trial_dataset(data, model, tmp_path / "dataset", **steps, eval_rows=4)
    count = make_collator("grid").count_tokens
    every = sorted((count(sample) for sample in read_samples(toy_dataset / "eval.jsonl")), reverse=True)
    written = list(read_samples(tmp_path / "dataset" / "eval.jsonl"))
    assert [count(sample) for sample in written] == every[:4]
    assert all((tmp_path / "dataset" / sample.image).is_file() for sample in written)
    write_trial_dataset(data, model, tmp_path / "more", **steps, eval_rows=99)
    assert len(list(read_samples(tmp_path / "more" / "eval.jsonl"))) == 10  # none twice
    write_trial_dataset(data, model, tmp_path / "none", **steps)
    assert not (tmp_path / "none" / "eval.jsonl").exists()


def test_a_trial_evaluates_where_there_is_something_to_evaluate_on(tmp_path: Path) -> None:
    options = {"step_rows": 1, "num_steps": 2, "limit_bytes": GIB, "on_gpu": False, "num_processes": 1}
    runner = TrialRunner([], tmp_path, **options)
    for strategy in ("no", "steps"):
        command = runner._command(tmp_path, 1, True)
        assert command[command.index("--eval_strategy") + 1] == strategy
        (tmp_path / "eval.jsonl").touch()


def test_a_trial_without_enough_shared_memory_does_not_fit() -> None:
    trial = interpret_end(Ended(0, 0, False), {"shared_memory": "/dev/shm"}, "", limit_bytes=GIB, with_gradients=False)
    assert (trial.fits, trial.reason) == (False, "/dev/shm")


def test_rows_are_repeated_where_there_are_too_few_and_share_no_picture(
    samples: list[Sample], toy_dataset: Path, make_collator: Callable, tmp_path: Path
) -> None:
    absolute = [
        dataclasses.replace(sample, frames=tuple(str(toy_dataset / frame) for frame in sample.frames), image=None)
        for sample in samples[:2]  # neighbours: they have frames in common
    ]
    write_rows(absolute, tmp_path / "dataset", split="train", source=toy_dataset, step_rows=3, num_steps=2)
    written = list(read_samples(tmp_path / "dataset" / "train.jsonl"))
    first, second = (sample.id for sample in samples[:2])
    assert [sample.id for sample in written] == [first, second, first] * 2
    assert [sample.frames for sample in written[:3]] == [sample.frames for sample in written[3:]]
    assert sum(len(set(sample.frames)) for sample in written[:3]) == len({f for s in written for f in s.frames})
    collator = Gemma3Collator(
        processor=make_collator("frames").processor, layout="frames", dataset_folder=tmp_path / "dataset"
    )
    pictures = make_collator("frames")(samples[:2])
    again = collator(written[:2])
    assert torch.equal(expand_pictures(again)["pixel_values"], expand_pictures(pictures)["pixel_values"])


# --- how a trial ends


def test_a_trial_within_the_limit_fits() -> None:
    trial = interpret_end(Ended(0, 0, False), MEASURED, "", limit_bytes=2 * GIB, with_gradients=False)
    assert trial == Trial(True, 2 * GIB, 3.5)


def test_a_trial_above_the_limit_does_not_fit() -> None:
    trial = interpret_end(Ended(0, 0, False), MEASURED, "", limit_bytes=2 * GIB - 1, with_gradients=False)
    assert (trial.fits, trial.peak_bytes, trial.reason) == (False, 2 * GIB, "2.00 of 2.00 GiB")


def test_processes_that_train_together_need_their_gradients_once_more() -> None:
    assert (
        interpret_end(Ended(0, 0, False), MEASURED, "", limit_bytes=3 * GIB, with_gradients=True).peak_bytes == 3 * GIB
    )
    assert not interpret_end(Ended(0, 0, False), MEASURED, "", limit_bytes=3 * GIB - 1, with_gradients=True).fits


@pytest.mark.parametrize(
    ("ended", "result", "reason"),
    [
        (Ended(-9, 3 * GIB, True), None, "stopped at 3.00 of 2.00 GiB"),
        (Ended(-9, 0, False), None, "killed, as the system does when its memory runs out"),
        (Ended(137, 0, False), None, "killed, as the system does when its memory runs out"),
        (Ended(0, 0, False), {"out_of_memory": "CUDA out of memory."}, "CUDA out of memory."),
    ],
)
def test_a_trial_without_enough_memory_does_not_fit(ended: Ended, result: dict | None, reason: str) -> None:
    trial = interpret_end(ended, result, "error: nothing to do with it", limit_bytes=2 * GIB, with_gradients=False)
    assert (trial.fits, trial.reason) == (False, reason)


@pytest.mark.parametrize("ended", [Ended(1, 0, False), Ended(-11, 0, False), Ended(-15, 0, False), Ended(0, 0, False)])
def test_a_trial_that_fails_otherwise_is_an_error_with_its_last_lines(ended: Ended) -> None:
    log = "".join(f"line {number}\n\n" for number in range(20))
    with pytest.raises(PokegemmaError, match=f"exit status {ended.returncode}") as caught:
        interpret_end(ended, None, log, limit_bytes=GIB, with_gradients=False)
    assert str(caught.value).splitlines()[1:] == [f"line {number}" for number in range(12, 20)]


def test_a_mistake_that_the_trial_names_is_all_that_is_said() -> None:
    with pytest.raises(PokegemmaError, match=r"\(exit status 2\): frame\.png cannot be read$"):
        interpret_end(
            Ended(2, 0, False), None, "x\nerror: frame.png cannot be read\n", limit_bytes=1, with_gradients=False
        )


class MadeUpCuda:
    """10 GiB, of which 1 is taken outside of torch's allocator; the peak of that is 4."""

    fraction = 0.0

    def mem_get_info(self) -> tuple[int, int]:
        return 7 * GIB, 10 * GIB

    def memory_reserved(self) -> int:
        return 2 * GIB

    def max_memory_reserved(self) -> int:
        return 4 * GIB

    def set_per_process_memory_fraction(self, fraction: float) -> None:
        self.fraction = fraction


@pytest.mark.parametrize(("limit_gib", "fraction"), [(6, 0.5), (0.5, 0.0), (20, 1.0)])
def test_on_a_gpu_what_others_take_counts_and_the_rest_is_the_cap(
    limit_gib: float, fraction: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = MadeUpCuda()
    monkeypatch.setattr(torch, "cuda", cuda)
    memory = GpuMemory(torch.device("cuda"), int(limit_gib * GIB))
    assert cuda.fraction == fraction
    assert memory.peak_bytes() == 5 * GIB


def test_on_a_cpu_there_is_no_gpu_memory_and_the_peak_is_that_of_this_process() -> None:
    assert GpuMemory(torch.device("cpu"), GIB).peak_bytes() is None
    before = peak_resident_bytes()
    ballast = bytearray(max(0, before - psutil.Process().memory_info().rss) + 100 * MIB)
    assert peak_resident_bytes() - before > 50 * MIB
    assert len(ballast) >= 100 * MIB


# --- watching


def commands_with(text: str) -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["cmdline"]) if text in " ".join(p.info["cmdline"] or [])]


def test_a_process_that_takes_too_much_is_killed_with_its_children(tmp_path: Path) -> None:
    child = f"import time; a = bytearray({300 * MIB}); time.sleep(3600)  # {tmp_path}"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(3600)"
    ended = run_watched(python(code), log=tmp_path / "log", limit_bytes=150 * MIB)
    assert ended.stopped
    assert ended.returncode == -signal.SIGKILL
    assert ended.peak_bytes > 150 * MIB
    wait_until_ended(commands_with(f"# {tmp_path}"))  # a child's end is not waited for


def test_a_process_within_its_limit_ends_by_itself_with_its_peak_and_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, seen = tmp_path / "log", tmp_path / "seen"
    code = f"""
import os, sys, time
a = bytearray({100 * MIB})
print("out", flush=True)
print("err", file=sys.stderr, flush=True)
while not os.path.exists({str(seen)!r}):
    time.sleep(0.01)
sys.exit(3)
"""
    polls_since = []

    def sleep(seconds: float) -> None:
        """Let the process end once it was measured with all its memory, however late that is on a busy machine."""
        time.sleep(seconds)
        if "err" in log.read_text():
            polls_since.append(1)
        if len(polls_since) == 2:
            seen.touch()

    monkeypatch.setattr("pokegemma.training.batch_search.runner.time", SimpleNamespace(sleep=sleep))
    ended = run_watched(python(code), log=log, limit_bytes=GIB)
    assert (ended.returncode, ended.stopped) == (3, False)
    assert 100 * MIB < ended.peak_bytes < 200 * MIB
    assert sorted(log.read_text().split()) == ["err", "out"]


def test_whatever_ends_the_watcher_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    # Not the sleep of all: threads of other libraries would be interrupted, too.
    monkeypatch.setattr("pokegemma.training.batch_search.runner.time", SimpleNamespace(sleep=interrupt))
    with pytest.raises(KeyboardInterrupt):
        run_watched(python(f"import time; time.sleep(3600)  # {tmp_path}"), log=tmp_path / "log", limit_bytes=None)
    assert not commands_with(f"# {tmp_path}")


# --- options


def test_a_limit_of_the_user_is_the_budget() -> None:
    budget = memory_budget(torch.device("cpu"), limit_gib=1.5, local_size=2)
    assert budget == (3 * GIB // 2, "--memory_limit_gib")


def test_on_a_cpu_processes_share_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    budget, source = memory_budget(torch.device("cpu"), limit_gib=None, local_size=1)
    assert 0 < budget < psutil.virtual_memory().total
    assert source == "memory free on this machine"
    free = psutil.virtual_memory()  # what is free changes between two looks
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    assert memory_budget(torch.device("cpu"), limit_gib=None, local_size=2)[0] == free.available // 2


def test_gradient_checkpointing_is_left_to_the_search_unless_given(tmp_path: Path) -> None:
    (tmp_path / "given.yaml").write_text("gradient_checkpointing: false\n")
    (tmp_path / "other.yaml").write_text("lora_r: 8\n")
    for given in (
        ["--gradient_checkpointing", "false"],
        ["--gradient-checkpointing=false"],
        ["--no_gradient_checkpointing"],
        ["--activation_checkpointing", "true"],
        ["--config", str(tmp_path / "given.yaml")],
        [f"--config={tmp_path / 'given.yaml'}"],
    ):
        assert is_checkpointing_given(given)
    assert not is_checkpointing_given(["--config", str(tmp_path / "other.yaml"), "--lora_r", "8"])


def test_advice_leaves_out_what_is_set_already() -> None:
    data = DataOptions(dataset_path="d", layout="frames", vision_features="f")
    model = ModelOptions(finetuning="lora")
    given = suggest_changes(RunOptions(data, TrainingOptions(use_cpu=True, dataloader_num_workers=0), model))
    assert given == ["--finetuning qlora", "--layout grid", "--image_size 448", "a smaller model, or more memory"]
    data = DataOptions(dataset_path="d")
    model = ModelOptions(finetuning="qlora", train_projector=True, image_size=448)
    given = suggest_changes(
        RunOptions(data, TrainingOptions(use_cpu=True, gradient_checkpointing=False, dataloader_num_workers=2), model)
    )
    assert given == ["--gradient_checkpointing true", "--dataloader_num_workers 0", "a smaller model, or more memory"]
    data = DataOptions(dataset_path="d", layout="trajectory", max_decisions=6)
    given = suggest_changes(RunOptions(data, TrainingOptions(use_cpu=True, dataloader_num_workers=0), model))
    assert given == ["--layout grid", "--max_decisions 3", "a smaller model, or more memory"]


# --- several processes


def test_without_a_launcher_there_is_one_process_with_the_first_gpu() -> None:
    environ = {"CUDA_VISIBLE_DEVICES": "3,5", "PATH": "p"}
    ranks = join_ranks(environ)
    assert (ranks.rank, ranks.size, ranks.gather("mine")) == (0, 1, ["mine"])
    assert environ == {"CUDA_VISIBLE_DEVICES": "3", "PATH": "p"}


def test_trials_get_the_gpu_of_their_process_and_no_launcher_variables() -> None:
    launcher = {
        "RANK": "0",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
        "TORCHELASTIC_RUN_ID": "none",
    }
    environ = {**launcher, "ACCELERATE_MIXED_PRECISION": "bf16"}
    assert join_ranks(environ).local_size == 2
    assert environ == {"ACCELERATE_MIXED_PRECISION": "bf16", "CUDA_VISIBLE_DEVICES": "1"}


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_gpus_that_are_hidden_stay_hidden(hidden: str) -> None:
    environ = {"CUDA_VISIBLE_DEVICES": hidden}
    join_ranks(environ)
    assert environ == {"CUDA_VISIBLE_DEVICES": hidden}


def test_a_launcher_that_shards_the_model_is_refused() -> None:
    with pytest.raises(PokegemmaError, match="fsdp2 or deepspeed_zero3"):
        join_ranks({"ACCELERATE_USE_FSDP": "true"})


def test_an_error_in_one_process_reaches_all() -> None:
    class OtherFails:
        def gather(self, value: object) -> list[object]:
            return [value, PokegemmaError("the other one failed")]

    with pytest.raises(PokegemmaError, match="the other one failed"):
        in_lockstep(lambda size, on: Trial(True, 1, 1.0), OtherFails())(4, True)


# --- for real


def flags(dataset: Path, model: Path) -> list[str]:
    return [
        "--dataset_path",
        str(dataset),
        "--model_name",
        str(model),
        "--finetuning",
        "lora",
        "--use_cpu",
        "true",
        "--dataloader_num_workers",
        "0",
        "--trial_steps",
        "2",
        "--headroom",
        "0",
    ]


@pytest.fixture(scope="module")
def single(toy_dataset: Path, tiny_model: Path, forked_python: str, tmp_path_factory: pytest.TempPathFactory) -> Trial:
    """Return the trial of one sample with gradient checkpointing, unlimited."""
    folder = tmp_path_factory.mktemp("single") / "dataset"
    model = ModelOptions(model_name_or_path=str(tiny_model), finetuning="lora")
    steps = {"step_rows": 1, "num_steps": 2}
    write_trial_dataset(DataOptions(dataset_path=str(toy_dataset)), model, folder, **steps)
    arguments = flags(toy_dataset, tiny_model)
    run_trial = TrialRunner(arguments, folder, limit_bytes=16 * GIB, on_gpu=False, num_processes=1, **steps)
    with pytest.MonkeyPatch.context() as patch:
        start_by_forks(runner, forked_python, patch)
        return run_trial(1, True)


@pytest.fixture
def forked_trials(forked_python: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork what trains in trials; the memory of each is measured and limited as that of a new Python."""
    start_by_forks(runner, forked_python, monkeypatch)


@pytest.fixture
def search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that calls the script in tmp_path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return functools.partial(call_script, "find_batch_size")


@pytest.mark.parametrize(("asked", "in_force"), [(True, "off"), (False, "not reentrant")])
def test_a_trial_that_did_not_do_what_it_was_to_measure_is_refused(asked: bool, in_force: str) -> None:
    with pytest.raises(PokegemmaError, match=f"--gradient_checkpointing {str(asked).lower()}.*{in_force}"):
        check_trial_mode({"gradient_checkpointing": in_force}, expected=asked)
    check_trial_mode({"gradient_checkpointing": in_force}, expected=not asked)
    check_trial_mode({"out_of_memory": "x"}, expected=asked)


@pytest.mark.slow(45)
def test_a_trial_trains_for_real_and_measures(single: Trial) -> None:
    assert single.fits
    assert 200 * MIB < single.peak_bytes < 4 * GIB
    assert single.decisions_per_second > 0


@pytest.mark.slow(45)
def test_the_search_stops_at_the_memory_limit_and_writes_what_it_found(
    single: Trial, toy_dataset: Path, tiny_model: Path, tmp_path: Path, search: Callable, forked_trials: None
) -> None:
    (tmp_path / ".env").write_text("LAYOUT=grid\nBATCH_SIZE=4 # mine\n")
    limit = f"{1.2 * single.peak_bytes / GIB:.3f}"
    done = search(
        *flags(toy_dataset, tiny_model),
        "--effective_batch_size",
        str(NUM_SAMPLES),
        "--write_env",
        "--gradient_checkpointing",
        "true",
        "--memory_limit_gib",
        limit,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "batch_size_results.json").read_text())
    assert record["found"] == {"BATCH_SIZE": 1, "GRAD_ACCUM": NUM_SAMPLES, "gradient_checkpointing": True}
    assert [(t["batch_size"], t["trial"]["fits"]) for t in record["trials"]] == [(1, True), (NUM_SAMPLES, False)]
    assert record["trials"][1]["trial"]["reason"].startswith("stopped at ")
    assert (tmp_path / ".env").read_text() == f"LAYOUT=grid\nBATCH_SIZE=1 # mine\nGRAD_ACCUM={NUM_SAMPLES}\n"
    assert read_settings(tmp_path / ".env", {})["BATCH_SIZE"] == "1"
    assert f"{NUM_SAMPLES} does not (stopped at " in done.stdout
    assert f"take BATCH_SIZE=1 GRAD_ACCUM={NUM_SAMPLES}" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == [".env", "batch_size_results.json"]


@pytest.mark.slow(45)
def test_changes_are_suggested_where_one_sample_does_not_fit(
    toy_dataset: Path, tiny_model: Path, tmp_path: Path, search: Callable, forked_trials: None
) -> None:
    (tmp_path / ".env").write_text("BATCH_SIZE=4\n")
    done = search(*flags(toy_dataset, tiny_model), "--memory_limit_gib", "0.1", "--write_env")
    assert done.returncode == 1, done.stderr
    changes = "--finetuning qlora; --vision_features DIR; --image_size 448; a smaller"
    assert f"error: even one sample does not fit; try: {changes}" in done.stderr
    assert json.loads((tmp_path / "batch_size_results.json").read_text())["found"] is None
    assert (tmp_path / ".env").read_text() == "BATCH_SIZE=4\n"


@pytest.mark.slow(45)
def test_a_trial_that_fails_for_another_reason_ends_the_search(
    toy_dataset: Path, tiny_model: Path, tmp_path: Path, search: Callable
) -> None:
    done = search(*flags(toy_dataset, tiny_model), "--lora_target_modules", "no_such_layer")
    assert done.returncode == 2
    assert "error: a trial failed" in done.stderr
    assert "no_such_layer" in done.stderr
    assert list(tmp_path.iterdir()) == []


LAUNCHED = f"""
import os, runpy, sys
from pathlib import Path

import pytest
from pokegemma.training.batch_search import runner
from tests.forked_python import start_by_forks

start_by_forks(runner, sys.executable, pytest.MonkeyPatch())
rank = os.environ["RANK"]
sys.argv += ["--memory_limit_gib", sys.argv.pop(1) if rank == "1" else sys.argv.pop(1) and "16"]
from pokegemma.training.batch_search import search

take = search.fastest


def fastest(attempts):
    Path(f"answer_{{rank}}").write_text(str(take(attempts).batch_size))
    return take(attempts)


search.fastest = fastest
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""


@pytest.mark.slow(45)
def test_the_search_uses_the_smaller_memory_limit_of_two_processes(
    single: Trial, toy_dataset: Path, tiny_model: Path, tmp_path: Path, forked_python: str
) -> None:
    (tmp_path / "launched.py").write_text(LAUNCHED)
    limit = f"{1.2 * single.peak_bytes / GIB:.2f}"  # as many places as the report has
    command = [
        forked_python,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "launched.py",
        limit,
        *flags(toy_dataset, tiny_model),
        "--effective_batch_size",
        str(2 * NUM_SAMPLES),
        "--gradient_checkpointing",
        "true",
    ]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(PROJECT_ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"answer_{rank}").read_text() for rank in (0, 1)] == ["1", "1"]
    record = json.loads((tmp_path / "batch_size_results.json").read_text())
    assert (record["num_processes"], record["effective_batch_size"]) == (2, 2 * NUM_SAMPLES)
    assert record["found"] == {"BATCH_SIZE": 1, "GRAD_ACCUM": NUM_SAMPLES, "gradient_checkpointing": True}
    assert record["trials"][1]["trial"]["reason"].endswith(f"of {limit} GiB")  # the second process's limit
    assert done.stdout.count("take BATCH_SIZE=1") == 1


def test_trajectories_of_a_trial_have_the_tokens_that_were_counted(toy_dataset, tiny_model, tmp_path):
    data = DataOptions(dataset_path=str(toy_dataset), layout="trajectory", max_decisions=4)
    model = ModelOptions(model_name_or_path=str(tiny_model), finetuning="lora")
    counted = write_trial_dataset(data, model, tmp_path / "trial", step_rows=2, num_steps=1)
    collator = make_collator(open_checkpoint(tiny_model).processor, layout="trajectory", dataset_folder=Path())
    rows = list(read_examples(tmp_path / "trial" / "train.jsonl", data))
    assert [collator.count_tokens(row) for row in rows] == counted
