"""A tiny random Gemma 3 with every part of the real ones; other families are in gemma3n_gemma4."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    GemmaTokenizer,
    GenerationConfig,
    set_seed,
)

from pokegemma.gemma.tiny.tokenizer import CHAT_TEMPLATE, train_tokenizer

_SPECIAL = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
_TEXT = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "max_position_embeddings": 8192,
    **_SPECIAL,
}
_LAYER_TYPES = ["sliding_attention"] * 5 + ["full_attention"]
_VISION = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "patch_size": 14,
    "vision_use_head": False,
}


def _published_key(key: str) -> str:
    """Return the name that published checkpoints give a weight of a Gemma 3 built from its config."""
    return key.replace("vision_tower.", "vision_tower.vision_model.", 1) if ".vision_model." not in key else key


@torch.no_grad()
def make_teachable(model: Gemma3ForConditionalGeneration) -> None:
    """Set the random weights that adapters cannot reach to sizes from which LoRA on the others learns quickly.

    transformers' own start leaves it little: a projector of zeros makes all pictures look the same, position
    embeddings are far smaller than the patches that they are added to, and token embeddings of 0.02, which are the
    LM head, too, cannot make one token much more likely than the others.
    """
    width = model.config.text_config.hidden_size
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=width**-0.5)
    torch.nn.init.constant_(model.model.language_model.norm.weight, 2.0)  # a factor of 3: Gemma's norms add one
    draw_vision(model)


@torch.no_grad()
def draw_vision(model: Gemma3ForConditionalGeneration) -> None:
    """Draw position embeddings and projector at sizes with which different pictures get different soft tokens."""
    torch.nn.init.normal_(model.model.vision_tower.embeddings.position_embedding.weight, std=0.6)
    projection = model.model.multi_modal_projector.mm_input_projection_weight
    torch.nn.init.normal_(projection, std=projection.shape[0] ** -0.5)


def random_gemma3(
    tokenizer: GemmaTokenizer, text: Mapping[str, Any], *, image_size_px: int, num_image_tokens: int
) -> Gemma3ForConditionalGeneration:
    """Return a random Gemma 3 with a small vision tower, as transformers starts it.

    Args:
        text: values of the language model's config, without the size of the vocabulary.
        num_image_tokens: tokens a picture, the square of a divisor of `image_size_px` / 14.
    """
    stops = {"eos_token_id": [1, tokenizer.convert_tokens_to_ids("<end_of_turn>")]}
    config = Gemma3Config(
        text_config={**text, "vocab_size": 64 * -(-len(tokenizer) // 64)},
        vision_config={**_VISION, "image_size": image_size_px},
        mm_tokens_per_image=num_image_tokens,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.convert_tokens_to_ids("<end_of_image>"),
        image_token_index=tokenizer.image_token_id,
        tie_word_embeddings=True,
        **stops,
    )
    model = Gemma3ForConditionalGeneration(config)
    model.generation_config = GenerationConfig(**{**_SPECIAL, **stops}, cache_implementation="hybrid", do_sample=False)
    return model


def save_published(model: Gemma3ForConditionalGeneration, tokenizer: GemmaTokenizer, folder: Path) -> None:
    """Write a model that was built from its config as published checkpoints are, with its processor.

    Args:
        folder: already contains tokenizer.model.
    """
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights = {_published_key(key): value for key, value in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    size_px, num_image_tokens = model.config.vision_config.image_size, model.config.mm_tokens_per_image
    image_processor = Gemma3ImageProcessorPil(
        size={"height": size_px, "width": size_px}, image_seq_length=num_image_tokens
    )
    processor = Gemma3Processor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
        image_seq_length=num_image_tokens,
    )
    processor.save_pretrained(folder)


def make_tiny_gemma3(
    folder: Path,
    *,
    seed: int = 0,
    image_size_px: int = 224,
    num_image_tokens: int = 256,
    sliding_window: int = 512,
    num_text_layers: int = len(_LAYER_TYPES),
) -> None:
    """Write a tiny random Gemma 3 (about 2 million weights) that loads wherever the published ones do.

    It has a SentencePiece tokenizer with Gemma's control symbols and byte fallback, the chat template, SigLIP
    without a head, the projector, and six text layers of which the last has full attention. 224 px, patches of
    14 px and 256 tokens a picture are what llama.cpp and mlx-vlm assume.

    Args:
        folder: an existing folder.
        num_image_tokens: tokens a picture, the square of a divisor of `image_size_px` / 14.
        sliding_window: tokens that the five other text layers look back.
        num_text_layers: with fewer than six none has full attention, as in the first layers of the published ones.
    """
    set_seed(seed)
    tokenizer = train_tokenizer(folder, seed=seed)
    text = {
        **_TEXT,
        "num_hidden_layers": num_text_layers,
        "layer_types": _LAYER_TYPES[:num_text_layers],
        "sliding_window": sliding_window,
    }
    model = random_gemma3(tokenizer, text, image_size_px=image_size_px, num_image_tokens=num_image_tokens)
    make_teachable(model)
    save_published(model, tokenizer, folder)
