"""What the other parts need: the rates of this machine, a dataset, and a checkpoint of random weights."""

import platform
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.decision_latency import measured_rates, save
from benchmarks.gpu_parts.plan import CHECKPOINT, DATASET, RATES, Run
from benchmarks.made_model import make_model
from benchmarks.train_throughput import record_dataset
from pokegemma.data.samples import read_samples
from pokegemma.environment import GIB
from pokegemma.gemma.loading import default_device
from pokegemma.outputs import require_space

CHECKPOINT_BYTES = 10 * GIB


def measure(unit: str, run: Run) -> dict[str, Any]:
    return {RATES: measure_rates, DATASET: make_dataset, CHECKPOINT: make_checkpoint}[unit](run)


def measure_rates(run: Run) -> dict[str, Any]:
    """Return the rates in bfloat16, and the device that has them."""
    rates = asdict(measured_rates(torch.bfloat16))
    if default_device().type != "cuda":
        return {**rates, "device": platform.processor() or platform.machine()}
    major, minor = torch.cuda.get_device_capability()
    device = {"device": torch.cuda.get_device_name(), "capability": f"{major}.{minor}", "cuda": torch.version.cuda}
    return {**rates, **device}


def make_dataset(run: Run) -> dict[str, Any]:
    record_dataset(run.folder, **({"num_sessions": 5, "num_turns": 10} if run.rehearse else {}))
    return {"samples": sum(1 for _ in read_samples(run.dataset / "train.jsonl"))}


def make_checkpoint(run: Run) -> dict[str, Any]:
    """Write the checkpoint in the type in which training loads it: bfloat16, in a rehearsal float32."""
    if not run.rehearse:
        require_space(run.checkpoint, CHECKPOINT_BYTES, remedy="set TMPDIR to a folder on another disk")
    model, processor = make_model(run.folder / "processor_1", image_scale=1, shape=run.shape)
    save(model, processor, run.checkpoint)
    num_bytes = sum(path.stat().st_size for path in run.checkpoint.iterdir())
    return {"weights": sum(weight.numel() for weight in model.parameters()), "bytes": num_bytes}
