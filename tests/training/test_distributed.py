"""Every accelerate config trains in its own mode, on a CPU: to the losses, weights and names of one process."""

import functools
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from pokegemma.data.convert import WindowOptions
from pokegemma.data.corpus import convert_corpus
from pokegemma.export.merge import merge
from pokegemma.export.mlx import convert_to_mlx
from pokegemma.gemma.families import TOWER
from pokegemma.gemma.loading import open_checkpoint
from pokegemma.play.toy.recorder import record_sessions
from pokegemma.provenance import PROJECT_ROOT, read_run_record
from tests.conftest import MakeOnce
from tests.processes import call_script, free_port, killed_after
from tests.training.launched_runs import LaunchedRun, write_runs

pytestmark = [pytest.mark.slow(120), pytest.mark.timeout(1800)]  # a launch trains seven times, also on a busy machine
KEYS = ("loss", "grad_norm", "eval_loss", "eval_button_accuracy")
BATCH, NUM_STEPS = 4, 4  # samples (or trajectories) an optimizer step, over all processes
LINEAR_ADAM = {"learning_rate": 2e-2, "adam_epsilon": 1e-2}
"""An epsilon above all gradients: a step grows with its gradient, whose rounding Adam's own epsilon would magnify."""
FULL = {"finetuning": "full", "learning_rate": 1e-4, "adam_epsilon": 1e-8}
ALL_PARTS = {"train_vision_tower": True, "train_projector": True}
SHORT = {"max_steps": 1, "per_device_train_batch_size": 2, "eval_strategy": "no"}
"""For runs whose files are compared. "lora" accumulates gradients, evaluates and saves in each mode."""

VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "shared_rows": {"per_device_train_batch_size": 2, "samples_per_row": 2},  # samples of a row are in one pass
    "trajectory": {"layout": "trajectory", "max_decisions": 3, "overlap_decisions": 1},
    "lora_all_parts": {**ALL_PARTS, **SHORT},
    "full": {**FULL, **SHORT},
    "full_all_parts": {**FULL, **ALL_PARTS, **SHORT, "image_size": 112},
}
MODES = {  # engine, class of the wrapped LoRA model, whether parameters are sharded
    "single_gpu": ("none", "PeftModel", False),
    "cpu_mps": ("none", "PeftModel", False),
    "multi_gpu": ("ddp", "DistributedDataParallel", False),
    "deepspeed_zero3": ("deepspeed_zero3", "DeepSpeedEngine", True),
    "fsdp2": ("fsdp2", "FSDPPeftModel", True),
}
TWO_PROCESSES = ("multi_gpu", "deepspeed_zero3", "fsdp2")
WITH_FEATURES = {"multi_gpu": "shared_rows", "deepspeed_zero3": "trajectory", "fsdp2": "trajectory"}
"""The variant that is trained from cached features under a config."""

Launch = tuple[dict[str, list[float]], Path]
"""What a run logged, and its output folder."""


def config_for_cpu(name: str, folder: Path, *, num_processes: int) -> Path:
    """Write accelerate_configs/`name`.yaml as it is but for the device: CPU, float32."""
    config = yaml.safe_load((PROJECT_ROOT / "accelerate_configs" / f"{name}.yaml").read_text())
    config.update(use_cpu=True, mixed_precision="no", num_processes=num_processes)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def launch(name: str, runs: list[LaunchedRun], folder: Path, *, python: str) -> str:
    """Have the runs trained under accelerate_configs/`name`.yaml on a CPU; return what the launcher printed.

    `python` starts the launcher, and what the launcher starts.
    """
    write_runs(folder / "runs.json", runs)
    num_processes, port = 2 if name in TWO_PROCESSES else 1, str(free_port())
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(PROJECT_ROOT)}
    if name == "multi_gpu":  # accelerate has no launcher for DDP on CPUs without MPI; torchrun starts the same
        launcher = ["torch.distributed.run", "--nproc_per_node", str(num_processes), "--master_port", port]
        environment["ACCELERATE_USE_CPU"] = "true"  # not for the others: they would put DDP in DeepSpeed's place
    else:
        config = config_for_cpu(name, folder, num_processes=num_processes)
        launcher = ["accelerate.commands.launch", "--config_file", str(config), "--main_process_port", port]
    command = [python, "-m", *launcher, str(Path(__file__).with_name("launched_runs.py")), folder / "runs.json"]
    with killed_after(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)) as process:
        return process.communicate()[1]


