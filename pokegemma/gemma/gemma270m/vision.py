"""A Gemma 3 with vision for trials: a real language model, and a small random vision tower and projector."""

from pathlib import Path

import torch
from transformers import Gemma3ForCausalLM, Gemma3ForConditionalGeneration, GemmaTokenizer, set_seed

from pokegemma.gemma.gemma270m.conversion import load_gguf, read_gguf_fields, write_gguf_tokenizer
from pokegemma.gemma.loading import Dtype
from pokegemma.gemma.tiny.gemma3 import draw_vision, random_gemma3, save_published
from pokegemma.gemma.tiny.tokenizer import PICTURE_TOKENS


def add_vision(
    text: Gemma3ForCausalLM,
    tokenizer: GemmaTokenizer,
    *,
    seed: int = 0,
    image_size_px: int = 224,
    num_image_tokens: int = 256,
) -> Gemma3ForConditionalGeneration:
    """Return a Gemma 3 with the weights of `text` and a random vision tower and projector of its width.

    As in published checkpoints with vision, the vocabulary has more rows than the tokenizer has entries, up to a
    multiple of 64 (262,208 for 262,145). The new rows repeat the last ones of `text`, which no text has: rows of zeros
    would have a logit of 0, which is more than that of most real tokens.

    Args:
        tokenizer: with `PICTURE_TOKENS`.
        num_image_tokens: tokens a picture, the square of a divisor of `image_size_px` / 14.
    """
    set_seed(seed)
    settings = {name: value for name, value in text.config.to_dict().items() if name != "_name_or_path"}
    model = random_gemma3(tokenizer, settings, image_size_px=image_size_px, num_image_tokens=num_image_tokens)
    draw_vision(model)
    weights = text.model.state_dict()
    rows = weights["embed_tokens.weight"]
    num_new = model.config.text_config.vocab_size - len(rows)
    weights["embed_tokens.weight"] = torch.cat([rows, rows[len(rows) - num_new :]])
    model.model.language_model.load_state_dict(weights)
    return model.to(text.dtype)


def convert_gguf_with_vision(
    path: Path, folder: Path, *, dtype: Dtype = "float32", image_size_px: int = 224, num_image_tokens: int = 256
) -> Gemma3ForConditionalGeneration:
    """Write the Gemma 3 in a GGUF file to an existing folder, with a random vision tower, and return it.

    Args: as in `add_vision`.

    Raises:
        PokegemmaError: as `read_gguf_fields` and `load_gguf`.
    """
    tokenizer = write_gguf_tokenizer(read_gguf_fields(path), folder, tokens=PICTURE_TOKENS)
    model = add_vision(
        load_gguf(path, dtype=dtype), tokenizer, image_size_px=image_size_px, num_image_tokens=num_image_tokens
    )
    save_published(model, tokenizer, folder)
    return model
