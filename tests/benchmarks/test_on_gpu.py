"""The run on a GPU, rehearsed on the CPU: its parts, its JSON, what fails or takes too long, and the tables of it."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import on_gpu
from benchmarks.gpu_parts import exactness, requirements
from benchmarks.gpu_parts.part_process import PartResult, error_in, run_part
from benchmarks.gpu_parts.plan import CHECKPOINT, DATASET, LIMIT_S, LOSSES, PARTS, RATES, RESERVE_S, Part, Run
from benchmarks.gpu_parts.worker import measure_units
from benchmarks.on_gpu import GpuOptions, Report, with_needed
from benchmarks.train_throughput import ROWS
from docs import make_gpu_tables
from pokegemma.environment import Hardware
from pokegemma.errors import CheckFailedError, PokegemmaError
from pokegemma.provenance import PROJECT_ROOT
from tests.processes import WAIT_S

CPU = Hardware(gpus=(), mps=False, num_cores=2, memory_gib=8.0, torch_is_cpu_build=True)


def part(name: str) -> Part:
    return next(one for one in PARTS if one.name == name)


# --- the plan


def test_each_unit_has_a_measurement_and_each_part_what_it_needs() -> None:
    before: set[str] = set()
    for one in PARTS:
        assert before.issuperset(one.needs)
        assert callable(importlib.import_module(one.module).measure)
        before |= set(one.units)
    assert set(part("training").units) - {LOSSES} <= {row.name for row in ROWS}
    assert len(before) == sum(len(one.units) for one in PARTS), "two units have one name"
    assert sum(one.share_s for one in PARTS) <= LIMIT_S - RESERVE_S <= 480


def test_parts_are_run_with_those_that_they_need() -> None:
    assert [one.name for one in with_needed(["latency"])] == ["preparation", "checkpoint", "latency"]
    assert with_needed([one.name for one in PARTS]) == list(PARTS)


# --- processes of parts, with units that do not import torch

UNITS = """
import os, sys, time

def measure(unit, run):
    if unit == "raises":
        print("a line before", file=sys.stderr)
        raise ValueError("a wrong value")
    if unit == "dies":
        os._exit(3)
    if unit == "sleeps":
        time.sleep(600)
    if unit == "fails":
        return {"failed": "differs", "figure": 1}
    return {"skipped": "not here"} if unit == "skips" else {"figure": 2}
"""


@pytest.fixture
def run_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that runs a part of the units above, and returns what was reported and its result."""
    (tmp_path / "units_of_a_test.py").write_text(UNITS)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(PROJECT_ROOT)]))

    def run(*units: str, limit_s: float = WAIT_S, **changes: Any) -> tuple[list[PartResult], PartResult]:
        reported: list[PartResult] = []
        one = replace(Part("units", "units_of_a_test", 1, units), **changes)
        return reported, run_part(one, Run(tmp_path, True), limit_s=limit_s, on_row=reported.append)

    return run


def test_a_unit_that_fails_loses_no_other(run_units: Any) -> None:
    reported, result = run_units("first", "raises", "dies", "fails", "skips", "last")
    assert result.status == "failed"
    assert result.reason == "raises: ValueError: a wrong value; dies: exit status 3; fails: differs"
    assert [row.get("figure") for row in result.rows] == [2, None, None, 1, None, 2]
    assert result.rows[1]["log"][0] == "a line before"
    assert result.rows[4]["skipped"] == "not here"
    assert {(one.status, one.reason) for one in reported} == {("failed", "the run ended here")}
    assert [len(one.rows) for one in reported][:2] == [0, 1]


def test_a_part_that_takes_too_long_is_stopped_and_keeps_its_rows(run_units: Any, tmp_path: Path) -> None:
    Run(tmp_path, True).add_row("units", {"unit": "first", "figure": 2})
    _, result = run_units("first", "sleeps", "last", limit_s=1)
    assert (result.status, result.reason) == ("failed", "stopped after its 1 s, 1 of 3 measured")
    assert [row["unit"] for row in result.rows] == ["first"]
    assert result.seconds < 60


def test_a_unit_for_which_no_time_is_left_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "units_of_a_test.py").write_text(UNITS)
    monkeypatch.syspath_prepend(str(tmp_path))
    run = Run(tmp_path, True)
    run.add_row("units", {"unit": "first", "figure": 2, "seconds": 50})
    for seconds, last in ((60, {"unit": "second", "figure": 2}), (10, {"unit": "third"})):
        units = ("first", "second", "third")[: 2 + (last["unit"] == "third")]
        measure_units(Part("units", "units_of_a_test", 1, units), run, ends=time.monotonic() + seconds)
        assert run.rows("units")[-1].items() >= last.items()
    assert run.rows("units")[-1]["skipped"] == "10 s were left, and a unit before took 50 s"


