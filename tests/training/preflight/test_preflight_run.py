"""scripts/validate_training.py as a user calls it, and its one real step."""

import functools
import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pokegemma.data.checks.records import Split, find_splits
from pokegemma.gemma.batches.feature_cache import missing_feature_bytes
from pokegemma.gemma.batches.processor_collator import make_collator
from pokegemma.gemma.loading import open_checkpoint
from pokegemma.gemma.tiny.gemma3 import make_tiny_gemma3
from pokegemma.provenance import PROJECT_ROOT
from pokegemma.training.preflight import disk, memory
from pokegemma.training.preflight.one_step import check_step, longest_samples, longest_trajectory
from pokegemma.training.preflight.run import check_dataset, run_checks
from tests.datasets import make_sample, put_leak_back, with_grids, write_dataset, write_split
from tests.processes import call_script
from tests.training.preflight.planned_runs import plan_options, plan_run

TRAIN = str(PROJECT_ROOT / "scripts" / "sft_pokemon_gemma3.py")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny_gemma3(folder, image_size_px=56, num_image_tokens=16)
    return folder


validate = functools.partial(call_script, "validate_training")


def step(split, model, *, command, **changes):
    return check_step(command, split, plan_options(model, split.folder, **{"layout": "frames", **changes}))


@pytest.mark.slow
def test_a_good_dataset_exits_0_and_a_leaked_one_1(real_runs, real_dataset, tiny, tmp_path):
    common = ("--model_name_or_path", tiny, "--skip_step", "--output_dir", tmp_path, "--layout", "frames")
    good = validate("--dataset_path", real_dataset, *common)
    assert good.returncode == 0, good.stdout + good.stderr
    assert "0 FAIL" in good.stdout.splitlines()[-1]
    assert (real_dataset / "contact_sheet.png").is_file()

    train, held_out = (put_leak_back(split, real_runs).path for split in find_splits(real_dataset))
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
        "grids",
        "token lengths",
        "shared memory",
        "memory (estimate)",
        "one step",
    ]
    assert statuses["pictures"] == "PASS"


def test_the_check_takes_the_arguments_of_a_training_run_and_writes_nothing(tmp_path):
    write_dataset(tmp_path / "data")
    (tmp_path / "run.yaml").write_text("finetuning: full\nlora_r: 32\nsave_steps: 7\nvision_features: features\n")
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 2}}')
    launch = ("--resume_from_checkpoint", "--overwrite", "--deepspeed", tmp_path / "zero.json", "--fsdp")
    run = ("--dataset_path", tmp_path / "data", "--output_dir", tmp_path / "out", "--config", tmp_path / "run.yaml")
    result = validate(*run, *launch, "--lr_scheduler_type", "linear", "--model_name", "./no_model")
    assert result.returncode == 1, result.stderr
    assert "FAIL  model access" in result.stdout
    assert not (tmp_path / "out").exists()
    unknown = validate(*run, "--lerning_rate", 1)
    assert (unknown.returncode, "--lerning_rate" in unknown.stderr) == (2, True)


def test_a_users_mistake_exits_2_with_one_line(tmp_path):
    for arguments in (
        ("--dataset_path", tmp_path / "none"),
        ("--dataset_path", tmp_path, "--layout", "mosaic"),
        ("--dataset_path", tmp_path, "--num_workers", "-1"),
        ("--dataset_path", tmp_path, "--gradient_accumulation_steps", "0"),
    ):
        result = validate(*arguments)
        assert result.returncode == 2
        assert result.stderr.startswith("error: ")
        assert len(result.stderr.splitlines()) == 1


