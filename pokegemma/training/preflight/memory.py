"""How much memory and disk training takes, by a formula."""

from dataclasses import dataclass

import torch
from transformers import AutoModelForImageTextToText, PreTrainedConfig

from pokegemma.data.checks.records import Check
from pokegemma.environment import Hardware
from pokegemma.gemma.families import family_of, head_width, tower_shape
from pokegemma.training.preflight.token_lengths import TokenLengths

GIB = 2**30


LORA_R = 16
"""The training script's default rank."""


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
