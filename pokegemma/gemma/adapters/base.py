"""Open the base checkpoint that an adapter was trained on."""

import logging
from collections.abc import Callable

from pokegemma.errors import PokegemmaError
from pokegemma.gemma.adapters.reading import CONFIG_FILE, Adapter
from pokegemma.gemma.image_attention import adapter_image_attention
from pokegemma.gemma.loading import Checkpoint, open_checkpoint
from pokegemma.gemma.model_image_size import adapter_image_size
from pokegemma.gemma.text.checkpoint import TextCheckpoint

logger = logging.getLogger(__name__)


def open_base(
    adapter: Adapter,
    base: str | None = None,
    *,
    opener: Callable[..., Checkpoint | TextCheckpoint] = open_checkpoint,
) -> Checkpoint | TextCheckpoint:
    """Return the base checkpoint of an adapter, with the pictures that the adapter was trained on.

    Args:
        base: a folder or a Hub id; None: the one that the adapter names.
        opener: `open_checkpoint`, or `open_gemma` where a base without vision will do, too.

    Raises:
        PokegemmaError: the adapter names no base, it cannot be opened, or it is known to be another one.
    """
    named = adapter.config.base_model_name_or_path
    remedy = f"name it: scripts/merge_qlora.py --lora_path {adapter.path} --base_model BASE"
    if not (base or named):
        raise PokegemmaError(f"{adapter.path}: {CONFIG_FILE} names no base; {remedy}")
    pictures = {
        "image_size": adapter_image_size(adapter.path),
        "image_attention": adapter_image_attention(adapter.path),
    }
    try:
        checkpoint = opener(base or named, **pictures)
    except PokegemmaError as error:
        if base:
            raise
        raise PokegemmaError(f"{adapter.path}: its base cannot be used: {error}; {remedy}") from error
    trained_on = adapter.run.get("base_fingerprint")
    if not trained_on or checkpoint.has_fingerprint(str(trained_on)):
        return checkpoint
    recorded = adapter.run.get("base_model") or named
    try:
        quantised, unknown = opener(recorded).is_quantised, ""
    except PokegemmaError:
        quantised, unknown = False, ", which cannot be read; its config.json would show whether it is quantised"
    if not (base and quantised):
        raise PokegemmaError(
            f"{checkpoint.path} is not the base of this adapter, which was trained on {recorded}{unknown}"
        )
    logger.warning(
        "%s: trained on the quantised %s, with which %s cannot be compared", adapter.path, recorded, checkpoint.path
    )
    return checkpoint
