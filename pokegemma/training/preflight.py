"""Will this model train on these samples on this machine? Versions, hardware, disk, token lengths, memory."""

import functools
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement
from transformers import AutoModelForImageTextToText, PreTrainedConfig

from pokegemma.data.checks import NO_SAMPLES, Check, Split, skipped
from pokegemma.data.prompts import MAX_PROMPT_TOKENS
from pokegemma.data.trajectories import Trajectory
from pokegemma.environment import Hardware
from pokegemma.errors import PokegemmaError
from pokegemma.provenance import package_versions
from pokegemma.training.collator import Example
from pokegemma.training.families import family_of, head_width, tower_shape
from pokegemma.training.processor_collator import Collator

GIB = 2**30

LORA_R = 16
"""The training script's default rank."""

Progress = Callable[[Iterable, str], Iterable]


def check_environment() -> Check:
    """Fail if a package that pokegemma requires is missing or outside its range."""
    versions = ", ".join(f"{name} {version}" for name, version in package_versions().items())
    try:
        requirements = [Requirement(line) for line in metadata.requires("pokegemma") or []]
    except metadata.PackageNotFoundError:
        return Check("environment", "FAIL", f"pokegemma is not installed; run ./init.sh ({versions})")
    problems = []
    for requirement in requirements:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            problems.append(f"{requirement.name} is not installed")
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            problems.append(f"{requirement.name} {installed} is not {requirement.specifier}")
    if problems:
        return Check(
            "environment", "FAIL", f"{len(problems)} packages wrong; run ./init.sh ({versions})", tuple(problems)
        )
    return Check("environment", "PASS", versions)


def check_hardware(hardware: Hardware) -> Check:
    """Say what there is to train on; fail if this torch cannot use the GPU that is there, warn if there is none."""
    found = f"{hardware.describe()}; accelerate_configs/{hardware.accelerate_config}.yaml fits"
    if hardware.gpus and not torch.cuda.is_available():
        return Check("hardware", "FAIL", f"{found}; torch {torch.__version__} cannot use the GPU: run ./init.sh again")
    if not hardware.gpus and not hardware.mps:
        return Check("hardware", "WARN", f"{found}; without a GPU only a tiny model trains in reasonable time")
    if hardware.usable_gpus and not torch.cuda.is_bf16_supported(including_emulation=False):
        return Check("hardware", "WARN", f"{found}; no bfloat16 here, and float32 takes twice the memory")
    return Check("hardware", "PASS", found)


def check_disk(needs: dict[Path, int | None]) -> Check:
    """Fail if a folder is not writable or its disk has less free than will be written; None: nobody knows how much.

    A folder that does not exist yet is on the disk of its nearest parent that does.
    """
    disks: dict[int, list[tuple[Path, int | None]]] = {}
    for folder, needed in needs.items():
        place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        try:  # permissions do not tell: root may write everywhere, but not to /proc or a read-only disk
            with tempfile.TemporaryDirectory(prefix=".pokegemma_", dir=place):
                pass
        except OSError as error:
            return Check("disk space", "FAIL", f"{place} is not writable ({error.strerror})")
        disks.setdefault(place.stat().st_dev, []).append((place, needed))
    found, full = [], False
    for folders in disks.values():
        free, place = shutil.disk_usage(folders[0][0]).free, folders[0][0]
        needed = sum(amount or 0 for _, amount in folders)
        full |= free < needed
        what = f"about {needed / GIB:.1f} GiB needed" if needed else "how much is needed is unknown"
        found.append(f"{free / GIB:.1f} GiB free at {place}, {what}")
    return Check("disk space", "FAIL" if full else "PASS", "; ".join(found))


@dataclass(frozen=True)
class TokenLengths:
    """Lengths in tokens: of whole samples (soft tokens and answer included), of prompt texts, of answers."""

    longest: int
    longest_prompt_text: int
    longest_answer: int
    total: int
    num_samples: int


