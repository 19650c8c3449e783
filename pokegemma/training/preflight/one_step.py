"""One real training step: load, train, save, reload."""

import dataclasses
import json
import math
import subprocess
import tempfile
from collections.abc import Sequence
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import yaml

from pokegemma.data.checks.records import NO_SAMPLES, Check, Split, skipped
from pokegemma.data.samples import TRAIN_FILE, Sample
from pokegemma.data.trajectories import cut_trajectories
from pokegemma.errors import PokegemmaError, one_line
from pokegemma.gemma.adapters.attachment import attach_adapter
from pokegemma.gemma.adapters.reading import read_adapter
from pokegemma.gemma.loading import open_checkpoint
from pokegemma.training.options import DataOptions, RunOptions

_STEP_SAMPLES = 4
_STEP_TIMEOUT_S = 3600


class _StepFailedError(Exception):
    def __init__(self, summary: str, log: tuple[str, ...] = ()) -> None:
        super().__init__(summary)
        self.summary, self.log = summary, log


def longest_samples(split: Split, *, number: int = _STEP_SAMPLES) -> list[Sample]:
    """Return the `number` samples of a split with the longest text, the longest first."""
    longest: list[tuple[int, int, Sample]] = []
    for order, sample in enumerate(split.samples()):
        longest.append((-len(sample.context + sample.question + sample.output), order, sample))
        longest = sorted(longest)[:number]
    return [sample for *_, sample in longest]


def longest_trajectory(split: Split, *, max_decisions: int) -> list[Sample]:
    """Return the decisions of the stretch with the most text."""
    cut = cut_trajectories(split.samples(), max_decisions=max_decisions, overlap=0)
    texts = (sum(len(sample.question + sample.output) for sample in trajectory.samples) for trajectory in cut)
    number, _ = max(enumerate(texts), key=lambda pair: pair[1], default=(0, 0))
    cut = cut_trajectories(split.samples(), max_decisions=max_decisions, overlap=0)
    return [sample for trajectory in islice(cut, number, number + 1) for sample in trajectory.samples]


def _write_step_dataset(split: Split, folder: Path, data: DataOptions) -> list[Sample]:
    """Write the longest row of training as a dataset whose picture folders are links to the real ones.

    Raises:
        _StepFailedError: the dataset cannot be written.
    """
    if data.layout == "trajectory":
        samples = longest_trajectory(split, max_decisions=data.max_decisions)
    else:
        samples = longest_samples(split)
    try:
        folder.mkdir()
        (folder / TRAIN_FILE).write_text("".join(f"{sample.to_json()}\n" for sample in samples), encoding="utf-8")
        names = {name for sample in samples for name in (*sample.frames, sample.image) if name is not None}
        for top in sorted({PurePosixPath(name).parts[0] for name in names} - {TRAIN_FILE}):
            (folder / top).symlink_to((split.folder / top).resolve())
    except OSError as error:
        raise _StepFailedError(f"the samples cannot be written out: {error.strerror}") from error
    return samples


def _step_options(options: RunOptions) -> dict[str, Any]:
    """Return the options of the step: data and model as planned, one sample, one optimizer step, no evaluation."""
    training = options.training
    return {
        **dataclasses.asdict(options.data),
        **dataclasses.asdict(options.model),
        "eval_dataset_path": None,
        "vision_features": None,
        "samples_per_row": 1,
        "max_length": training.max_length,
        "seed": training.seed,
        "use_cpu": training.use_cpu,
        "bf16": training.bf16,
        "gradient_checkpointing": training.activation_checkpointing,
        "optim": training.optim.value,
        "max_steps": 1,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "warmup_steps": 0,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "eval_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "dataloader_num_workers": 0,
    }