KEYS = ("id", "frames", "image", "context", "question", "output", "metadata")
METADATA_KEYS = ("session", "turn", "goal", "buttons", "previous_buttons", "more")
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=()), max_size=8),  # lone surrogates, too
    st.sampled_from(["", "?", ".", "x" * 300, "a/" * 3000, "\ud800", "frames", "train.jsonl", "frames/s2/0001.png/x"]),
    st.sampled_from(['{"button": "up", "reasoning": "\\\\ud800", "context": ""}', '{"button": "a"}', "[" * 2000]),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=2)),
    max_leaves=5,
)
CHANGES = st.tuples(
    st.integers(0, 6),
    st.sampled_from([*KEYS, *(f"metadata.{key}" for key in METADATA_KEYS)]),
    st.sampled_from("=-"),
    VALUES,
)
GARBAGE = st.one_of(st.binary(max_size=20), st.sampled_from([b"[" * 5000, b"1" * 5000, b"{}", b"\xff\xfe{", b"NaN"]))


def mutated_lines(lines, changes):
    """Yield JSONL lines with values replaced (a number past the last line: in every line) or removed."""
    for at, line in enumerate(lines):
        record = json.loads(line)
        for number, path, how, value in changes:
            *parents, key = path.split(".")
            holder = record.get("metadata") if parents else record
            if number not in (at, len(lines)) or not isinstance(holder, dict):
                continue
            holder.pop(key, None)
            if how == "=":
                holder[key] = [value] if key == "frames" and isinstance(value, str) else value
        yield json.dumps(record).encode()


@pytest.fixture(scope="module")
def small_dataset(tmp_path_factory):
    """Return a folder of nine samples, and the lines of its two files; contact sheets are small.

    The first sample of each file has a grid picture: most of the time goes into pictures.
    """
    folder = tmp_path_factory.mktemp("small")
    splits = write_dataset(folder, num_sessions=3, num_turns=3)
    for split in splits:
        _, *others = split.samples()
        write_split(split.path, [*with_grids(split)[:1], *others])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pokegemma.data.checks.contact_sheet._PICTURE_PX", (48, 32))
        yield folder, {split.path: split.path.read_bytes().splitlines() for split in splits}


@pytest.mark.slow
@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(changes=st.lists(CHANGES, max_size=4), garbage=st.none() | GARBAGE)
def test_no_dataset_however_broken_ends_a_check_with_a_traceback(small_dataset, changes, garbage):
    folder, files = small_dataset
    for path, lines in files.items():
        path.write_bytes(b"\n".join([*mutated_lines(lines, changes), *([] if garbage is None else [garbage])]))
    run = plan_run(Split("train", folder / "train.jsonl"), Split("eval", folder / "eval.jsonl"), "no_model", folder)
    checks = list(check_dataset(run))
    assert len(checks) == 14
    json.dumps([asdict(check) for check in checks], ensure_ascii=False).encode()


@pytest.mark.slow
def test_one_step_trains_saves_and_reloads(tmp_path, tiny):
    train, _ = write_dataset(tmp_path, num_sessions=3, num_turns=3)
    check = step(train, tiny, command=[sys.executable, TRAIN])
    assert check.status == "PASS", check
    assert check.summary.startswith("loaded, trained (loss ")


@pytest.mark.slow
def test_a_step_that_cannot_read_its_pictures_fails_with_the_reason(tmp_path, tiny, forked_python):
    split = write_split(tmp_path / "train.jsonl", [make_sample("s", 1, "up")], draw=False)
    (tmp_path / "frames").mkdir()
    check = step(split, tiny, command=[forked_python, TRAIN])
    assert check.status == "FAIL"
    assert "0001.png" in check.summary


def test_a_step_that_is_killed_or_saves_nothing_fails(tmp_path, tiny):
    split = write_split(tmp_path / "train.jsonl", [make_sample("s", 1, "up")])
    killed = step(split, tiny, command=[sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])
    assert killed.summary == "training was killed (out of memory?): no message"
    nothing = step(split, tiny, command=[sys.executable, "-c", ""])
    assert nothing.summary == "training saved no trainer_state.json"
    assert step(write_split(split.path, []), tiny, command=[]).status == "SKIP"


@pytest.mark.parametrize("step_command", [None, ["train"]])
def test_the_folder_of_the_one_step_counts_as_disk(tmp_path, tiny, toy_dataset, monkeypatch, step_command):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    size = memory.measure_model(open_checkpoint(str(tiny)).config)
    run = plan_run(*find_splits(toy_dataset), tiny, tmp_path, finetuning="full", step_command=step_command)
    needs = disk.disk_needs(run, size, {}, picture_bytes=None)
    assert needs[tmp_path / "outputs"] == disk.run_bytes(size, finetuning="full", lora_r=16, bytes_per_weight=4)
    assert needs.get(temporary) == (None if step_command is None else 4 * size.num_weights)


