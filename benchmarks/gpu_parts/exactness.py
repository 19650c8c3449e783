"""What only a GPU can show to be right: bfloat16 next to float32, and sharded training with one process."""

import functools
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.gpu_parts.part_process import error_in
from benchmarks.gpu_parts.plan import Run
from benchmarks.made_model import make_model
from benchmarks.train_throughput import stock_batch
from pokegemma import cli
from pokegemma.data.prompts import build_messages, sample_images
from pokegemma.data.samples import Sample, read_samples
from pokegemma.errors import CheckFailedError
from pokegemma.gemma.batches.collator import Gemma3Collator
from pokegemma.gemma.tiny.gemma3 import make_tiny_gemma3
from pokegemma.gemma.vision_tower import accept_compact_batches
from pokegemma.provenance import PROJECT_ROOT, read_run_record
from pokegemma.training.options import DataOptions, ModelOptions, TrainingOptions
from pokegemma.training.sft import train

NUM_SAMPLES, NUM_STEPS = 3, 3
FLOAT32_LOSS, FLOAT32_GRADIENT = 1e-4, 1e-3
"""Largest difference of a loss, and of gradients relative to their norm, of ours to stock transformers' in float32."""

BFLOAT16_FACTOR, BFLOAT16_ROUNDING = 2.0, 0.01
"""Ours in bfloat16 may be so many times as far from stock in float32 as stock in bfloat16 is, and this much more."""

SHARDED_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.02}
"""Largest relative difference of a step's loss and gradient norm to those of one process that shards nothing."""


def measure(unit: str, run: Run) -> dict[str, Any]:
    if unit == "bfloat16":
        return compare_precisions(run)
    if unit == "fsdp2":
        if not torch.cuda.is_available():
            return {"skipped": "accelerate runs FSDP2 on a GPU only"}
        return compare_sharded(run, "fsdp2")
    if importlib.util.find_spec("deepspeed") is None:
        return {"skipped": "deepspeed is not installed"}
    return compare_sharded(run, "deepspeed_zero3")