def test_a_part_without_figures_is_skipped(run_units: Any) -> None:
    assert run_units("skips")[1].status == "skipped"
    _, result = run_units("first", needs=(DATASET,))
    assert (result.status, result.reason, result.rows) == ("skipped", "not measured: dataset", [])


@pytest.mark.parametrize(
    ("log", "line"),
    [
        ("noise\nerror: too small\nmore noise\n", "too small"),
        ("Traceback\n  x = 1\ntorch.OutOfMemoryError: CUDA out of memory\n[rank0] warning\n", None),
        ("one line\n\n", "one line"),
        ("", None),
    ],
)
def test_the_line_of_an_error_is_found(log: str, line: str | None) -> None:
    assert error_in(log) == ("torch.OutOfMemoryError: CUDA out of memory" if "CUDA" in log else line)


# --- the whole


UNITS_REHEARSED = (
    CHECKPOINT,
    ROWS[0].name,
    "trajectory, cached",
    LOSSES,
    "lora",
    "decision as frames",
    "bfloat16",
    "fsdp2",
)


@pytest.fixture(scope="module")
def record(toy_dataset: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the JSON of a rehearsal of some units of each kind, in this process."""
    folder = tmp_path_factory.mktemp("gpu")
    run = Run(folder, rehearse=True)
    shutil.copytree(toy_dataset, run.dataset)
    run.add_row("preparation", {"unit": RATES, "flop_per_s": 2e12, "bytes_per_s": 3e9, "device": "cpu"})
    for unit in UNITS_REHEARSED:
        one = next(one for one in PARTS if unit in one.units)
        row = importlib.import_module(one.module).measure(unit, run)
        run.add_row(one.name, {"unit": unit, **row, "seconds": 1.0})
    report = Report(GpuOptions(output=str(folder / "on_gpu.json"), rehearse=True, commit="0123abcdef"), PARTS)
    for one in PARTS:
        rows = run.rows(one.name)
        report.save(one, PartResult("completed", None, 1.0, 2.0, rows) if rows else PartResult("skipped", "no time"))
    return json.loads((folder / "on_gpu.json").read_text())


@pytest.mark.slow(25)
def test_a_rehearsal_measures_what_a_gpu_will(record: dict[str, Any]) -> None:
    rows = {row["unit"]: row for one in record["parts"].values() for row in one["rows"]}
    stock, ours = rows[ROWS[0].name], rows["trajectory, cached"]
    assert stock["teraflop"] > ours["teraflop"] > 0
    assert len(stock["losses"]) == 3
    assert 0 <= rows[LOSSES]["largest_difference"] < 1e-5
    (trial,) = rows["lora"]["trials"]
    assert trial["trial"]["fits"] and trial["trial"]["peak_bytes"] > 0
    assert trial["estimated_bytes"]["activations"] > 0
    played = rows["decision as frames"]["rows"][-1]
    assert (played["same_button"], played["compared"]) == (2, 2)
    assert 0 < played["floor_ms"] < played["median_ms"]
    differences = rows["bfloat16"]["differences"]
    assert differences["shared rows, float32"]["gradient"] < 1e-5 < differences["frames, bfloat16"]["gradient"]
    assert rows["fsdp2"] == {"unit": "fsdp2", "skipped": "accelerate runs FSDP2 on a GPU only", "seconds": 1.0}


@pytest.mark.slow(25)
def test_the_tables_have_what_was_measured_and_what_was_not(record: dict[str, Any]) -> None:
    text = make_gpu_tables.describe(record)
    assert "commit 0123abc, 20" in text
    assert "2 teraFLOP/s" in text
    assert "A rehearsal with tiny shapes" in text
    assert "Gemma-3-4B" not in text
    assert "in Gemma-3-4B's shape" in make_gpu_tables.machine({**record, "rehearsal": False})
    lines = text.splitlines()
    (header,) = [line for line in lines if "decisions/s | ratio" in line]
    assert header.endswith("| share of 2 teraFLOP/s |")
    (stock,) = [line for line in lines if line.startswith(f"| {ROWS[0].name} |")]
    assert stock.split("|")[3].strip() == "1.0"
    (lora,) = [line for line in lines if line.startswith("| lora | 1 |")]
    assert len(lora.split("|")) == len(make_gpu_tables.TRIALS) + 2
    assert len([line for line in lines if line.startswith("| frames, 56 px: ")]) == 6
    assert "- batch size, search: no time" in lines
    assert "- exactness, fsdp2: accelerate runs FSDP2 on a GPU only" in lines


@pytest.mark.slow(25)
def test_one_command_rehearses_and_writes_one_json(tmp_path: Path) -> None:
    output = tmp_path / "on_gpu.json"
    command = [str(PROJECT_ROOT / "benchmarks" / "on_gpu.sh"), "--rehearse", "--parts", "checkpoint"]
    command += ["--output", str(output), "--commit", "0123abc"]
    environment = {**os.environ, "PYTHON": sys.executable, "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads(output.read_text())
    assert (record["rehearsal"], record["commit"]) == (True, "0123abc")
    assert record["versions"]["torch"]
    statuses = {name: (one["status"], one["reason"]) for name, one in record["parts"].items()}
    assert statuses.pop("checkpoint") == ("completed", None)
    assert record["parts"]["checkpoint"]["rows"][0]["weights"] > 1_000_000
    assert set(statuses.values()) == {("skipped", "not chosen")}
    assert [path.name for path in tmp_path.iterdir()] == [output.name]  # nothing is left in TMPDIR


# --- refusals


def call(*arguments: str, python: str = sys.executable) -> tuple[int, str]:
    command = [str(PROJECT_ROOT / "benchmarks" / "on_gpu.sh"), *arguments]
    done = subprocess.run(
        command, env={**os.environ, "PYTHON": python}, capture_output=True, text=True, check=False, timeout=WAIT_S
    )
    return done.returncode, done.stderr


def test_missing_packages_are_refused_in_one_line(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    returncode, message = call("--rehearse", python=str(python))
    assert returncode == 2
    assert message.startswith("error: packaging is not installed; psutil is not installed: ")
    assert message.count("\n") == 1


def test_a_package_outside_its_range_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert requirements.find_problems() == []
    pyproject = tmp_path / "pyproject.toml"
    pyproject.write_text('[project]\ndependencies = ["psutil>=999", "no-such-package", "wandb>=999", "numpy>=1"]\n')
    monkeypatch.setattr(requirements, "PYPROJECT", pyproject)
    version = importlib.import_module("psutil").__version__
    assert requirements.find_problems() == [f"psutil {version} is not >=999", "no-such-package is not installed"]


def test_wheels_that_are_not_there_or_too_large_are_refused(tmp_path: Path) -> None:
    assert call("--wheels", str(tmp_path)) == (2, f"error: --wheels {tmp_path}: no wheels (*.whl) in it\n")
    with open(tmp_path / "large.whl", "wb") as file:
        file.truncate(61 * 2**20)
    assert call("--wheels", str(tmp_path))[1] == f"error: --wheels {tmp_path}: 61 MiB; at most 60 MiB are carried\n"


def test_a_run_without_a_gpu_or_over_a_result_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_gpu, "detect_hardware", lambda: CPU)
    with pytest.raises(PokegemmaError, match="no NVIDIA GPU that torch can use"):
        Report(GpuOptions(output=str(tmp_path / "new.json")), PARTS)
    (tmp_path / "old.json").touch()
    with pytest.raises(PokegemmaError, match=r"old\.json exists"):
        Report(GpuOptions(output=str(tmp_path / "old.json"), rehearse=True), PARTS)
    report = Report(GpuOptions(output=str(tmp_path / "new.json"), rehearse=True, commit="0123abc"), PARTS)
    report.save(part("memory"), PartResult("failed", "full: no"))
    with pytest.raises(CheckFailedError, match="failed: memory"):
        report.require_success()


def test_bfloat16_may_be_as_far_from_float32_as_stock_is() -> None:
    figures = {"stock, bfloat16": {"loss": 0.01, "gradient": 0.1}}
    assert exactness.is_near("frames, bfloat16", {"loss": 0.02, "gradient": 0.2}, figures)
    assert not exactness.is_near("frames, bfloat16", {"loss": 0.02, "gradient": 0.3}, figures)
    assert not exactness.is_near("frames, float32", {"loss": 0.01, "gradient": 0.0}, figures)
    assert not exactness.is_near("frames, float32", {"loss": float("nan"), "gradient": 0.0}, figures)


# --- the page


def test_the_page_has_the_figures_of_the_result_or_says_that_there_are_none() -> None:
    page = make_gpu_tables.PAGE.read_text(encoding="utf-8")
    result = make_gpu_tables.read_result(make_gpu_tables.RESULT, required=False)
    assert make_gpu_tables.write_page(page, result) == page, "run: python docs/make_gpu_tables.py"
    assert (result is None) == (make_gpu_tables.NOT_MEASURED in page)


def test_a_rehearsal_is_not_written_into_the_page(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    for content, problem in (("{", "cannot be read"), ("{}", "is not a result"), ('{"stage": "on_gpu"}', None)):
        path.write_text(content)
        if problem:
            with pytest.raises(PokegemmaError, match=problem):
                make_gpu_tables.read_result(path, required=True)
    path.write_text('{"stage": "on_gpu", "rehearsal": true}')
    with pytest.raises(PokegemmaError, match="is a rehearsal"):
        make_gpu_tables.read_result(path, required=True)
    assert make_gpu_tables.read_result(tmp_path / "none.json", required=False) is None
