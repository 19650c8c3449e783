"""One real training step: load, train, save, reload."""

import json
import math
import subprocess
import tempfile
from collections.abc import Sequence
from itertools import islice
from pathlib import Path, PurePosixPath

import torch

from pokegemma.data.checks.records import NO_SAMPLES, Check, Split, skipped
from pokegemma.data.prompts import Layout
from pokegemma.data.samples import Sample
from pokegemma.data.trajectories import cut_trajectories
from pokegemma.errors import PokegemmaError
from pokegemma.gemma.adapters.adapters import read_adapter
from pokegemma.gemma.adapters.attachment import attach_adapter
from pokegemma.gemma.batches.processor_collator import Collator, make_collator
from pokegemma.gemma.image_attention import ImageAttention
from pokegemma.gemma.loading import load_model, load_processor

_STEP_SAMPLES = 4
_STEP_TIMEOUT_S = 3600


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
    texts = (sum(len(one.question + one.output) for one in trajectory.samples) for trajectory in cut)
    number, _ = max(enumerate(texts), key=lambda pair: pair[1], default=(0, 0))
    cut = cut_trajectories(split.samples(), max_decisions=max_decisions, overlap=0)
    return [sample for trajectory in islice(cut, number, number + 1) for sample in trajectory.samples]


def _write_step_dataset(split: Split, folder: Path, *, layout: Layout, max_decisions: int) -> list[Sample]:
    """Write the longest row of training as a dataset whose picture folders are links to the real ones."""
    if layout == "trajectory":
        samples = longest_trajectory(split, max_decisions=max_decisions)
    else:
        samples = longest_samples(split)
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(f"{sample.to_json()}\n" for sample in samples), encoding="utf-8")
    names = {name for sample in samples for name in (*sample.frames, sample.image) if name is not None}
    for top in sorted({PurePosixPath(name).parts[0] for name in names} - {"train.jsonl"}):
        (folder / top).symlink_to((split.folder / top).resolve())
    return samples


def _compare(
    folder: Path,
    model_path: str,
    samples: list[Sample],
    collator: Collator,
    *,
    finetuning: str,
    image_size: int | None,
    image_attention: ImageAttention | None,
) -> float:
    """Reload what was saved and return the largest difference of a logit to the base model's on one sample."""
    batch = collator(samples[:1])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "bfloat16" if device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    batch = {key: value.to(device) for key, value in batch.items() if key != "labels"}
    with torch.inference_mode():
        base = load_model(model_path, image_size_px=image_size, attention=image_attention, dtype=dtype, device=device)
        before = base(**batch, logits_to_keep=32).logits.float().cpu()
        if finetuning == "full":
            del base
            tuned = load_model(folder, dtype=dtype, device=device)
        else:
            tuned = attach_adapter(base, read_adapter(folder), model_path).eval()
        after = tuned(**batch, logits_to_keep=32).logits.float().cpu()
    difference = (after - before).abs().max().item()
    if not math.isfinite(difference):
        raise PokegemmaError("the reloaded model's logits are not finite")
    return difference


def check_step(
    train_command: Sequence[str],
    train: Split,
    *,
    model: str,
    layout: Layout,
    finetuning: str,
    max_length: int | None,
    seed: int,
    max_decisions: int = 16,
    image_size: int | None = None,
    image_attention: ImageAttention | None = None,
) -> Check:
    """Load, train one step on the longest samples, save, reload: fail if any of it does, or nothing was learned.

    Args:
        train_command: starts scripts/sft_pokemon_gemma3.py, to which the options are added. A process of its own
            gives its memory back, and may be killed for lack of it without ending this one.
    """
    name = "one step"
    with tempfile.TemporaryDirectory(prefix="pokegemma_step_") as temporary:
        dataset, output = Path(temporary, "dataset"), Path(temporary, "adapter")
        try:
            samples = _write_step_dataset(train, dataset, layout=layout, max_decisions=max_decisions)
        except OSError as error:
            return Check(name, "FAIL", f"the samples cannot be written out: {error.strerror}")
        if not samples:
            return skipped(name, NO_SAMPLES)
        options = {
            "dataset_path": dataset,
            "output_dir": output,
            "model_name_or_path": model,
            "layout": layout,
            "max_decisions": max_decisions,
            "finetuning": finetuning,
            "seed": seed,
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
            **({"max_length": max_length} if max_length else {}),
            **({"image_size": image_size} if image_size else {}),
            **({"image_attention": image_attention} if image_attention else {}),
        }
        arguments = [text for key, value in options.items() for text in (f"--{key}", str(value))]
        try:
            done = subprocess.run(
                [*train_command, *arguments], capture_output=True, text=True, timeout=_STEP_TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired:
            return Check(name, "FAIL", f"one step took longer than {_STEP_TIMEOUT_S} s")
        log = tuple(done.stderr.splitlines()[-20:])  # splits at the carriage returns of progress bars, too
        if done.returncode:
            how = "was killed (out of memory?)" if done.returncode < 0 else f"exited with {done.returncode}"
            reasons = [line for line in log if line.startswith("error: ")] or [line for line in log if line.strip()]
            return Check(name, "FAIL", f"training {how}: {reasons[-1] if reasons else 'no message'}", log)
        state_path = output / "trainer_state.json"
        if not state_path.is_file():
            return Check(name, "FAIL", "training saved no trainer_state.json", log)
        history = json.loads(state_path.read_text(encoding="utf-8"))["log_history"]
        losses = [entry["loss"] for entry in history if "loss" in entry]
        if not losses or not math.isfinite(losses[0]):
            return Check(name, "FAIL", f"the loss is {losses[0] if losses else 'missing'}", log)
        try:
            processor = load_processor(model, image_size, image_attention)
            collator = make_collator(processor, layout=layout, dataset_folder=dataset)
            difference = _compare(
                output,
                model,
                samples,
                collator,
                finetuning=finetuning,
                image_size=image_size,
                image_attention=image_attention,
            )
        except (PokegemmaError, OSError, ValueError, RuntimeError, KeyError) as error:
            return Check(name, "FAIL", f"what was saved does not load: {' '.join(str(error).split())[:300]}", log)
    if not difference:
        return Check(name, "FAIL", f"loss {losses[0]:.3f}, but training changed nothing", log)
    return Check(
        name, "PASS", f"loaded, trained (loss {losses[0]:.3f}), saved, reloaded; logits moved by {difference:.2g}"
    )
