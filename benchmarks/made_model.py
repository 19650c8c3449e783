"""The random models of the benchmarks: Gemma-3-4B's shape, its proportions at a size for a CPU, and a tiny one."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, set_seed

from benchmarks.decision_cost import GEMMA_3_4B
from pokegemma.gemma.loading import open_checkpoint
from pokegemma.gemma.tiny.gemma3 import make_teachable, make_tiny_gemma3


@dataclass(frozen=True)
class Shape:
    """Values of a Gemma 3's config that differ from those of the tiny checkpoint."""

    image_size_px: int
    num_image_tokens: int
    text: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] = field(default_factory=dict)


def _values(config: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(config, name) for name in names}


_LAYER = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_TEXT = (*_LAYER, "num_key_value_heads", "head_dim", "query_pre_attn_scalar", "sliding_window", "layer_types")
SHAPES = {
    "4b": Shape(
        image_size_px=GEMMA_3_4B.vision_config.image_size,
        num_image_tokens=GEMMA_3_4B.mm_tokens_per_image,
        text=_values(GEMMA_3_4B.text_config, *_TEXT, "vocab_size"),
        vision=_values(GEMMA_3_4B.vision_config, *_LAYER),
    ),
    "quarter": Shape(
        image_size_px=448,
        num_image_tokens=256,
        text={
            "hidden_size": 640,
            "intermediate_size": 2560,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "query_pre_attn_scalar": 128,
            "sliding_window": 1024,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
        vision={"hidden_size": 384, "intermediate_size": 1434, "num_hidden_layers": 6, "num_attention_heads": 6},
    ),
    "tiny": Shape(image_size_px=56, num_image_tokens=4),
}
"""4b: google/gemma-3-4b-it. quarter: a quarter of its width and its proportions. tiny: for rehearsals and tests."""


def default_shape() -> str:
    """Return the name of the shape that this machine can train."""
    return "4b" if torch.cuda.is_available() else "quarter"


def make_model(
    folder: Path, *, image_scale: int, shape: str | None = None, dtype: torch.dtype | None = None
) -> tuple[Any, Any]:
    """Return (model, processor): random weights, the same for each call with the same dtype.

    Args:
        folder: gets the files of a tiny checkpoint, whose config and processor are used.
        image_scale: divides the size of pictures; its square divides their tokens.
        shape: a name in `SHAPES`; None: the one that this machine can train.
        dtype: None: bfloat16 on a GPU, else float32.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = dtype or (torch.bfloat16 if device == "cuda" else torch.float32)
    values = SHAPES[shape or default_shape()]
    if not (folder / "config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        make_tiny_gemma3(
            folder,
            image_size_px=values.image_size_px // image_scale,
            num_image_tokens=values.num_image_tokens // image_scale**2,
        )
    config = Gemma3Config.from_pretrained(folder)
    for part, changes in ((config.text_config, values.text), (config.vision_config, values.vision)):
        for name, value in changes.items():
            setattr(part, name, value)
    config._attn_implementation = "sdpa"
    set_seed(0)
    with torch.device(device):
        torch.set_default_dtype(dtype)
        model = Gemma3ForConditionalGeneration(config)
        torch.set_default_dtype(torch.float32)
    make_teachable(model)
    model.config.use_cache = False
    return model, open_checkpoint(folder).processor