def _train_one_step(command: Sequence[str], options: dict[str, Any], folder: Path) -> tuple[float, tuple[str, ...]]:
    """Run training in a process of its own, in `folder`; return its loss and the last lines that it logged.

    Its memory is then free again, and the system may kill it for lack of memory without ending this process.

    Raises:
        _StepFailedError: training fails, takes too long, or saves nothing.
    """
    config = folder / "step.yaml"
    config.write_text(yaml.safe_dump(options), encoding="utf-8")
    try:
        done = subprocess.run(
            [*command, "--config", str(config)], capture_output=True, text=True, timeout=_STEP_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise _StepFailedError(f"one step took longer than {_STEP_TIMEOUT_S} s") from error
    log = tuple(done.stderr.splitlines()[-20:])  # also splits at the carriage returns of progress bars
    if done.returncode:
        how = "was killed (out of memory?)" if done.returncode < 0 else f"exited with {done.returncode}"
        reasons = [line for line in log if line.startswith("error: ")] or [line for line in log if line.strip()]
        raise _StepFailedError(f"training {how}: {reasons[-1] if reasons else 'no message'}", log)
    state_path = Path(options["output_dir"], "trainer_state.json")
    if not state_path.is_file():
        raise _StepFailedError("training saved no trainer_state.json", log)
    history = json.loads(state_path.read_text(encoding="utf-8"))["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    if not losses or not math.isfinite(losses[0]):
        raise _StepFailedError(f"the loss is {losses[0] if losses else 'missing'}", log)
    return losses[0], log


def _largest_difference(saved: Path, options: RunOptions, sample: Sample, dataset: Path) -> float:
    """Reload the result of the step and return the largest difference of a logit to the base model's on a sample.

    Raises:
        PokegemmaError: the result cannot be loaded, or a logit is not finite.
    """
    checkpoint = options.model.open_checkpoint()
    batch = checkpoint.collator(layout=options.data.layout, dataset_folder=dataset)([sample])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "bfloat16" if device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    batch = {key: value.to(device) for key, value in batch.items() if key != "labels"}
    with torch.inference_mode():
        base = checkpoint.load_model(dtype=dtype, device=device)
        before = base(**batch, logits_to_keep=32).logits.float().cpu()
        if options.model.finetuning == "full":
            del base
            tuned = open_checkpoint(saved).load_model(dtype=dtype, device=device)
        else:
            tuned = attach_adapter(base, read_adapter(saved), checkpoint.path).eval()
        after = tuned(**batch, logits_to_keep=32).logits.float().cpu()
    difference = (after - before).abs().max().item()
    if not math.isfinite(difference):
        raise PokegemmaError("the reloaded model's logits are not finite")
    return difference


def check_step(train_command: Sequence[str], train: Split, options: RunOptions) -> Check:
    """Load, train one step on the longest samples, save and reload; fail if one of these fails or changes nothing.

    Args:
        train_command: starts scripts/sft_pokemon_gemma3.py; `--config FILE` is added.
    """
    name = "one step"
    with tempfile.TemporaryDirectory(prefix="pokegemma_step_") as temporary:
        dataset, output = Path(temporary, "dataset"), Path(temporary, "adapter")
        step_options = {**_step_options(options), "dataset_path": str(dataset), "output_dir": str(output)}
        try:
            samples = _write_step_dataset(train, dataset, options.data)
            if not samples:
                return skipped(name, NO_SAMPLES)
            loss, log = _train_one_step(train_command, step_options, Path(temporary))
            try:
                difference = _largest_difference(output, options, samples[0], dataset)
            except (PokegemmaError, OSError, ValueError, RuntimeError, KeyError) as error:
                reason = one_line(error, length=300)
                raise _StepFailedError(f"the result cannot be loaded: {reason}", log) from error
            if not difference:
                raise _StepFailedError(f"loss {loss:.3f}, but training changed nothing", log)
        except _StepFailedError as error:
            return Check(name, "FAIL", error.summary, error.log)
    summary = f"loaded, trained (loss {loss:.3f}), saved, reloaded; the largest change of a logit is {difference:.2g}"
    return Check(name, "PASS", summary)
