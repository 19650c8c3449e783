"""Whether the tokens of a picture see all of it, as Gemma 3 was trained, or only what comes before them.

mlx-vlm computes the second, whatever the model was trained on: a model for it is trained that way from the start. What
a model was trained on is its own property. A checkpoint says it in config.json, an adapter in the tokenizer's config
beside it, by the switch that keeps transformers' own processor from making `token_type_ids`: without these,
transformers is causal, too, so that its `generate` and `transformers serve` need not be told.
"""

import json
from pathlib import Path
from typing import Literal, get_args

from transformers import PreTrainedConfig, ProcessorMixin

from pokegemma.errors import PokegemmaError

ImageAttention = Literal["bidirectional", "causal"]

_SWITCH = "return_mm_token_type_ids"  # of a processor's call; read from the tokenizer's config up to transformers 5.28


def trained_attention(config: PreTrainedConfig) -> ImageAttention:
    """Return what a Gemma 3 was trained on, by its config; published checkpoints say nothing, and are bidirectional."""
    return getattr(config, "image_attention", "bidirectional")


def attention_facts(config: PreTrainedConfig) -> dict[str, ImageAttention]:
    """Return what records say of a model's attention inside pictures: nothing where it is as published."""
    return {"image_attention": "causal"} if trained_attention(config) == "causal" else {}


def change_config(config: PreTrainedConfig, asked: ImageAttention) -> None:
    """Make the config of a Gemma 3 say `asked`.

    Raises:
        PokegemmaError: there is no such attention, or the model was trained to be causal and is asked for more.
    """
    if asked not in get_args(ImageAttention):  # values from YAML bypass the options' own check
        raise PokegemmaError(f"--image_attention {asked}: not one of {', '.join(get_args(ImageAttention))}")
    if asked == "causal":
        config.image_attention = asked
    elif trained_attention(config) != asked:
        raise PokegemmaError(
            f"--image_attention {asked}: {config.name_or_path or 'the model'} was trained to be causal; leave it out"
        )


def change_processor(processor: ProcessorMixin, attention: ImageAttention) -> None:
    """Make the processor of a Gemma 3 tell the model nothing, or again, of where pictures are, also once saved."""
    if attention == "causal":
        processor.tokenizer.init_kwargs[_SWITCH] = False
    else:
        processor.tokenizer.init_kwargs.pop(_SWITCH, None)


def is_causal(processor: ProcessorMixin) -> bool:
    """Return whether a processor is that of a model which is causal inside pictures."""
    return processor.tokenizer.init_kwargs.get(_SWITCH) is False


def adapter_image_attention(adapter: Path) -> ImageAttention | None:
    """Return "causal" if an adapter was trained so, else None: as its base is."""
    path = adapter / "tokenizer_config.json"
    if not path.is_file() or json.loads(path.read_text(encoding="utf-8")).get(_SWITCH) is not False:
        return None
    return "causal"
