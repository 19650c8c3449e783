"""Every accelerate config trains in its own mode, on a CPU: to the losses, weights and names of one process."""

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from pokegemma.data.convert import WindowOptions
from pokegemma.data.corpus import convert_corpus
from pokegemma.export.gguf import convert
from pokegemma.export.llama_cpp_converter import find_converter
from pokegemma.export.merge import merge
from pokegemma.export.mlx import convert_to_mlx
from pokegemma.gemma.families import TOWER
from pokegemma.gemma.loading import open_checkpoint
from pokegemma.play.toy_recorder import record_sessions
from pokegemma.provenance import PROJECT_ROOT
from tests.processes import call_script, free_port
from tests.training.fsdp_on_cpu import FSDP_ON_CPU

KEYS = ("loss", "grad_norm", "eval_loss", "eval_button_accuracy")
BATCH, NUM_STEPS = 4, 6  # samples (or trajectories) an optimizer step, over all processes
FULL = {"finetuning": "full", "learning_rate": 1e-4}
ALL_PARTS = {"train_vision_tower": True, "train_projector": True, "max_steps": 3}
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "shared_rows": {"samples_per_row": 2},
    "trajectory": {"layout": "trajectory", "max_decisions": 3, "overlap_decisions": 1},
    "lora_all_parts": ALL_PARTS,
    "full": {**FULL, "max_steps": 3},
    "full_all_parts": {**FULL, **ALL_PARTS, "image_size": 112},
}
MODES = {  # engine, class of the wrapped LoRA model, whether parameters are sharded
    "single_gpu": ("none", "PeftModel", False),
    "cpu_mps": ("none", "PeftModel", False),
    "multi_gpu": ("ddp", "DistributedDataParallel", False),
    "deepspeed_zero3": ("deepspeed_zero3", "DeepSpeedEngine", True),
    "fsdp2": ("fsdp2", "FSDPPeftModel", True),
}
TWO_PROCESSES = ("multi_gpu", "deepspeed_zero3", "fsdp2")
Launch = tuple[dict[str, list[float]], Path]
"""What a run logged, and its output folder."""


WITHOUT_COMPILER = f"""
import runpy
import deepspeed

deepspeed.ops.__compatible_ops__ = {{}}
runpy.run_path({str(PROJECT_ROOT / "scripts/sft_pokemon_gemma3.py")!r}, run_name="__main__")
"""
"""DeepSpeed would try a compiler on all its parts, then compile what only processes of a CPU exchange tensors by."""


def config_for_cpu(name: str, folder: Path, *, num_processes: int) -> Path:
    """Write accelerate_configs/`name`.yaml as it is but for the device: CPU, float32."""
    config = yaml.safe_load((PROJECT_ROOT / "accelerate_configs" / f"{name}.yaml").read_text())
    config.update(use_cpu=True, mixed_precision="no", num_processes=num_processes)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def launcher(name: str, folder: Path, *, num_processes: int) -> list[str]:
    """Return the command that trains under accelerate_configs/`name`.yaml on a CPU, to which options are added."""
    script = PROJECT_ROOT / "scripts/sft_pokemon_gemma3.py"
    if name in ("deepspeed_zero3", "fsdp2"):
        script = folder / "train.py"
        script.write_text(WITHOUT_COMPILER if name == "deepspeed_zero3" else FSDP_ON_CPU)
    port = str(free_port())
    if name == "multi_gpu":  # accelerate has no launcher for DDP on CPUs without MPI; torchrun starts the same
        start = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(num_processes)]
        return [*start, "--master_port", port, str(script)]
    config = config_for_cpu(name, folder, num_processes=num_processes)
    start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    return [*start, "--main_process_port", port, str(script)]


def start_training(
    launch: list[str] | None, output: Path, *, num_processes: int, **changes: Any
) -> subprocess.CompletedProcess[str]:
    """Train by a launcher's command, or in this process (None); `changes` are options."""
    # Samples that share a row must be in one forward pass; otherwise gradients of several passes are summed.
    batch_size = 2 if "samples_per_row" in changes else BATCH // num_processes // 2
    options = {
        "finetuning": "lora",
        "lora_dropout": 0.0,
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": BATCH // num_processes // batch_size,
        "max_steps": NUM_STEPS,
        "eval_steps": 3,
        "save_steps": 3,
        "logging_steps": 1,
        "learning_rate": 2e-3,
        "warmup_steps": 0,
        "dataloader_num_workers": 0,
        "per_device_eval_batch_size": 4,
        "use_cpu": True,
        "report_to": "none",
        "output_dir": output,
        **changes,
    }
    flags = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if launch is None:
        return call_script("sft_pokemon_gemma3", *flags)
    if "torch.distributed.run" in launch:  # not for `accelerate launch`: it would put DDP in DeepSpeed's place
        environment["ACCELERATE_USE_CPU"] = "true"
    return subprocess.run([*launch, *flags], env=environment, capture_output=True, text=True)


