"""Attention inside pictures: bidirectional, as Gemma 3 was trained, or causal.

mlx-vlm always computes causal attention there, so a model for mlx-vlm is trained with it from the start. The attention
is recorded with the model: in config.json of a checkpoint, and in tokenizer_config.json of an adapter. The second is a
switch by which transformers' own processor leaves out `token_type_ids`. Without them transformers is causal inside
pictures, too, also in its `generate` and in `transformers serve`.
"""

import json
from pathlib import Path
from typing import Literal, get_args

from transformers import PreTrainedConfig, ProcessorMixin

from pokegemma.errors import PokegemmaError

ImageAttention = Literal["bidirectional", "causal"]

_SWITCH = "return_mm_token_type_ids"  # of a processor's call; read from the tokenizer's config up to transformers 5.28


def trained_attention(config: PreTrainedConfig) -> ImageAttention:
    """Return the attention inside pictures that a config records; published checkpoints record none: bidirectional."""
    return getattr(config, "image_attention", "bidirectional")


def attention_facts(config: PreTrainedConfig) -> dict[str, ImageAttention]:
    """Return the entry of a model's attention in run.json and metrics.json; there is none where it is bidirectional."""
    return {"image_attention": "causal"} if trained_attention(config) == "causal" else {}


def change_config(config: PreTrainedConfig, attention: ImageAttention) -> None:
    """Record another attention inside pictures in the config of a Gemma 3.

    Raises:
        PokegemmaError: there is no such attention, or a causal model is to become bidirectional.
    """
    if attention not in get_args(ImageAttention):  # values from YAML bypass the options' own check
        raise PokegemmaError(f"--image_attention {attention}: not one of {', '.join(get_args(ImageAttention))}")
    if attention == "causal":
        config.image_attention = attention
    elif trained_attention(config) != attention:
        raise PokegemmaError(
            f"--image_attention {attention}: {config.name_or_path or 'the model'} was trained as causal; leave it out"
        )


def change_processor(processor: ProcessorMixin, attention: ImageAttention) -> None:
    """Make the processor of a Gemma 3 leave out `token_type_ids`, or write them again, also after it is saved."""
    if attention == "causal":
        processor.tokenizer.init_kwargs[_SWITCH] = False
    else:
        processor.tokenizer.init_kwargs.pop(_SWITCH, None)


def is_causal(processor: ProcessorMixin) -> bool:
    """Return whether a processor belongs to a model that is causal inside pictures."""
    return processor.tokenizer.init_kwargs.get(_SWITCH) is False


def adapter_image_attention(adapter: Path) -> ImageAttention | None:
    """Return "causal" if an adapter was trained with it, else None, for the attention of its base."""
    path = adapter / "tokenizer_config.json"
    if not path.is_file() or json.loads(path.read_text(encoding="utf-8")).get(_SWITCH) is not False:
        return None
    return "causal"
