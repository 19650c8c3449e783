"""Every accelerate config trains: on a CPU what can run there, the same losses as one process in all of them."""

import json
import os
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
from pokegemma.play.toy_recorder import record_sessions
from pokegemma.training import models
from tests.processes import call_script, free_port

ROOT = Path(__file__).resolve().parents[2]
KEYS = ("loss", "grad_norm", "eval_loss", "eval_button_accuracy")
BATCH, NUM_STEPS = 4, 6  # samples (or trajectories) an optimizer step, over all processes
PATHS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shared_rows": {"samples_per_row": 2},
    "trajectory": {"layout": "trajectory", "max_decisions": 3, "overlap_decisions": 1},
}
Launch = tuple[dict[str, list[float]], Path]
"""What a run logged, and its output folder."""


WITHOUT_COMPILER = f"""
import runpy
import deepspeed

deepspeed.ops.__compatible_ops__ = {{}}
runpy.run_path({str(ROOT / "scripts/sft_pokemon_gemma3.py")!r}, run_name="__main__")
"""
"""DeepSpeed would try a compiler on all its parts, then compile what only processes of a CPU exchange tensors by."""


def config_for_cpu(name: str, folder: Path, *, num_processes: int) -> Path:
    """Write accelerate_configs/`name`.yaml as it is but for the device: CPU, float32."""
    config = yaml.safe_load((ROOT / "accelerate_configs" / f"{name}.yaml").read_text())
    config.update(use_cpu=True, mixed_precision="no", num_processes=num_processes)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def launcher(name: str, folder: Path, *, num_processes: int) -> list[str]:
    """Return the command that trains under accelerate_configs/`name`.yaml on a CPU, to which options are added."""
    script = ROOT / "scripts/sft_pokemon_gemma3.py"
    if name == "deepspeed_zero3":
        script = folder / "train.py"
        script.write_text(WITHOUT_COMPILER)
    port = str(free_port())
    if name == "multi_gpu":  # accelerate has no launcher for DDP on CPUs without MPI; torchrun starts the same
        start = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(num_processes)]
        return [*start, "--master_port", port, str(script)]
    config = config_for_cpu(name, folder, num_processes=num_processes)
    start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    return [*start, "--main_process_port", port, str(script)]


def train(launch: list[str] | None, output: Path, *, num_processes: int, **changes: Any) -> Launch:
    """Train by a launcher's command, or in this process (None); `changes` are options."""
    # Samples that share a row must be in one forward pass; otherwise gradients of several passes are summed.
    batch_size = 2 if "samples_per_row" in changes else BATCH // num_processes // 2
    options = {
        "finetuning": "lora", "lora_dropout": 0.0, "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": BATCH // num_processes // batch_size, "max_steps": NUM_STEPS, "eval_steps": 3,
        "save_steps": 3, "logging_steps": 1, "learning_rate": 2e-3, "warmup_steps": 0, "dataloader_num_workers": 0,
        "per_device_eval_batch_size": 4, "use_cpu": True, "report_to": "none", "output_dir": output, **changes,
    }  # fmt: skip
    flags = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if launch is None:
        result = call_script("sft_pokemon_gemma3", *flags)
    else:
        if "torch.distributed.run" in launch:  # not for `accelerate launch`: it would put DDP in DeepSpeed's place
            environment["ACCELERATE_USE_CPU"] = "true"
        result = subprocess.run([*launch, *flags], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return {key: [entry[key] for entry in history if key in entry] for key in KEYS}, output


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
def alone(dataset: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Launch]:
    """Return a function that trains one of PATHS with one process, decoding every picture; once each."""
    done: dict[str, Launch] = {}

    def run(path: str) -> Launch:
        if path not in done:
            output = tmp_path_factory.mktemp("alone") / "adapter"
            where = {"dataset_path": dataset, "model_name_or_path": tiny_model}
            done[path] = train(None, output, num_processes=1, **where, **PATHS[path])
        return done[path]

    return run


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
@pytest.mark.parametrize(
    ("name", "num_processes"),
    [("single_gpu", 1), ("cpu_mps", 1), ("multi_gpu", 2), ("deepspeed_zero3", 2), ("fsdp2", 2)],
)
def test_a_config_trains_to_the_same_losses_and_weights_as_one_process(
    name: str, num_processes: int, alone: Callable[[str], Launch], dataset: Path, tiny_model: Path, tmp_path: Path
) -> None:
    if name == "deepspeed_zero3":
        pytest.importorskip("deepspeed", reason="DeepSpeed exists on Linux only")
    launch = launcher(name, tmp_path, num_processes=num_processes)
    where = {"dataset_path": dataset, "model_name_or_path": tiny_model}
    assert_same(train(launch, tmp_path / "adapter", num_processes=num_processes, **where), alone("plain"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "path"), [("multi_gpu", "shared_rows"), ("deepspeed_zero3", "trajectory"), ("fsdp2", "trajectory")]
)
def test_two_processes_that_share_a_feature_cache_train_as_one_that_decodes_every_picture(
    name: str, path: str, alone: Callable[[str], Launch], dataset: Path, tiny_model: Path, tmp_path: Path
) -> None:
    if name == "deepspeed_zero3":
        pytest.importorskip("deepspeed", reason="DeepSpeed exists on Linux only")
    features, launch = tmp_path / "features", launcher(name, tmp_path, num_processes=2)
    where = {"dataset_path": dataset, "model_name_or_path": tiny_model, "vision_features": features}
    ours = train(launch, tmp_path / "adapter", num_processes=2, **where, **PATHS[path])
    assert len(list((features / "chunks").iterdir())) == 2  # one each
    assert_same(ours, alone(path))


@pytest.fixture(scope="module")
def large_pictures(toy_dataset: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """Return options of full fine-tuning at 112 px, and what one process makes of them."""
    changes = {
        "image_size": 112, "finetuning": "full", "train_vision_tower": True, "learning_rate": 1e-4, "max_steps": 3,
        "dataset_path": toy_dataset, "model_name_or_path": tiny_model,
    }  # fmt: skip
    return changes, train(None, tmp_path_factory.mktemp("large") / "alone", num_processes=1, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepspeed_zero3", "fsdp2"])
def test_a_sharded_model_trains_at_another_picture_size(
    name: str, large_pictures: tuple, tiny_model: Path, tmp_path: Path
) -> None:
    """Position embeddings are interpolated, then trained and saved, from shares of them."""
    if name == "deepspeed_zero3":
        pytest.importorskip("deepspeed", reason="DeepSpeed exists on Linux only")
    changes, (alone, alone_folder) = large_pictures
    launch = launcher(name, tmp_path, num_processes=2)
    sharded, _ = train(launch, tmp_path / "sharded", num_processes=2, **changes)
    assert sharded["loss"] == pytest.approx(alone["loss"], rel=1e-4)
    ours, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "sharded", alone_folder))
    place = next(key for key in expected if key.endswith("position_embedding.weight"))
    assert ours[place].shape == (64, 128)
    torch.testing.assert_close(ours[place], expected[place], atol=1e-4, rtol=1e-3)
    start = models.load_model(tiny_model, image_size_px=112).model.vision_tower.embeddings.position_embedding.weight
    assert not torch.equal(ours[place], start)
