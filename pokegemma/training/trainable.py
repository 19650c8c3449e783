"""The base model as it is trained: quantised for QLoRA, with the right parts frozen for full fine-tuning."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from pokegemma.gemma.families import TOWER, Family
from pokegemma.gemma.loading import Checkpoint
from pokegemma.training.options import ModelOptions, TrainingOptions, WeightOptions


def load_trainable(checkpoint: Checkpoint, options: ModelOptions, training: TrainingOptions) -> PreTrainedModel:
    """Return the base model: quantised for QLoRA, with the right parts frozen for full fine-tuning.

    Raises:
        PokegemmaError: the model cannot be loaded.
    """
    family = checkpoint.family
    model = checkpoint.load_model(**loading_options(options, training, not_quantised=family.not_quantised))
    model.config.use_cache = False
    if options.finetuning == "full":
        frozen = {TOWER: not options.train_vision_tower, family.projector: not options.train_projector}
        frozen |= dict.fromkeys(family.untrained, True)
        for name, weight in model.named_parameters():
            weight.requires_grad = not any(part in name and freeze for part, freeze in frozen.items())
    return model


def loading_options(
    options: WeightOptions, training: TrainingOptions, *, not_quantised: Sequence[str]
) -> dict[str, Any]:
    """Return the arguments to load a base model with, in 4 bits for QLoRA but for the modules `not_quantised`."""
    arguments: dict[str, Any] = {"dtype": options.dtype, "attn_implementation": options.attn_implementation}
    if options.finetuning == "qlora":
        dtype = torch.bfloat16 if options.dtype == "bfloat16" else torch.float32
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=options.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=options.use_bnb_nested_quant,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_storage=dtype,  # the same type for all weights; it does not change their values
            llm_int8_skip_modules=not_quantised,
        )
        arguments["device_map"] = {"": training.device}
    return arguments


def is_reentrant(training: TrainingOptions, *, adapter: bool) -> bool:
    """Return whether gradient checkpointing will be reentrant.

    With adapters under ZeRO-3, TRL (1.16) sets use_reentrant in `gradient_checkpointing_kwargs`, which transformers
    (5.23) reads only if the user has given these arguments. ZeRO-3 does not need it.
    """
    asked = training.activation_checkpointing_kwargs
    if not training.activation_checkpointing or not asked:
        return False
    deepspeed = training.deepspeed_plugin
    zero3 = adapter and deepspeed is not None and deepspeed.zero_stage == 3
    return zero3 or bool(asked.get("use_reentrant"))


def describe_trainable(model: torch.nn.Module, family: Family) -> str:
    """Return how many weights are trained in each part of the model, for the log."""
    counts = dict.fromkeys(("language model", "vision tower", "projector"), 0)
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            part = "vision tower" if TOWER in name else "projector" if family.projector in name else "language model"
            counts[part] += getattr(weight, "ds_numel", weight.numel())
    return ", ".join(f"{part} {count:,}" for part, count in counts.items())
