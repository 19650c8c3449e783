"""The main job on the real sessions: convert, validate, train, merge with --verify, evaluate.

For one layout merging and evaluation are processes, as users run them; other tests start checks and training so.
"""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from pokegemma.provenance import PROJECT_ROOT
from tests.conftest import MakeOnce
from tests.processes import call_script


def run(script: str, *arguments: object, as_process: bool) -> str:
    """Run a script of the project; return what it printed to stdout."""
    if as_process:
        command = [sys.executable, str(PROJECT_ROOT / "scripts" / f"{script}.py"), *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, text=True)
    else:
        result = call_script(script, *arguments)
    assert result.returncode == 0, f"{script}: {result.stdout[-2000:]}\n{result.stderr[-2000:]}"
    return result.stdout


@pytest.fixture(scope="module")
def dataset(real_runs: Path, make_once: MakeOnce) -> Path:
    def fill(folder: Path) -> None:
        run(
            "convert_eevee_data_v2", "--eevee_data_dir", real_runs, "--output_dir", folder / "dataset", as_process=False
        )

    return make_once("real_dataset_with_grids", fill) / "dataset"


def test_the_real_sessions_give_503_samples_and_154_turns_without_a_decision(dataset: Path) -> None:
    lines = [line for name in ("train.jsonl", "eval.jsonl") for line in (dataset / name).read_text().splitlines()]
    assert len(lines) == 503
    report = json.loads((dataset / "conversion_report.json").read_text())
    assert report["turns"] == 657
    assert sum(report["turns_without_sample"].values()) == 154


@pytest.mark.slow(35)
@pytest.mark.parametrize("layout", ["grid", "frames", "trajectory"])
def test_the_main_job_runs_on_the_real_sessions(layout: str, dataset: Path, tiny_model: Path, tmp_path: Path) -> None:
    call = functools.partial(run, as_process=False)
    call_later = functools.partial(run, as_process=layout == "grid")  # the layouts differ within a process
    adapter, merged, evaluation = tmp_path / "adapter", tmp_path / "merged", tmp_path / "evaluation"
    view = {"layout": layout}
    if layout == "trajectory":
        view |= {"max_decisions": 5, "overlap_decisions": 1}
    common = ("--dataset_path", dataset, *(word for name, value in view.items() for word in (f"--{name}", value)))
    validation = json.loads(
        call(
            "validate_training",
            *common,
            "--model_name_or_path",
            tiny_model,
            "--skip_step",
            "--json",
            "--contact_sheet",
            tmp_path / "sheet.png",
            "--output_dir",
            adapter,
        )
    )
    assert "FAIL" not in {check["status"] for check in validation["checks"]}
    call(
        "sft_pokemon_gemma3",
        *common,
        "--model_name_or_path",
        tiny_model,
        "--output_dir",
        adapter,
        "--max_steps",
        3,
        "--eval_strategy",
        "no",
        "--per_device_train_batch_size",
        2,
        "--gradient_accumulation_steps",
        1,
        "--dataloader_num_workers",
        2,
    )
    printed = call_later("merge_qlora", "--lora_path", adapter, "--output_path", merged, "--verify", "--num_samples", 2)
    assert "merged against adapter + base" in printed
    call_later(
        "evaluate",
        "--model_path",
        merged,
        "--dataset_path",
        dataset,
        "--output_dir",
        evaluation,
        "--max_samples",
        12,
        "--max_new_tokens",
        8,
    )
    evaluated = json.loads((evaluation / "run.json").read_text())["options"]
    assert {name: evaluated[name] for name in view} == view  # not repeated, but known from the merged model
    metrics = json.loads((evaluation / "metrics.json").read_text())
    assert {row["name"] for row in metrics["rows"]} >= {"model (generated)", "model (scored)", "majority"}
    assert (evaluation / "report.html").stat().st_size > 10_000
