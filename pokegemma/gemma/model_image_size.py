"""Run SigLIP at another picture size: interpolate the position embeddings, and adapt config, projector and processor.

The projector pools the same square of patches into a token as before, so that a token describes as many pixels as the
language model has learned to read. Pictures of 448 px have 64 tokens, those of 896 px have 256.
"""

import json
import math
from pathlib import Path

import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    PreTrainedConfig,
)
from transformers.image_utils import SizeDict
from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector
from transformers.models.siglip.modeling_siglip import SiglipVisionEmbeddings

from pokegemma.errors import PokegemmaError
from pokegemma.gemma.vision_tower import gathered


def picture_facts(config: PreTrainedConfig) -> dict[str, int | None]:
    """Return size and tokens of a model's pictures, for records; None for families other than Gemma 3."""
    return {
        "image_size_px": getattr(config.vision_config, "image_size", None),
        "image_tokens": getattr(config, "mm_tokens_per_image", None),
    }


def describe_image_size(image_size_px: int | None, image_tokens: int | None) -> str:
    """Return what `picture_facts` returned, for people."""
    return f"{image_size_px} px ({image_tokens} tokens a picture)" if image_tokens else "the model's own size"


def resize_config(config: Gemma3Config, image_size_px: int) -> None:
    """Change the picture size in a config.

    Raises:
        PokegemmaError: the size is not a multiple of the square of pixels that becomes a token.
    """
    vision = config.vision_config
    patches_per_side = vision.image_size // vision.patch_size
    pooled_px = vision.patch_size * (patches_per_side // math.isqrt(config.mm_tokens_per_image))
    if image_size_px < 1 or image_size_px % pooled_px:
        below = max(int(image_size_px) // pooled_px, 0) * pooled_px
        nearest = [f"{size} px" for size in (below, below + pooled_px) if size]
        raise PokegemmaError(
            f"--image_size {image_size_px}: not a multiple of {pooled_px} px, which become one token; "
            f"take {' or '.join(nearest)}"
        )
    vision.image_size = int(image_size_px)
    config.mm_tokens_per_image = (vision.image_size // pooled_px) ** 2


def interpolate_positions(weight: torch.Tensor, patches_per_side: int) -> torch.Tensor:
    """Return position embeddings (patches, width) of a square picture for another number of patches.

    It is bicubic and computed in float32 on the CPU, so that training and merging get the same on every machine.
    """
    side = math.isqrt(len(weight))
    grid = weight.detach().float().cpu().T.reshape(1, -1, side, side)
    # A patch of a smaller picture covers several of the larger one, and with antialiasing all of them count. Without it
    # bicubic reads 4 x 4 neighbours, however far apart the new places are.
    shrinks = patches_per_side < side
    grid = torch.nn.functional.interpolate(
        grid, size=(patches_per_side, patches_per_side), mode="bicubic", antialias=shrinks
    )
    return grid[0].flatten(1).T.to(device=weight.device, dtype=weight.dtype).contiguous()


def _resize_embeddings(embeddings: SiglipVisionEmbeddings, image_size_px: int) -> None:
    old = embeddings.position_embedding.weight
    patches_per_side = image_size_px // embeddings.patch_size
    with gathered([old]):
        resized = interpolate_positions(old, patches_per_side)
    embeddings.image_size = image_size_px
    embeddings.num_patches = embeddings.num_positions = patches_per_side**2
    # A new parameter, which ZeRO-3 partitions in deepspeed.initialize, as those of an adapter.
    embeddings.position_embedding = torch.nn.Embedding.from_pretrained(resized, freeze=not old.requires_grad)
    embeddings.position_ids = torch.arange(patches_per_side**2, device=embeddings.position_ids.device)[None]


def resize_model(model: Gemma3ForConditionalGeneration, image_size_px: int) -> None:
    """Make a loaded model take pictures of another size.

    Raises:
        PokegemmaError: the size does not fit.
    """
    if image_size_px == model.config.vision_config.image_size:
        return
    resize_config(model.config, image_size_px)
    for module in model.modules():
        if isinstance(module, SiglipVisionEmbeddings):
            _resize_embeddings(module, model.config.vision_config.image_size)
        elif isinstance(module, Gemma3MultiModalProjector):  # kernel_size and avg_pool stay
            module.patches_per_image = model.config.vision_config.image_size // model.config.vision_config.patch_size
            module.tokens_per_side = math.isqrt(model.config.mm_tokens_per_image)


def resize_processor(processor: Gemma3Processor, config: Gemma3Config) -> None:
    """Make a processor write as many tokens, and resize pictures to the size, as in `config`."""
    tokenizer, num_tokens, size = processor.tokenizer, config.mm_tokens_per_image, config.vision_config.image_size
    processor.image_seq_length = num_tokens
    processor.full_image_sequence = (
        f"\n\n{tokenizer.boi_token}{tokenizer.image_token * num_tokens}{tokenizer.eoi_token}\n\n"
    )
    processor.image_processor.size = SizeDict(height=size, width=size)
    # Published checkpoints have the number here, too, and llama.cpp's converter reads this one.
    processor.image_processor.image_seq_length = num_tokens


def adapter_image_size(adapter: Path) -> int | None:
    """Return the picture size of an adapter's training, None where its folder has no processor of Gemma 3."""
    path = adapter / "processor_config.json"
    if not path.is_file() or json.loads(path.read_text(encoding="utf-8")).get("processor_class") != "Gemma3Processor":
        return None
    return Gemma3ImageProcessorPil.from_pretrained(str(adapter)).size["height"]