def compare_precisions(run: Run) -> dict[str, Any]:
    """Compare loss and gradients of a model for a CPU's size: ours and stock's, in bfloat16 and in float32."""
    samples = list(read_samples(run.dataset / "train.jsonl"))[:NUM_SAMPLES]
    found = {
        (way, dtype): loss_and_gradient(run, samples, way=way, dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
        for way in ("stock", "frames", "shared rows")
    }
    loss, gradient = found["stock", torch.float32]
    figures = {
        f"{way}, {str(dtype).removeprefix('torch.')}": {
            "loss": abs(other_loss - loss),
            "gradient": float((other_gradient - gradient).norm() / gradient.norm()),
        }
        for (way, dtype), (other_loss, other_gradient) in found.items()
        if (way, dtype) != ("stock", torch.float32)
    }
    problems = [name for name, differences in figures.items() if not is_near(name, differences, figures)]
    row = {"reference": "stock, float32", "loss": loss, "differences": figures}
    return {**row, "failed": f"too far from float32: {', '.join(problems)}"} if problems else row


def is_near(name: str, differences: dict[str, float], figures: dict[str, dict[str, float]]) -> bool:
    """Return whether a way is as near to stock transformers in float32 as rounding allows."""
    limits = {"loss": FLOAT32_LOSS, "gradient": FLOAT32_GRADIENT}
    if name.endswith("bfloat16"):
        stock = figures["stock, bfloat16"]
        limits = {figure: BFLOAT16_FACTOR * value + BFLOAT16_ROUNDING for figure, value in stock.items()}
    return all(differences[figure] <= limit for figure, limit in limits.items())  # false where one is not a number


def loss_and_gradient(run: Run, samples: list[Sample], *, way: str, dtype: torch.dtype) -> tuple[float, torch.Tensor]:
    """Return the loss of samples as frames, and the language model's gradient (weights,) in float32 on the CPU.

    Args:
        way: "stock" for transformers and TRL's collator, "frames" or "shared rows" for ours.
    """
    shape = "tiny" if run.rehearse else "quarter"
    model, processor = make_model(run.folder / f"processor_{shape}", image_scale=1, shape=shape, dtype=torch.float32)
    model = model.to(dtype)
    model.requires_grad_(False)
    model.model.language_model.requires_grad_(True)
    if way == "stock":
        paths = [[run.dataset / path for path in sample_images(sample, "frames")] for sample in samples]
        messages = [build_messages(sample, "frames") for sample in samples]
        batch = stock_batch(model, processor, list(zip(messages, paths, strict=True)))
    else:
        accept_compact_batches(model)
        rows = len(samples) if way == "shared rows" else 1
        collator = Gemma3Collator(
            processor=processor, layout="frames", dataset_folder=run.dataset, samples_per_row=rows
        )
        batch = {name: tensor.to(model.device) for name, tensor in collator(samples).items()}
    loss = model(**batch).loss
    loss.backward()
    gradients = [weight.grad.float().flatten().cpu() for weight in model.parameters() if weight.grad is not None]
    return loss.item(), torch.cat(gradients)


def compare_sharded(run: Run, name: str) -> dict[str, Any]:
    """Train a tiny model in one process under accelerate_configs/`name`.yaml, and compare it with training without."""
    output = run.folder / name
    config = launch_config(run, name)
    command = ["--config_file", str(config), "--num_processes", "1", "--main_process_port", "0"]
    script = str(PROJECT_ROOT / "scripts" / "sft_pokemon_gemma3.py")
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *command, script, *training_flags(run, output)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout, done.stderr, file=sys.stderr)
    if done.returncode:
        raise CheckFailedError(f"{name}: {error_in(done.stderr)}")
    mode = read_run_record(output)["parallel_mode"]
    expected, found = alone(run), logged(output)
    worst = max(
        abs(value - reference) / abs(reference)
        for figure in expected
        for value, reference in zip(found[figure], expected[figure], strict=True)
    )
    tolerance = SHARDED_TOLERANCE["bfloat16" if torch.cuda.is_available() else "float32"]
    row = {"mode": mode, "alone": expected, "sharded": found, "largest_relative_difference": worst}
    if mode["engine"] != name:
        return {**row, "failed": f"{mode['engine']} was in force"}
    return row if worst <= tolerance else {**row, "failed": f"differs by {worst:.2g}, allowed are {tolerance:.2g}"}


def launch_config(run: Run, name: str) -> Path:
    """Return the project's config; without a GPU, a copy for the CPU in float32."""
    path = PROJECT_ROOT / "accelerate_configs" / f"{name}.yaml"
    if torch.cuda.is_available():
        return path
    config = yaml.safe_load(path.read_text(encoding="utf-8")) | {"use_cpu": True, "mixed_precision": "no"}
    copy = run.folder / path.name
    copy.write_text(yaml.safe_dump(config), encoding="utf-8")
    return copy


def training_flags(run: Run, output: Path) -> list[str]:
    """Return the options of a short training of a tiny model.

    Adam's epsilon is above all gradients: a step grows with its gradient, and does not magnify its rounding.
    """
    model = run.folder / "tiny_model"
    if not model.is_dir():
        model.mkdir()
        make_tiny_gemma3(model, image_size_px=56, num_image_tokens=4)
    options = {
        "dataset_path": run.dataset,
        "model_name_or_path": model,
        "output_dir": output,
        "layout": "frames",
        "finetuning": "lora",
        "lora_dropout": 0.0,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_steps": NUM_STEPS,
        "learning_rate": 2e-2,
        "adam_epsilon": 1e-2,
        "warmup_steps": 0,
        "logging_steps": 1,
        "eval_strategy": "no",
        "save_strategy": "no",
        "dataloader_num_workers": 0,
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
    }
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


@functools.cache
def alone(run: Run) -> dict[str, list[float]]:
    """Return what training in this process, without a launcher, logs."""
    output = run.folder / "alone"
    flags = training_flags(run, output)
    train(*cli.parse_options(DataOptions, TrainingOptions, ModelOptions, description="", argv=flags))
    return logged(output)


def logged(output: Path) -> dict[str, list[float]]:
    """Return loss and gradient norm of each step of a finished training."""
    history = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return {name: [entry[name] for entry in history if name in entry] for name in ("loss", "grad_norm")}
