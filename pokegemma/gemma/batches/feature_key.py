"""What the features of a picture depend on: the key of a feature cache."""

import hashlib
import json
from typing import Any

import torch
from transformers import Gemma3ForConditionalGeneration, Gemma3Processor

from pokegemma.gemma.families import TOWER
from pokegemma.gemma.vision_tower import PROJECTOR, gathered


def vision_parameters(model: Gemma3ForConditionalGeneration) -> list[tuple[str, torch.nn.Parameter]]:
    parts = ((part, getattr(model.model, part)) for part in (TOWER, PROJECTOR))
    return [(f"{part}.{name}", weight) for part, module in parts for name, weight in module.named_parameters()]


def feature_key(model: Gemma3ForConditionalGeneration, processor: Gemma3Processor) -> dict[str, Any]:
    """Return all that soft tokens depend on: every weight of tower and projector, type, size, processor settings."""
    digest = hashlib.sha256()
    with gathered(weight for _, weight in vision_parameters(model)):
        for name, weight in sorted(vision_parameters(model), key=lambda pair: pair[0]):
            digest.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode())
            digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    settings = processor.image_processor.to_dict()
    names = ("do_resize", "size", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
    return {
        "weights": digest.hexdigest(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "image_size": model.config.vision_config.image_size,
        "tokens": processor.image_seq_length,
        "width": model.config.get_text_config().hidden_size,
        "processor": json.loads(json.dumps({name: settings.get(name) for name in names})),
    }