def check_token_lengths(
    splits: Iterable[Split],
    collators: dict[str, Collator],
    *,
    max_positions: int,
    max_length: int | None,
    rows: Callable[[Split], Iterable[tuple[str, Example]]] = Split.located,
    progress: Progress | None = None,
) -> tuple[Check, TokenLengths | None]:
    """Fail if a sample is longer than the model's positions or `max_length`; warn if a prompt is over its budget.

    A prompt over `MAX_PROMPT_TOKENS` trains, only slower; a tiny tokenizer needs more tokens than Gemma's own.

    Args:
        collators: by the name of the split.
        max_positions: `max_position_embeddings` of the text model.
        max_length: the limit of the training run, or None for `max_positions`.
        rows: gives what a row shows, and where it is: samples, or trajectories.
    """
    name = "token lengths"
    limit = min(max_positions, max_length or max_positions)
    longest = longest_text = longest_answer = total = num_samples = 0
    too_long, wordy = [], []
    for split in splits:
        collator = collators[split.name]
        tokenizer = collator.processor.tokenizer

        @functools.lru_cache(maxsize=10_000)  # contexts repeat
        def count(text: str, tokenizer=tokenizer) -> int:
            return len(tokenizer(text, add_special_tokens=False)["input_ids"])

        located = rows(split)
        for where, example in progress(located, f"tokens of {split.name}") if progress else located:
            num_samples += 1
            try:
                num_tokens = collator.count_tokens(example)
            except PokegemmaError as error:
                too_long.append(f"{where} ({example.id}): {error}")
                continue
            samples = example.samples if isinstance(example, Trajectory) else (example,)
            num_text = count(samples[0].context) + count(samples[0].question)
            total += num_tokens
            longest, longest_text = max(longest, num_tokens), max(longest_text, num_text)
            longest_answer = max(longest_answer, sum(count(sample.output) for sample in samples))
            if num_tokens > limit:
                too_long.append(f"{where} ({example.id}): {num_tokens} tokens, more than {limit}")
            if num_text > MAX_PROMPT_TOKENS:
                wordy.append(f"{where} ({example.id}): {num_text} tokens of prompt text, over {MAX_PROMPT_TOKENS}")
    if not num_samples:
        return skipped(name, NO_SAMPLES), None
    lengths = TokenLengths(longest, longest_text, longest_answer, total, num_samples)
    summary = (
        f"longest sample {longest} of {limit} tokens, mean {total / num_samples:.0f}; prompt text at most "
        f"{longest_text} of {MAX_PROMPT_TOKENS}, answer at most {longest_answer}"
    )
    if too_long:
        return Check(name, "FAIL", f"{summary}; {len(too_long)} cannot be trained on", (*too_long, *wordy)), lengths
    return Check(name, "WARN" if wordy else "PASS", summary, tuple(wordy)), lengths


@dataclass(frozen=True)
class ModelSize:
    """Numbers of weights. `linears`: (inputs, outputs) of each linear layer of the language model."""

    num_weights: int
    num_text_weights: int
    linears: tuple[tuple[int, int], ...]

    def num_lora_weights(self, rank: int) -> int:
        """Return the weights of a LoRA adapter on every linear layer of the language model."""
        return sum(rank * (inputs + outputs) for inputs, outputs in self.linears)


