"""Shared memory of data loader workers: what training needs, and what happens where /dev/shm has too little."""

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from pokegemma.data.checks.records import find_splits
from pokegemma.data.samples import Sample
from pokegemma.gemma.batches import shared_memory
from pokegemma.gemma.batches.shared_memory import FOLDER, SharedMemoryError, check_free, free_bytes
from pokegemma.provenance import PROJECT_ROOT
from pokegemma.training.preflight.loader_memory import Loading, RowSize, measure_rows, needed_bytes
from pokegemma.training.preflight.run import run_checks
from tests.processes import call_script, run_with_small_disk
from tests.training.preflight.planned_runs import plan_run

MIB = 2**20
ROWS = RowSize(num_rows=100, tensors=(MIB,))
SEMAPHORES = 64 * 1024
COLLATE_IN_A_WORKER = """
import torch
from torch.utils.data import DataLoader
from pokegemma.cli import run
from pokegemma.gemma.batches.shared_memory import share

def main():
    loader = DataLoader(range(8), num_workers=1, collate_fn=lambda items: share({"pixels": torch.ones(2**18)}))
    print(len(list(loader)))

run(main)
"""


def loading(**changes: int | bool) -> Loading:
    options = {"num_workers": 1, "batch_size": 1, "eval_batch_size": 0, "accumulation": 1, "on_cpu": True}
    return Loading(**{**options, **changes})


def test_each_tensor_of_a_batch_takes_whole_pages() -> None:
    assert RowSize(9, tensors=(4096, 100)).batch_bytes(1) == 2 * 4096
    assert RowSize(9, tensors=(4096, 100)).batch_bytes(41) == 43 * 4096


@pytest.mark.parametrize(
    ("changes", "num_batches"),
    [
        ({}, 5),  # 4 measured
        ({"accumulation": 4}, 11),  # 10 measured
        ({"num_workers": 4, "prefetch_factor": 3}, 15),
        ({"on_cpu": False, "accumulation": 4}, 4),
        ({"batch_size": 30}, 4 * 30),  # of 100 rows there are four batches
    ],
)
def test_training_needs_what_is_ready_and_what_it_keeps(changes: dict, num_batches: int) -> None:
    needed = needed_bytes(loading(**changes), ROWS, None)
    assert needed == num_batches * MIB + changes.get("num_workers", 1) * SEMAPHORES


def test_an_evaluation_comes_on_top_of_the_batches_of_training() -> None:
    size = {"batch_size": 4, "accumulation": 2, "eval_batch_size": 8, "num_workers": 2}
    batches = 7 * 4 + 7 * 8  # 7 x 4 and 6 x 8 measured
    assert needed_bytes(loading(**size), ROWS, ROWS) == batches * MIB + 4 * SEMAPHORES
    assert needed_bytes(loading(**size), ROWS, None) == 9 * 4 * MIB + 2 * SEMAPHORES
    few = RowSize(num_rows=10, tensors=(MIB,))
    assert needed_bytes(loading(**size), ROWS, few) == (7 * 4 + 2 * 8) * MIB + 4 * SEMAPHORES


def test_processes_of_a_machine_share_it_and_without_workers_nothing_is_needed() -> None:
    assert needed_bytes(loading(num_processes=3), ROWS, None) == 3 * (5 * MIB + SEMAPHORES)
    assert needed_bytes(loading(num_workers=0), ROWS, ROWS) == 0


def test_the_largest_row_is_measured_as_it_is_collated(samples: list[Sample], make_collator: Callable) -> None:
    collator = make_collator("frames")
    rows = measure_rows(collator, samples[:9])
    pictures = max(len(sample.frames) for sample in samples[:9])
    assert (rows.num_rows, pictures) == (9, 4)
    assert max(rows.tensors) == 4 * 3 * 56 * 56 * 4
    batch = collator(samples[3:7])  # neighbours share frames
    assert rows.batch_bytes(4) >= sum(tensor.nbytes for tensor in batch.values())
    assert max(measure_rows(collator, samples[:9], picture_bytes=100).tensors) < 10_000
    assert measure_rows(collator, []) is None


def test_too_little_shared_memory_is_refused_with_numbers_and_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "free_bytes", lambda: 64 * MIB)
    check_free(64 * MIB)
    with pytest.raises(SharedMemoryError) as caught:
        check_free(64 * MIB + 1, flag="--num_workers")
    for part in ("/dev/shm", "64.0 MiB free", "--shm-size=65m", "--num_workers 0"):
        assert part in str(caught.value)
    assert caught.value.exit_code == 2


def test_shared_memory_without_a_limit_is_not_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.statvfs", lambda _: SimpleNamespace(f_blocks=0, f_bavail=0, f_frsize=4096))
    assert free_bytes() is None
    monkeypatch.setattr("sys.platform", "darwin")
    assert free_bytes() is None


@pytest.mark.parametrize("script", ["sft_pokemon_gemma3", "precompute_features"])
def test_workers_are_refused_before_the_first_step(
    script: str, toy_dataset: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_memory, "free_bytes", lambda: 10_000)
    flags = ["--dataset_path", toy_dataset, "--model_name_or_path", tiny_model]
    if script == "precompute_features":
        flags += ["--vision_features", tmp_path / "features", "--num_workers", 2]
    else:
        flags += ["--output_dir", tmp_path / "run", "--finetuning", "lora", "--dataloader_num_workers", 1]
    done = call_script(script, *flags)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: /dev/shm has 0.0 MiB free")
    assert not (tmp_path / "run").exists()


def test_full_shared_memory_ends_training_instead_of_hanging() -> None:
    done = run_with_small_disk(FOLDER, 3 * 1024, shlex.join([sys.executable, "-c", COLLATE_IN_A_WORKER]))
    assert done.returncode == 2
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: a data loader worker could not share its batch")
    assert "--shm-size" in error


@pytest.mark.parametrize(("free", "status"), [(10_000, "FAIL"), (1 << 40, "PASS")])
def test_the_check_before_training_compares_shared_memory(
    free: int, status: str, toy_dataset: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_memory, "free_bytes", lambda: free)
    splits = find_splits(toy_dataset)
    run = plan_run(*splits, tiny_model, tmp_path, per_device_train_batch_size=2, dataloader_num_workers=2)
    checks = {check.name: check for check in run_checks(run)}
    assert checks["shared memory"].status == status
    assert ("--shm-size" in checks["shared memory"].summary) == (status == "FAIL")


@pytest.mark.slow
def test_the_search_ends_where_not_even_one_sample_has_room(
    toy_dataset: Path, tiny_model: Path, tmp_path: Path
) -> None:
    command = [
        sys.executable,
        PROJECT_ROOT / "scripts" / "find_batch_size.py",
        "--dataset_path",
        toy_dataset,
        "--model_name",
        tiny_model,
        "--finetuning",
        "lora",
        "--dataloader_num_workers",
        1,
        "--output",
        tmp_path / "found.json",
    ]
    done = run_with_small_disk(FOLDER, 100, shlex.join(map(str, command)))
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: /dev/shm has 0.1 MiB free")
    assert not (tmp_path / "found.json").exists()