def train(launch: list[str] | None, output: Path, **options: Any) -> Launch:
    """Train as `start_training`, to the end."""
    result = start_training(launch, output, **options)
    assert result.returncode == 0, result.stderr[-3000:]
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return {key: [entry[key] for entry in history if key in entry] for key in KEYS}, output


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
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a dataset with more frames than a chunk of features, and 21 decisions of two sessions held out."""
    folder = tmp_path_factory.mktemp("toy")
    record_sessions(folder / "recorded", num_sessions=15, seed=3, num_turns=11)
    convert_corpus(
        folder / "recorded" / "runs", folder / "dataset", window=WindowOptions(), eval_fraction=0.14, num_workers=1
    )
    return folder / "dataset"


@pytest.fixture(scope="module")
def run(dataset: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Launch]:
    """Return a function that trains a variant under a config, once each; None: in this process, by itself."""
    where = {"dataset_path": dataset, "model_name_or_path": tiny_model}

    @functools.cache
    def train_once(name: str | None, variant: str) -> Launch:
        if name == "deepspeed_zero3":
            pytest.importorskip("deepspeed", reason="DeepSpeed exists on Linux only")
        folder = tmp_path_factory.mktemp(f"{name}_{variant}")
        num_processes = 2 if name in TWO_PROCESSES else 1
        launch = None if name is None else launcher(name, folder, num_processes=num_processes)
        done = train(launch, folder / "trained", num_processes=num_processes, **where, **VARIANTS[variant])
        assert_mode(folder / "trained", name or "cpu_mps", num_processes=num_processes)
        return done

    return train_once


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
        torch.testing.assert_close(weights[key].float(), theirs[key], atol=1e-3, rtol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODES)
def test_a_config_trains_in_its_mode_to_the_same_losses_and_weights_as_one_process(
    name: str, run: Callable[..., Launch]
) -> None:
    assert_same(run(name, "lora"), run(None, "lora"))


@pytest.mark.slow
def test_one_process_of_torchrun_trains(dataset: Path, tiny_model: Path, tmp_path: Path) -> None:
    """accelerate wraps its model in DistributedDataParallel, too."""
    where = {"dataset_path": dataset, "model_name_or_path": tiny_model, "max_steps": 1}
    train(launcher("multi_gpu", tmp_path, num_processes=1), tmp_path / "trained", num_processes=1, **where)
    assert json.loads((tmp_path / "trained" / "run.json").read_text())["parallel_mode"]["engine"] == "ddp"


@pytest.mark.slow
def test_a_config_whose_mode_is_not_in_force_is_refused(dataset: Path, tiny_model: Path, tmp_path: Path) -> None:
    """accelerate itself replaces FSDP by DDP on CPUs, without a message."""
    config = config_for_cpu("fsdp2", tmp_path, num_processes=2)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    launch += ["--main_process_port", str(free_port()), str(PROJECT_ROOT / "scripts/sft_pokemon_gemma3.py")]
    where = {"dataset_path": dataset, "model_name_or_path": tiny_model}
    result = start_training(launch, tmp_path / "trained", num_processes=2, **where)
    assert result.returncode != 0
    assert "error: the accelerate config asks for fsdp2 with 2 processes" in result.stderr
    assert not (tmp_path / "trained").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "variant"), [("multi_gpu", "shared_rows"), ("deepspeed_zero3", "trajectory"), ("fsdp2", "trajectory")]
)
def test_two_processes_that_share_a_feature_cache_train_as_one_that_decodes_every_picture(
    name: str, variant: str, run: Callable[..., Launch], dataset: Path, tiny_model: Path, tmp_path: Path
) -> None:
    if name == "deepspeed_zero3":
        pytest.importorskip("deepspeed", reason="DeepSpeed exists on Linux only")
    features, launch = tmp_path / "features", launcher(name, tmp_path, num_processes=2)
    where = {"dataset_path": dataset, "model_name_or_path": tiny_model, "vision_features": features}
    ours = train(launch, tmp_path / "adapter", num_processes=2, **where, **VARIANTS[variant])
    assert_mode(tmp_path / "adapter", name, num_processes=2)
    assert len(list((features / "chunks").iterdir())) == 2  # one each
    assert_same(ours, run(None, variant))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepspeed_zero3", "fsdp2"])
def test_a_sharded_run_that_is_continued_ends_with_the_same_weights(
    name: str, run: Callable[..., Launch], dataset: Path, tiny_model: Path, tmp_path: Path
) -> None:
    _, through = run(name, "lora")
    stopped = Path(shutil.copytree(through, tmp_path / "stopped"))
    shutil.rmtree(stopped / f"checkpoint-{NUM_STEPS}")
    (stopped / "adapter_model.safetensors").unlink()
    launch = launcher(name, tmp_path, num_processes=2)
    where = {"dataset_path": dataset, "model_name_or_path": tiny_model, "resume_from_checkpoint": "last"}
    train(launch, stopped, num_processes=2, **where)
    assert_mode(stopped, name, num_processes=2)
    ours, expected = (load_file(folder / "adapter_model.safetensors") for folder in (stopped, through))
    assert all(torch.equal(ours[key], expected[key]) for key in expected)


@pytest.mark.slow
def test_an_adapter_of_shared_keys_trains_under_zero3_as_in_one_process(
    dataset: Path, other_models: Callable[[str], Path], tmp_path: Path
) -> None:
    """Gemma 4's layers share keys and values, whose gradients reentrant checkpointing would cut."""
    pytest.importorskip("deepspeed", reason="DeepSpeed exists on Linux only")
    where = {"dataset_path": dataset, "model_name_or_path": other_models("gemma4"), "max_steps": 3}
    # transformers gives each pass of Gemma 4 the same weight, however many tokens it has: the passes must be the same.
    alone = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": BATCH}
    expected, _ = train(None, tmp_path / "alone", num_processes=1, **where, **alone)
    ours, folder = train(
        launcher("deepspeed_zero3", tmp_path, num_processes=2), tmp_path / "ours", num_processes=2, **where
    )
    assert_mode(folder, "deepspeed_zero3", num_processes=2)
    modes = json.loads((folder / "run.json").read_text())["modes"]
    assert modes["gradient_checkpointing"]["language_model"] == "not reentrant"
    assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert ours["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepspeed_zero3", "fsdp2"])