def flags(output: Path, *, num_processes: int, **changes: Any) -> list[str]:
    """Return the training script's arguments; `changes` are options."""
    batch_size = changes.get("per_device_train_batch_size", BATCH // num_processes // 2)
    options = {
        "finetuning": "lora",
        "lora_dropout": 0.0,
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": BATCH // num_processes // batch_size,
        "max_steps": NUM_STEPS,
        "eval_steps": NUM_STEPS // 2,
        "save_steps": NUM_STEPS // 2,
        "logging_steps": 1,
        **LINEAR_ADAM,
        "warmup_steps": 0,
        "dataloader_num_workers": 0,
        "per_device_eval_batch_size": 4,
        "use_cpu": True,
        "report_to": "none",
        "output_dir": output,
        **changes,
    }
    return [str(word) for name, value in options.items() for word in (f"--{name}", value)]


def assert_mode(output: Path, name: str, *, num_processes: int) -> None:
    """Assert from the class and parameters of the model that took the steps that it was trained in a config's mode."""
    engine, model_class, sharded = MODES[name]
    record = json.loads((output / "run.json").read_text())
    mode = record["parallel_mode"]
    if record["options"]["finetuning"] == "full":
        model_class = model_class.replace("PeftModel", "Gemma3ForConditionalGeneration")
    assert (mode["engine"], mode["num_processes"]) == (engine, num_processes)
    assert mode["model_class"].startswith(model_class)  # PEFT's class is named after the task
    assert mode["num_parameters"] > 0
    assert mode["num_sharded"] == (mode["num_parameters"] if sharded else 0)


@pytest.fixture(scope="module")
def dataset(make_once: MakeOnce) -> Path:
    """Return a dataset with more frames than a chunk of features, and 21 decisions of two sessions held out."""

    def make(folder: Path) -> None:
        runs = folder / "recorded" / "runs"
        record_sessions(folder / "recorded", num_sessions=15, seed=3, num_turns=11)
        convert_corpus(runs, folder / "dataset", window=WindowOptions(), eval_fraction=0.14, num_workers=1)

    return make_once("toy_with_many_frames", make) / "dataset"


@pytest.fixture(scope="module")
def shallow_model(tiny_model: Path, make_once: MakeOnce) -> Path:
    """Return the tiny model with two of the tower's four layers.

    DeepSpeed's time is spent on modules, each of which it gathers and releases in every pass. The text model keeps its
    six: the sixth is the first with full attention in the order that llama.cpp computes.
    """

    def make(folder: Path) -> None:
        shutil.copytree(tiny_model, folder, dirs_exist_ok=True)
        config = json.loads((folder / "config.json").read_text())
        config["vision_config"]["num_hidden_layers"] = 2
        (folder / "config.json").write_text(json.dumps(config))
        weights = load_file(folder / "model.safetensors")
        kept = {key: weight for key, weight in weights.items() if not re.search(r"vision.*\.layers\.[2-9]\.", key)}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})

    return make_once("shallow_gemma3", make)


def plan_runs(name: str, folder: Path, dataset: Path, model: Path, gemma4: Path) -> list[LaunchedRun]:
    """Return the runs of a config: the variants, those with a feature cache, and those that it alone allows."""
    if name not in TWO_PROCESSES:
        return [plan_run(folder / "lora", dataset, model, num_processes=1)]
    on_cpu = {"fsdp_on_cpu": name == "fsdp2"}
    runs = [
        plan_run(folder / variant, dataset, model, changes, **on_cpu)
        for variant, changes in VARIANTS.items()
        if variant not in ("shared_rows", "trajectory")
    ]
    cached = {"vision_features": folder / "features", **VARIANTS[WITH_FEATURES[name]]}
    runs.append(plan_run(folder / "cached", dataset, model, cached, **on_cpu))
    if name != "multi_gpu":
        continued = {"resume_from_checkpoint": "last"}
        continues = str(folder / "lora")
        runs.append(plan_run(folder / "continued", dataset, model, continued, continues=continues, **on_cpu))
    if name == "multi_gpu":
        alone = {"num_processes": 1, "environment": {"WORLD_SIZE": "1"}}
        runs.append(plan_run(folder / "one_process", dataset, model, {"max_steps": 1}, **alone))
    elif name == "deepspeed_zero3":
        runs.append(plan_run(folder / "gemma4", dataset, gemma4, {"max_steps": 2}))
    else:
        runs.append(plan_run(folder / "refused", dataset, model, status=2))
    return runs