def measure_model(config: PreTrainedConfig) -> ModelSize:
    """Count the weights of a model without loading any."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config).model
    modules = model.language_model.modules()
    return ModelSize(
        num_weights=sum(weight.numel() for weight in model.parameters()),
        num_text_weights=sum(weight.numel() for weight in model.language_model.parameters()),
        linears=tuple(
            (module.in_features, module.out_features) for module in modules if isinstance(module, torch.nn.Linear)
        ),
    )


def estimate_memory(
    config: PreTrainedConfig,
    size: ModelSize,
    *,
    finetuning: str,
    lengths: TokenLengths,
    images_per_sample: int,
    batch_size: int,
    bytes_per_weight: int,
    eval_batch_size: int = 0,
    lora_r: int = LORA_R,
) -> dict[str, int]:
    """Return the estimated bytes of each part of a training step with gradient checkpointing, or of an evaluation.

    Of the larger of the two: an evaluation keeps nothing for a backward pass, but may have a larger batch
    (`eval_batch_size`; 0 for none). An estimate: allocator waste, kernels' workspaces and communication buffers are not
    in it.

    - weights: 0.516 byte for a weight of the language model's linear layers under QLoRA (nf4, and a constant of one
      byte for 64 weights, themselves quantised), `bytes_per_weight` for all others.
    - trained: a LoRA weight is float32, with gradient and two Adam moments: 16 bytes. Full fine-tuning: gradient and
      two moments of `bytes_per_weight` for each weight of the language model.
    - activations: the input of every layer (tokens * width), and within the one layer that is being recomputed
      8 widths, 4 widths of the queries and 6 of the MLP a token, in float32 because of adapters and gradients.
    - vision tower: one layer of SigLIP over image patches, since a frozen tower keeps nothing for a backward pass;
      of other families also the input of every layer, which TRL differentiates.
    - logits: answer tokens * vocabulary in float32, three times (logits, probabilities, gradient).
    - runtime: 1 GiB for CUDA, libraries and Python.
    """
    num_linear = sum(inputs * outputs for inputs, outputs in size.linears)
    quantised = num_linear if finetuning == "qlora" else 0
    shape = {"lengths": lengths, "images_per_sample": images_per_sample, "bytes_per_weight": bytes_per_weight}
    training = _pass_bytes(config, batch_size=batch_size, is_training=True, **shape)
    evaluation = _pass_bytes(config, batch_size=eval_batch_size, is_training=False, **shape)
    return {
        "weights": int(quantised * 0.516) + (size.num_weights - quantised) * bytes_per_weight,
        "trained weights, gradients, optimizer": trained_bytes(
            size, finetuning=finetuning, bytes_per_weight=bytes_per_weight, lora_r=lora_r
        ),
        **max(training, evaluation, key=lambda parts: sum(parts.values())),
        "runtime": GIB,
    }


def _pass_bytes(
    config: PreTrainedConfig,
    *,
    lengths: TokenLengths,
    images_per_sample: int,
    batch_size: int,
    bytes_per_weight: int,
    is_training: bool,
) -> dict[str, int]:
    """Return what a forward pass of a batch needs beyond the weights, in training with what its backward pass needs."""
    text, tower = config.text_config, tower_shape(config)
    inner_width = text.intermediate_size if isinstance(text.intermediate_size, int) else max(text.intermediate_size)
    tokens = batch_size * lengths.longest
    query_width = text.num_attention_heads * head_width(config)
    layer = tokens * (8 * text.hidden_size + 4 * query_width + 6 * inner_width) * 4
    kept_layers = text.num_hidden_layers if is_training else 1
    patches = batch_size * images_per_sample * tower["positions"]
    kept_tower = tower["width"] * tower["layers"] if is_training and family_of(config).inexact else 0
    return {
        "activations": tokens * text.hidden_size * bytes_per_weight * kept_layers + layer,
        "vision tower": patches * ((8 * tower["width"] + 6 * tower["inner_width"]) * 4 + kept_tower * bytes_per_weight),
        "logits": batch_size * (lengths.longest_answer + 2) * text.vocab_size * 4 * 3,
    }


def trained_bytes(size: ModelSize, *, finetuning: str, bytes_per_weight: int, lora_r: int = LORA_R) -> int:
    """Return the bytes of what training adds to the weights: adapter, gradients, two Adam moments."""
    if finetuning == "full":
        return size.num_text_weights * 3 * bytes_per_weight
    return size.num_lora_weights(lora_r) * 16


def disk_bytes(size: ModelSize, *, finetuning: str, bytes_per_weight: int) -> int:
    """Return the disk that a run takes: two checkpoints and the result, then the merged model in bfloat16."""
    trained = trained_bytes(size, finetuning=finetuning, bytes_per_weight=bytes_per_weight)
    whole = size.num_weights * bytes_per_weight if finetuning == "full" else 0
    return 3 * (trained + whole) + size.num_weights * 2


def step_bytes(size: ModelSize, *, finetuning: str, bytes_per_weight: int) -> int:
    """Return the disk that the one real step takes: an adapter in float32, or the whole model."""
    return size.num_weights * bytes_per_weight if finetuning == "full" else size.num_lora_weights(LORA_R) * 4


def check_memory(estimate: dict[str, int], hardware: Hardware, *, what: str) -> Check:
    """Compare an estimate with the smallest GPU, or with the machine's memory where there is none.

    Fails above what there is, warns above 85 % of it: the estimate is rough.
    """
    needed = sum(estimate.values()) / GIB
    gpus = [gpu.memory_gib for gpu in hardware.usable_gpus]
    if None in gpus:
        return Check("memory (estimate)", "WARN", f"{what}: about {needed:.1f} GiB; the GPU does not say what it has")
    available, where = (min(gpus), "GPU") if gpus else (hardware.memory_gib, "machine")
    details = tuple(f"{part}: {size / GIB:.2f} GiB" for part, size in estimate.items())
    summary = f"{what}: about {needed:.1f} of the {where}'s {available:.1f} GiB"
    if needed > available:
        advice = "take --finetuning qlora, a smaller batch or a smaller model"
        return Check("memory (estimate)", "FAIL", f"{summary}; {advice}", details)
    return Check("memory (estimate)", "WARN" if needed > 0.85 * available else "PASS", summary, details)