def test_a_sharded_model_trains_at_another_picture_size(
    name: str, run: Callable[..., Launch], tiny_model: Path
) -> None:
    """Position embeddings are interpolated, then trained and saved, from shares of them."""
    (sharded, folder), (alone, alone_folder) = run(name, "full_all_parts"), run(None, "full_all_parts")
    assert sharded["loss"] == pytest.approx(alone["loss"], rel=1e-4)
    ours, expected = (load_file(path / "model.safetensors") for path in (folder, alone_folder))
    place = next(key for key in expected if key.endswith("position_embedding.weight"))
    assert ours[place].shape == (64, 128)
    torch.testing.assert_close(ours[place], expected[place], atol=1e-4, rtol=1e-3)
    start = (
        open_checkpoint(tiny_model, image_size=112).load_model().model.vision_tower.embeddings.position_embedding.weight
    )
    assert not torch.equal(ours[place], start)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["lora", "lora_all_parts", "full", "full_all_parts"])
@pytest.mark.parametrize("name", [None, *TWO_PROCESSES])
def test_what_any_mode_trains_has_the_published_names_and_converts(
    name: str | None, variant: str, run: Callable[..., Launch], tiny_model: Path, tmp_path: Path
) -> None:
    (_, trained), (_, alone) = run(name, variant), run(None, variant)
    if variant.startswith("lora"):
        ours, expected = (load_file(folder / "adapter_model.safetensors") for folder in (trained, alone))
        assert {key: (w.shape, w.dtype) for key, w in ours.items()} == {
            key: (w.shape, w.dtype) for key, w in expected.items()
        }
        merge(trained, tmp_path / "merged", dtype="float32")
        trained = tmp_path / "merged"
    ours, base = load_file(trained / "model.safetensors"), load_file(tiny_model / "model.safetensors")
    assert ours.keys() == base.keys()
    if not variant.endswith("all_parts"):  # frozen weights: bit for bit the base's
        frozen = [key for key in base if TOWER in key]
        assert len(frozen) > 0
        assert all(torch.equal(ours[key], base[key].to(ours[key].dtype)) for key in frozen)
    convert(trained, tmp_path / "gguf", quantizations=["f16"], converter=find_converter(None))
    convert_to_mlx(trained, tmp_path / "mlx")