def plan_run(
    output: Path,
    dataset: Path,
    model: Path,
    changes: dict[str, Any] | None = None,
    *,
    num_processes: int = 2,
    **options: Any,
) -> LaunchedRun:
    where = {"dataset_path": dataset, "model_name_or_path": model, **(changes or {})}
    arguments = flags(output, num_processes=num_processes, **where)
    return LaunchedRun(str(output), arguments, free_port(), num_processes=num_processes, **options)


@pytest.fixture(scope="module")
def run(
    dataset: Path,
    shallow_model: Path,
    other_models: Callable[[str], Path],
    make_once: MakeOnce,
    forked_python: str,
) -> Callable[[str | None, str], Launch]:
    """Return a function that trains a variant under a config, once each; None: in this process, by itself."""

    def train_under(name: str, folder: Path) -> None:
        runs = plan_runs(name, folder, dataset, shallow_model, other_models("gemma4"))
        printed = launch(name, runs, folder, python=forked_python)
        (folder / "launcher.log").write_text(printed)

    def train_alone(folder: Path, *, variant: str) -> None:
        model, changes = shallow_model, VARIANTS.get(variant, {})
        if variant == "gemma4":
            # transformers gives each pass of Gemma 4 the same weight, however many tokens it has: the passes must be
            # the same.
            model, changes = other_models("gemma4"), {"max_steps": 2, "per_device_train_batch_size": 1}
            changes["gradient_accumulation_steps"] = BATCH
        where = {"dataset_path": dataset, "model_name_or_path": model}
        result = call_script("sft_pokemon_gemma3", *flags(folder / variant, num_processes=1, **where, **changes))
        assert result.returncode == 0, result.stderr[-3000:]

    def train_once(name: str | None, variant: str) -> Launch:
        if name == "deepspeed_zero3":
            pytest.importorskip("deepspeed", reason="DeepSpeed exists on Linux only")
        if name is None:
            output = make_once(f"alone_{variant}", functools.partial(train_alone, variant=variant)) / variant
        else:
            output = make_once(f"trained_{name}", functools.partial(train_under, name)) / variant
            assert read_status(output) == "completed", read_logs(output)
        num_processes = 2 if name in TWO_PROCESSES and variant != "one_process" else 1
        assert_mode(output, name or "cpu_mps", num_processes=num_processes)
        history = json.loads((output / "trainer_state.json").read_text())["log_history"]
        return {key: [entry[key] for entry in history if key in entry] for key in KEYS}, output

    return train_once


def read_status(output: Path) -> str | None:
    return read_run_record(output)["status"] if (output / "run.json").is_file() else None


def read_logs(output: Path) -> str:
    """Return the ends of what the launcher and the processes of a run printed."""
    logs = [output.with_name("launcher.log"), *sorted(output.parent.glob(f"{output.name}.*.log"))]
    return "\n".join(f"{path.name}: {path.read_text()[-3000:]}" for path in logs)


