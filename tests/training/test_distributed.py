"""Every accelerate config trains: on a CPU what can run there, the same losses as one process in all of them."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from pokegemma.training import models

ROOT = Path(__file__).resolve().parents[2]
KEYS = ("loss", "grad_norm", "eval_loss", "eval_button_accuracy")
BATCH = 4  # samples an optimizer step, over all processes


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def config_for_cpu(name: str, folder: Path, *, num_processes: int) -> Path:
    """Write accelerate_configs/`name`.yaml as it is but for the device: CPU, float32."""
    config = yaml.safe_load((ROOT / "accelerate_configs" / f"{name}.yaml").read_text())
    config.update(use_cpu=True, mixed_precision="no", num_processes=num_processes)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def train(
    launch: list[str], output: Path, dataset: Path, model: Path, *, num_processes: int, **changes: Any
) -> dict[str, list[float]]:
    """Train four steps and return the logged losses."""
    options = {
        "finetuning": "lora", "lora_dropout": 0.0, "per_device_train_batch_size": BATCH // num_processes // 2,
        "gradient_accumulation_steps": 2, "max_steps": 4, "eval_steps": 2, "save_steps": 2, "logging_steps": 1,
        "learning_rate": 2e-3, "warmup_steps": 0, "dataloader_num_workers": 0, "use_cpu": True, "report_to": "none",
        "model_name_or_path": model, "dataset_path": dataset, "output_dir": output,
        **changes,
    }  # fmt: skip
    flags = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if "torch.distributed.run" in launch:  # not for `accelerate launch`: it would put DDP in DeepSpeed's place
        environment["ACCELERATE_USE_CPU"] = "true"
    result = subprocess.run(
        [*launch, str(ROOT / "scripts/sft_pokemon_gemma3.py"), *flags], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return {key: [entry[key] for entry in history if key in entry] for key in KEYS}


@pytest.fixture(scope="module")
def alone(toy_dataset: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    output = tmp_path_factory.mktemp("alone") / "adapter"
    return train([sys.executable], output, toy_dataset, tiny_model, num_processes=1), output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "num_processes"),
    [("single_gpu", 1), ("cpu_mps", 1), ("multi_gpu", 2), ("deepspeed_zero3", 2), ("fsdp2", 2)],
)
def test_a_config_trains_to_the_same_losses_and_weights_as_one_process(
    name: str,
    num_processes: int,
    alone: tuple[dict[str, list[float]], Path],
    toy_dataset: Path,
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    if name == "deepspeed_zero3":
        pytest.importorskip("deepspeed", reason="DeepSpeed exists on Linux only")
    port = str(free_port())
    if name == "multi_gpu":  # accelerate has no launcher for DDP on CPUs without MPI; torchrun starts the same
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    else:
        config = config_for_cpu(name, tmp_path, num_processes=num_processes)
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
        launch += ["--main_process_port", port]
    output = tmp_path / "adapter"
    values = train(launch, output, toy_dataset, tiny_model, num_processes=num_processes)
    assert values["loss"] == pytest.approx(alone[0]["loss"], rel=1e-4)
    assert values["grad_norm"] == pytest.approx(alone[0]["grad_norm"], rel=1e-3)
    assert values["eval_loss"] == pytest.approx(alone[0]["eval_loss"], rel=1e-4)
    assert values["eval_button_accuracy"] == alone[0]["eval_button_accuracy"]
    ours, expected = (load_file(folder / "adapter_model.safetensors") for folder in (output, alone[1]))
    assert ours.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(ours[key].float(), expected[key], atol=1e-3, rtol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepspeed_zero3", "fsdp2"])
def test_a_sharded_model_trains_at_another_picture_size(
    name: str, toy_dataset: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """Position embeddings are interpolated, then trained and saved, from shares of them."""
    if name == "deepspeed_zero3":
        pytest.importorskip("deepspeed", reason="DeepSpeed exists on Linux only")
    changes = {"image_size": 112, "finetuning": "full", "train_vision_tower": True, "learning_rate": 1e-4}
    config = config_for_cpu(name, tmp_path, num_processes=2)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    launch += ["--main_process_port", str(free_port())]
    sharded = train(launch, tmp_path / "sharded", toy_dataset, tiny_model, num_processes=2, **changes)
    alone = train([sys.executable], tmp_path / "alone", toy_dataset, tiny_model, num_processes=1, **changes)
    assert sharded["loss"] == pytest.approx(alone["loss"], rel=1e-4)
    ours, expected = (load_file(tmp_path / folder / "model.safetensors") for folder in ("sharded", "alone"))
    place = next(key for key in expected if key.endswith("position_embedding.weight"))
    assert ours[place].shape == (64, 128)
    torch.testing.assert_close(ours[place], expected[place], atol=1e-4, rtol=1e-3)
    start = models.load_model(tiny_model, image_size_px=112).model.vision_tower.embeddings.position_embedding.weight
    assert not torch.equal(ours[place], start)
