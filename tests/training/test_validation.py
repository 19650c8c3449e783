"""scripts/validate_training.py as a user calls it, and its one real step."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pokegemma.data.checks import find_splits
from pokegemma.data.convert import WindowOptions
from pokegemma.data.corpus import convert_corpus
from pokegemma.training.models import make_tiny_gemma3
from pokegemma.training.trial_step import check_step, longest_samples
from tests.datasets import make_sample, put_leak_back, write_dataset, write_split

ROOT = Path(__file__).resolve().parents[2]
TRAIN = [sys.executable, str(ROOT / "scripts" / "sft_pokemon_gemma3.py")]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny_gemma3(folder, image_size_px=56, num_image_tokens=16)
    return folder


def validate(*arguments):
    command = [sys.executable, ROOT / "scripts" / "validate_training.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def step(split, model, *, command=TRAIN, **changes):
    options = {"layout": "frames", "finetuning": "lora", "max_length": None, "seed": 0, **changes}
    return check_step(command, split, model=str(model), **options)


@pytest.mark.slow
def test_a_good_dataset_exits_0_and_a_leaked_one_1(real_runs, tiny, tmp_path):
    dataset = tmp_path / "real"
    convert_corpus(real_runs, dataset, window=WindowOptions(4, 4, 30.0, False), eval_fraction=0.1, num_workers=2)
    common = ("--model_name_or_path", tiny, "--skip_step", "--output_dir", tmp_path, "--layout", "frames")
    good = validate("--dataset_path", dataset, *common)
    assert good.returncode == 0, good.stdout + good.stderr
    assert "0 FAIL" in good.stdout.splitlines()[-1]
    assert (dataset / "contact_sheet.png").is_file()

    train, held_out = (put_leak_back(split, real_runs).path for split in find_splits(dataset))
    sheet = tmp_path / "sheet.png"
    leaked = validate(
        "--dataset_path", train, "--eval_dataset_path", held_out, "--contact_sheet", sheet, "--json", *common
    )
    assert leaked.returncode == 1
    result = json.loads(leaked.stdout)
    failed = {check["name"]: check for check in result["checks"] if check["status"] == "FAIL"}
    assert sorted(failed) == ["prompts", "target text in prompt", "text-only probe"]
    assert len(failed["target text in prompt"]["details"]) > 490
    assert sheet.is_file()


def test_all_checks_run_when_the_model_is_out_of_reach(tmp_path):
    write_dataset(tmp_path / "data")
    result = validate("--dataset_path", tmp_path / "data", "--model_name_or_path", "./no_model", "--json")
    statuses = {check["name"]: check["status"] for check in json.loads(result.stdout)["checks"]}
    assert result.returncode == 1
    assert [name for name, status in statuses.items() if status == "FAIL"] == ["model access"]
    assert [name for name, status in statuses.items() if status == "SKIP"] == [
        "token lengths",
        "memory (estimate)",
        "one step",
    ]
    assert statuses["pictures"] == "PASS"


def test_a_users_mistake_exits_2_with_one_line(tmp_path):
    for arguments in (
        ("--dataset_path", tmp_path / "none"),
        ("--dataset_path", tmp_path, "--layout", "mosaic"),
        ("--dataset_path", tmp_path, "--num_workers", "-1"),
    ):
        result = validate(*arguments)
        assert result.returncode == 2
        assert result.stderr.startswith("error: ")
        assert len(result.stderr.splitlines()) == 1


@pytest.mark.slow
def test_one_step_trains_saves_and_reloads(tmp_path, tiny):
    train, _ = write_dataset(tmp_path, num_sessions=3, num_turns=3)
    check = step(train, tiny)
    assert check.status == "PASS", check
    assert check.summary.startswith("loaded, trained (loss ")


@pytest.mark.slow
def test_a_step_that_cannot_read_its_pictures_fails_with_the_reason(tmp_path, tiny):
    split = write_split(tmp_path / "train.jsonl", [make_sample("s", 1, "up")], draw=False)
    (tmp_path / "frames").mkdir()
    check = step(split, tiny)
    assert check.status == "FAIL"
    assert "0001.png" in check.summary


def test_a_step_that_is_killed_or_saves_nothing_fails(tmp_path, tiny):
    split = write_split(tmp_path / "train.jsonl", [make_sample("s", 1, "up")])
    killed = step(split, tiny, command=[sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])
    assert killed.summary == "training was killed (out of memory?): no message"
    nothing = step(split, tiny, command=[sys.executable, "-c", ""])
    assert nothing.summary == "training saved no trainer_state.json"
    assert step(write_split(split.path, []), tiny).status == "SKIP"


def test_the_step_takes_the_longest_samples(tmp_path):
    samples = [make_sample("s", turn, "up", ["up"] * length) for turn, length in enumerate([1, 8, 3, 8, 5], start=1)]
    chosen = longest_samples(write_split(tmp_path / "train.jsonl", samples, draw=False), number=3)
    assert [sample.id for sample in chosen] == ["s/2", "s/4", "s/5"]
