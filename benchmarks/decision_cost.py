"""What a decision costs at least, by arithmetic: operations and bytes of Gemma 3 over a machine's rates."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import Gemma3Config

GEMMA_3_4B = Gemma3Config(
    text_config={
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 1024,
        "vocab_size": 262208,
    },
    vision_config={
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 896,
        "patch_size": 14,
        "vision_use_head": False,
    },
    mm_tokens_per_image=256,
)
"""The shape of google/gemma-3-4b-it."""


@dataclass(frozen=True)
class Pass:
    """One forward pass: operations (a multiplication and an addition are two), and bytes read and written at least.

    At least: every weight once, every cached key and value once, new ones written once; nothing for activations.
    """

    flop: float
    bytes: float


@dataclass(frozen=True)
class Rates:
    """What a machine does at most: operations a second in matrix products, and bytes a second from memory."""

    flop_per_s: float
    bytes_per_s: float

    def floor_s(self, passes: Sequence[Pass]) -> float:
        """Return the seconds that passes, one after the other, take at least: each what it has more of."""
        return sum(max(one.flop / self.flop_per_s, one.bytes / self.bytes_per_s) for one in passes)


def picture_pass(config: Gemma3Config, *, num_pictures: int = 1, bytes_per_weight: float = 2) -> Pass:
    """Return the cost of the tower and the projector for pictures of the config's size, all in one pass."""
    vision, width = config.vision_config, config.vision_config.hidden_size
    patches = (vision.image_size // vision.patch_size) ** 2
    patch_weights = 3 * vision.patch_size**2 * width
    layer_weights = 4 * width**2 + 2 * width * vision.intermediate_size
    projector = width * config.text_config.hidden_size
    attention = 4 * patches**2 * width  # queries times keys, and weights times values
    tower = 2 * patches * patch_weights + vision.num_hidden_layers * (2 * patches * layer_weights + attention)
    weights = patch_weights + vision.num_hidden_layers * layer_weights + projector
    return Pass(num_pictures * (tower + 2 * config.mm_tokens_per_image * projector), bytes_per_weight * weights)


def text_pass(
    config: Gemma3Config,
    num_tokens: int,
    *,
    num_cached: int = 0,
    num_logits: int = 1,
    bytes_per_weight: float = 2,
    bytes_per_value: float = 2,
) -> Pass:
    """Return the cost of `num_tokens` in the language model after `num_cached` whose keys and values are there.

    Every token is counted as looking at all tokens of the row, as dense masks let it, in sliding layers at no more
    than the window before the new ones.

    Args:
        num_logits: places at which the whole vocabulary is scored.
        bytes_per_weight: 2 in bfloat16; 4.5 / 8 with 4 bits a weight and a 16-bit scale for each 32.
        bytes_per_value: of keys and values.
    """
    text = config.get_text_config()
    width, keys = text.hidden_size, text.num_key_value_heads * text.head_dim
    queries = text.num_attention_heads * text.head_dim
    layer = 2 * width * queries + 2 * width * keys + 3 * width * text.intermediate_size
    layers = text.num_hidden_layers
    head = width * text.vocab_size
    seen = [
        min(num_cached, text.sliding_window) if kind == "sliding_attention" else num_cached for kind in text.layer_types
    ]
    attention = sum(4 * num_tokens * (before + num_tokens) * queries for before in seen)
    cache = sum(2 * keys * (before + num_tokens) for before in seen)
    return Pass(
        flop=2 * num_tokens * layers * layer + attention + 2 * num_logits * head,
        bytes=bytes_per_weight * (layers * layer + head) + bytes_per_value * cache,
    )


def generation_passes(
    config: Gemma3Config, num_prompt: int, num_written: int, *, num_cached: int = 0, **options: float
) -> list[Pass]:
    """Return the passes of the language model that write `num_written` tokens, one after the other.

    Args:
        num_prompt: tokens of the prompt after the `num_cached` that are there.
        options: of `text_pass`.
    """
    end = num_cached + num_prompt
    return [
        text_pass(config, num_prompt, num_cached=num_cached, **options),
        *(text_pass(config, 1, num_cached=end + at, **options) for at in range(num_written - 1)),
    ]