def test_the_feature_cache_counts_as_disk_except_for_features_that_it_has(tmp_path, tiny, toy_dataset):
    config, features = open_checkpoint(str(tiny)).config, tmp_path / "features"
    run = plan_run(*find_splits(toy_dataset), tiny, tmp_path, layout="frames", vision_features=str(features))
    collators = dict.fromkeys(
        ("train", "eval"), make_collator(open_checkpoint(tiny).processor, layout="frames", dataset_folder=Path())
    )
    frames = {frame for split in run.splits for sample in split.samples() for frame in sample.frames}
    assert disk.disk_needs(run, memory.measure_model(config), collators, picture_bytes=7)[features] == 7 * len(frames)
    (features / "chunks").mkdir(parents=True)
    (features / "chunks" / "a.safetensors").write_bytes(b"x" * 120)
    assert missing_feature_bytes(features, num_frames=3, bytes_per_frame=100) == 180
    assert missing_feature_bytes(features, num_frames=1, bytes_per_frame=100) == 0


def test_a_base_that_is_stored_quantised_fails_before_the_step(tmp_path, quantised_model):
    splits = write_dataset(tmp_path / "data", num_sessions=3, num_turns=3)
    run = plan_run(*splits, quantised_model, tmp_path, finetuning="qlora", step_command=["train"])
    checks = {check.name: check for check in run_checks(run)}
    assert checks["model"].status == "FAIL"
    assert f"{quantised_model}: its weights are stored quantised" in checks["model"].summary
    assert checks["one step"].status == "SKIP"


def test_samples_without_grid_pictures_are_named_also_with_a_feature_cache(tmp_path, tiny):
    splits = write_dataset(tmp_path / "data", num_sessions=3, num_turns=3)
    run = plan_run(*splits, tiny, tmp_path, vision_features=str(tmp_path / "features"))
    checks = {check.name: check for check in run_checks(run)}
    assert checks["disk space"].status == "PASS"
    assert "has no grid picture" in str(checks["token lengths"].details)


def test_a_step_whose_samples_cannot_be_written_out_fails(tmp_path, tiny):
    split = write_split(tmp_path / "train.jsonl", [make_sample("s", 1, "up", frames=("x" * 300,))], draw=False)
    check = step(split, tiny, command=[sys.executable, "-c", ""])
    assert (check.status, check.summary) == ("FAIL", "the samples cannot be written out: File name too long")


@pytest.mark.slow
def test_one_step_on_a_trajectory(tmp_path, tiny, forked_python):
    train, _ = write_dataset(tmp_path, num_sessions=3, num_turns=3)
    options = {"layout": "trajectory", "max_decisions": 2, "train_vision_tower": True, "train_projector": True}
    check = step(train, tiny, command=[forked_python, TRAIN], **options)
    assert check.status == "PASS", check


def test_the_step_takes_the_longest_trajectory(tmp_path):
    turns = [("s", 1, 1), ("s", 2, 1), ("t", 1, 2), ("t", 2, 2), ("t", 3, 1)]
    samples = [make_sample(session, turn, "up", ["up"] * length) for session, turn, length in turns]
    split = write_split(tmp_path / "train.jsonl", samples, draw=False)
    assert [sample.id for sample in longest_trajectory(split, max_decisions=2)] == ["t/1", "t/2"]
    assert len(longest_trajectory(split, max_decisions=9)) == 3


def test_the_step_takes_the_longest_samples(tmp_path):
    samples = [make_sample("s", turn, "up", ["up"] * length) for turn, length in enumerate([1, 8, 3, 8, 5], start=1)]
    chosen = longest_samples(write_split(tmp_path / "train.jsonl", samples, draw=False), number=3)
    assert [sample.id for sample in chosen] == ["s/2", "s/4", "s/5"]
