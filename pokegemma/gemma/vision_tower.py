"""Run Gemma 3's vision tower once for each distinct picture, and without gradients where it is frozen.

TRL (1.16) with gradient checkpointing differentiates even a frozen tower, since `enable_input_require_grads` also hooks
SigLIP's patch embedding: every picture of every sample goes forward twice and backward once.
"""

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from transformers import Gemma3ForConditionalGeneration, Gemma3Model
from transformers.modeling_outputs import BaseModelOutputWithPooling

from pokegemma.gemma import block_attention
from pokegemma.gemma.attention_masks import attention_masks, mask_dtype
from pokegemma.gemma.families import FAMILIES, TOWER

PROJECTOR = FAMILIES["gemma3"].projector


def is_trained(model: Gemma3Model) -> bool:
    """Return whether any weight of the tower or the projector is trained."""
    parts = (getattr(model, TOWER), getattr(model, PROJECTOR))
    return any(weight.requires_grad for part in parts for weight in part.parameters())


def encode_pictures(model: Gemma3Model, pixel_values: torch.Tensor) -> torch.Tensor:
    """Return the soft tokens (pictures, tokens, width) of (pictures, 3, height, width), in the model's own type.

    Differentiable only where the tower or the projector is trained.
    """
    with torch.set_grad_enabled(torch.is_grad_enabled() and is_trained(model)):
        return model.get_image_features(pixel_values, return_dict=True).pooler_output


def _prepare(model: Gemma3Model, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    index, features, branches = (kwargs.pop(name, None) for name in ("image_index", "image_features", "branches"))
    if index is not None:
        pixels = kwargs.pop("pixel_values", None)
        features = encode_pictures(model, pixels) if features is None else features
        kwargs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=features[index])}
    if branches is not None:
        text = model.config.get_text_config()
        row = {
            "positions": kwargs["position_ids"],
            "branches": branches,
            "token_type_ids": kwargs["token_type_ids"],
            "valid": kwargs["attention_mask"],
            "window": text.sliding_window,
        }
        if text._attn_implementation == block_attention.BLOCK_ATTENTION:
            kwargs["attention_mask"] = block_attention.block_masks(**row)
        else:
            kwargs["attention_mask"] = attention_masks(**row, dtype=mask_dtype(model))
    return args, kwargs


def accept_compact_batches(model: Gemma3ForConditionalGeneration) -> None:
    """Let a model take the batches of `Gemma3Collator` in addition to its own inputs.

    - `image_index` (slots,) int64: which of `pixel_values` each picture of the text is;
    - `image_features` (pictures, tokens, width): soft tokens instead of `pixel_values`;
    - `branches` (batch, length) int64, with `position_ids`: rows of several samples, see `attention_masks`.

    This is a hook within the forward pass and not a step before it, so that DDP, FSDP2, ZeRO-3 and PEFT run one forward
    pass, in which they have gathered their weights.
    """
    text = model.config.get_text_config()
    if text._attn_implementation == "sdpa":
        text._attn_implementation = block_attention.BLOCK_ATTENTION
    model.model.register_forward_pre_hook(_prepare, with_kwargs=True)


def gathered(weights: Iterable[torch.nn.Parameter]) -> contextlib.AbstractContextManager:
    """Return a context in which weights are whole: under DeepSpeed ZeRO-3 each process has a part of them."""
    weights = list(weights)
    if not any(hasattr(weight, "ds_id") for weight in weights):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(weights)
