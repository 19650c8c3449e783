"""How much memory a training step takes, estimated by a formula, and whether the GPU or the machine has it."""

from dataclasses import dataclass

import torch
from transformers import AutoModelForImageTextToText, PreTrainedConfig

from pokegemma.data.checks.records import Check
from pokegemma.environment import GIB, Hardware
from pokegemma.gemma.families import family_of, head_width, tower_shape
from pokegemma.training.preflight.token_lengths import TokenLengths


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


def trained_bytes(size: ModelSize, *, finetuning: str, lora_r: int, bytes_per_weight: int) -> int:
    """Return the bytes that training adds to the weights: adapter, gradients, two Adam moments.

    A LoRA weight is float32, with gradient and moments 16 bytes. Full fine-tuning keeps the gradient and the moments of
    each weight of the language model in the type of the weights.
    """
    if finetuning == "full":
        return size.num_text_weights * 3 * bytes_per_weight
    return size.num_lora_weights(lora_r) * 16


def estimate_memory(
    config: PreTrainedConfig,
    size: ModelSize,
    *,
    finetuning: str,
    lora_r: int,
    lengths: TokenLengths,
    batch_size: int,
    bytes_per_weight: int,
    eval_batch_size: int = 0,
) -> dict[str, int]:
    """Return the estimated bytes of each part of a training step with gradient checkpointing, or of an evaluation.

    The larger of the two is returned: an evaluation keeps nothing for a backward pass, but its batch may be larger
    (`eval_batch_size`; 0 for no evaluation). Unused memory of the allocator, workspaces of kernels and buffers of
    communication are not counted. The parts are:

    - weights: under QLoRA 0.516 byte for each weight of the language model's linear layers (nf4, and a constant of one
      byte for 64 weights, itself quantised); `bytes_per_weight` for all others.
    - trained weights, gradients, optimizer: see `trained_bytes`.
    - activations, vision tower, logits: see `_pass_bytes`.
    - runtime: 1 GiB for CUDA, libraries and Python.
    """
    num_linear = sum(inputs * outputs for inputs, outputs in size.linears)
    num_quantised = num_linear if finetuning == "qlora" else 0
    training = _pass_bytes(config, lengths, batch_size, bytes_per_weight, is_training=True)
    evaluation = _pass_bytes(config, lengths, eval_batch_size, bytes_per_weight, is_training=False)
    return {
        "weights": int(num_quantised * 0.516) + (size.num_weights - num_quantised) * bytes_per_weight,
        "trained weights, gradients, optimizer": trained_bytes(
            size, finetuning=finetuning, lora_r=lora_r, bytes_per_weight=bytes_per_weight
        ),
        **max(training, evaluation, key=lambda parts: sum(parts.values())),
        "runtime": GIB,
    }


def _pass_bytes(
    config: PreTrainedConfig, lengths: TokenLengths, batch_size: int, bytes_per_weight: int, *, is_training: bool
) -> dict[str, int]:
    """Return what a forward pass of a batch needs besides the weights, in training with its backward pass.

    - activations: the input of every layer (tokens * width), and within the one layer that is recomputed 8 widths, 4
      widths of the queries and 6 of the MLP for each token, in float32 because of adapters and gradients.
    - vision tower: one layer over the image patches, since a frozen tower keeps nothing for a backward pass. In
      families other than Gemma 3 also the input of every layer, since TRL differentiates their tower.
    - logits: answer tokens * vocabulary in float32, three times (logits, probabilities, gradient).
    """
    text, tower = config.text_config, tower_shape(config)
    inner_width = text.intermediate_size if isinstance(text.intermediate_size, int) else max(text.intermediate_size)
    tokens = batch_size * lengths.longest
    query_width = text.num_attention_heads * head_width(config)
    layer = tokens * (8 * text.hidden_size + 4 * query_width + 6 * inner_width) * 4
    kept_layers = text.num_hidden_layers if is_training else 1
    patches = batch_size * lengths.most_pictures * tower["positions"]
    kept_tower = tower["width"] * tower["layers"] if is_training and family_of(config).inexact else 0
    return {
        "activations": tokens * text.hidden_size * bytes_per_weight * kept_layers + layer,
        "vision tower": patches * ((8 * tower["width"] + 6 * tower["inner_width"]) * 4 + kept_tower * bytes_per_weight),
        "logits": batch_size * (lengths.longest_answer + 2) * text.vocab_size * 4 * 3,
    }


def check_memory(estimate: dict[str, int], hardware: Hardware, *, what: str) -> Check:
    """Compare an estimate with the memory of the smallest GPU, or of the machine if it has no GPU.

    Fails above that memory, and warns above 85 % of it because the estimate is rough.
    """
    name, needed = "memory (estimate)", sum(estimate.values()) / GIB
    gpus = [gpu.memory_gib for gpu in hardware.usable_gpus]
    if None in gpus:
        return Check(name, "WARN", f"{what}: about {needed:.1f} GiB; the memory of the GPU is unknown")
    available, where = (min(gpus), "GPU") if gpus else (hardware.memory_gib, "machine")
    details = tuple(f"{part}: {size / GIB:.2f} GiB" for part, size in estimate.items())
    summary = f"{what}: about {needed:.1f} of the {where}'s {available:.1f} GiB"
    if needed > available:
        advice = "take --finetuning qlora, a smaller batch or a smaller model"
        return Check(name, "FAIL", f"{summary}; {advice}", details)
    return Check(name, "WARN" if needed > 0.85 * available else "PASS", summary, details)