def assert_same(ours: Launch, expected: Launch) -> None:
    values, others = ours[0], expected[0]
    assert (len(values["loss"]), len(values["eval_loss"])) == (NUM_STEPS, 2)
    assert values["loss"] == pytest.approx(others["loss"], rel=1e-4)
    assert values["grad_norm"] == pytest.approx(others["grad_norm"], rel=1e-3)
    assert values["eval_loss"] == pytest.approx(others["eval_loss"], rel=1e-4)
    assert values["eval_button_accuracy"] == others["eval_button_accuracy"]
    weights, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (ours[1], expected[1]))
    assert weights.keys() == theirs.keys()
    for key in theirs:
        torch.testing.assert_close(weights[key].float(), theirs[key], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", MODES)
def test_a_config_trains_in_its_mode_to_the_result_of_one_process(name: str, run: Callable[..., Launch]) -> None:
    assert_same(run(name, "lora"), run(None, "lora"))


def test_one_process_of_torchrun_trains(run: Callable[..., Launch]) -> None:
    """accelerate wraps its model in DistributedDataParallel, too."""
    run("multi_gpu", "one_process")


def test_a_config_whose_mode_is_not_in_force_is_refused(run: Callable[..., Launch]) -> None:
    """accelerate itself replaces FSDP by DDP on CPUs, without a message."""
    _, trained = run("fsdp2", "lora")
    refused = trained.with_name("refused")
    for rank in range(2):
        assert "the accelerate config asks for fsdp2 with 2 processes" in Path(f"{refused}.{rank}.log").read_text()
    assert not refused.exists()


@pytest.mark.parametrize(("name", "variant"), WITH_FEATURES.items())
def test_two_processes_with_a_feature_cache_match_one_without(
    name: str, variant: str, run: Callable[..., Launch]
) -> None:
    ours = run(name, "cached")
    assert len(list((ours[1].parent / "features" / "chunks").iterdir())) == 2  # one each
    assert_same(ours, run(None, variant))


@pytest.mark.parametrize("name", ["deepspeed_zero3", "fsdp2"])
def test_a_sharded_run_that_is_continued_ends_with_the_same_weights(name: str, run: Callable[..., Launch]) -> None:
    (_, continued), (_, through) = run(name, "continued"), run(name, "lora")
    assert Path(f"{continued}.0.log").read_text().count("'loss'") == NUM_STEPS // 2
    ours, expected = (load_file(folder / "adapter_model.safetensors") for folder in (continued, through))
    assert all(torch.equal(ours[key], expected[key]) for key in expected)


def test_an_adapter_of_shared_keys_trains_under_zero3_as_in_one_process(run: Callable[..., Launch]) -> None:
    """Gemma 4's layers share keys and values, whose gradients reentrant checkpointing would cut."""
    (ours, folder), (expected, _) = run("deepspeed_zero3", "gemma4"), run(None, "gemma4")
    modes = read_run_record(folder)["modes"]
    assert modes["gradient_checkpointing"]["language_model"] == "not reentrant"
    assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert ours["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("name", ["deepspeed_zero3", "fsdp2"])
def test_a_sharded_model_trains_at_another_picture_size(
    name: str, run: Callable[..., Launch], shallow_model: Path
) -> None:
    """Position embeddings are interpolated, then trained and saved, from shares of them."""
    (sharded, folder), (alone, alone_folder) = run(name, "full_all_parts"), run(None, "full_all_parts")
    assert sharded["loss"] == pytest.approx(alone["loss"], rel=1e-4)
    ours, expected = (load_file(path / "model.safetensors") for path in (folder, alone_folder))
    place = next(key for key in expected if key.endswith("position_embedding.weight"))
    assert ours[place].shape == (64, 128)
    torch.testing.assert_close(ours[place], expected[place], atol=1e-4, rtol=1e-3)
    start = (
        open_checkpoint(shallow_model, image_size=112)
        .load_model()
        .model.vision_tower.embeddings.position_embedding.weight
    )
    assert not torch.equal(ours[place], start)


def assert_frozen(folder: Path, variant: str, base: Path) -> None:
    """Assert that a checkpoint has the published names, and frozen weights bit for bit."""
    ours, published = (load_file(path / "model.safetensors") for path in (folder, base))
    assert ours.keys() == published.keys()
    if not variant.endswith("all_parts"):
        frozen = [key for key in published if TOWER in key]
        assert len(frozen) > 0
        assert all(torch.equal(ours[key], published[key].to(ours[key].dtype)) for key in frozen)


@pytest.mark.parametrize("variant", ["lora", "lora_all_parts", "full", "full_all_parts"])
@pytest.mark.parametrize("name", TWO_PROCESSES)
def test_several_processes_write_the_files_names_and_shapes_of_one(
    name: str, variant: str, run: Callable[..., Launch], shallow_model: Path
) -> None:
    """What merges and converts from one process does so from several."""
    (_, trained), (_, alone) = run(name, variant), run(None, variant)
    weights = "adapter_model.safetensors" if variant.startswith("lora") else "model.safetensors"
    ours, expected = (load_file(folder / weights) for folder in (trained, alone))
    assert {key: (w.shape, w.dtype) for key, w in ours.items()} == {
        key: (w.shape, w.dtype) for key, w in expected.items()
    }
    names, others = ({path.name for path in folder.iterdir() if path.is_file()} for folder in (trained, alone))
    assert names == others
    for path in alone.glob("*config.json"):
        assert json.loads((trained / path.name).read_text()) == json.loads(path.read_text())
    if variant.startswith("full"):
        assert_frozen(trained, variant, shallow_model)


@pytest.mark.parametrize("variant", ["lora", "lora_all_parts", "full", "full_all_parts"])
def test_trained_checkpoints_have_the_published_names_and_convert(
    variant: str, run: Callable[..., Launch], shallow_model: Path, to_gguf: Callable[..., object], tmp_path: Path
) -> None:
    _, trained = run(None, variant)
    if variant.startswith("lora"):
        merge(trained, tmp_path / "merged", dtype="float32")
        trained = tmp_path / "merged"
    assert_frozen(trained, variant, shallow_model)
    if variant.endswith("all_parts"):  # the others have the same names
        to_gguf(trained, tmp_path / "gguf", "f16")
        convert_to_mlx(trained, tmp_path / "mlx")
