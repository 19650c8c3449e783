"""Compare every tensor of a merged checkpoint, as it is on disk, with its base and the adapter."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from pokegemma.errors import CheckFailedError, PokegemmaError
from pokegemma.export.merge_limits import UNEXPLAINED_CHANGE, WEIGHT_NOISE
from pokegemma.gemma.adapters.reading import Adapter, name_some
from pokegemma.gemma.model_image_size import interpolate_positions
from pokegemma.gemma.text.checkpoint import open_gemma
from pokegemma.gemma.weight_files import EMBEDDINGS, HEAD, StoredTensor, plain_name, tensors_by_name


def weight_names(model: PreTrainedModel) -> set[str]:
    """Return the plain names of a model's weights."""
    return {plain_name(name) for name in model.state_dict()}


def require_weights(base: str, names: set[str]) -> None:
    """Refuse a base whose files lack weights of the model: transformers would draw them at random, with a warning.

    Args:
        names: what `weight_names` returned for it.

    Raises:
        PokegemmaError: it does, or it has no safetensors files, with which the result is compared.
    """
    stored = tensors_by_name(base).keys()
    missing = sorted(names - stored - ({HEAD} if EMBEDDINGS in stored else set()))
    if missing:
        raise PokegemmaError(
            f"{base}: its files lack {len(missing)} of the model's {len(names)} tensors: {name_some(missing)}; "
            "take a whole checkpoint"
        )


@dataclass(frozen=True)
class WeightCounts:
    """How many tensors of a merged checkpoint are changed by the adapter, and how many are those of the base."""

    changed: int
    unchanged: int


def check_merged_weights(folder: Path, base: str, adapter: Adapter, names: set[str]) -> WeightCounts:
    """Check that a merged checkpoint contains the base's weights, changed by the adapter and nothing else.

    What is expected of each tensor follows from the files of base and adapter alone, without PEFT. A tied LM head is
    compared, too: as its own weight, it is the base's unless the adapter changes it.

    Args:
        names: what `weight_names` returned for the model that was written.

    Raises:
        CheckFailedError: a tensor is missing, left over, or another one than expected; or the adapter changes nothing.
        PokegemmaError: the base contains NaN or infinity.
    """
    stored = tensors_by_name(folder)
    tied = HEAD not in stored
    if tied is not bool(open_gemma(folder).config.tie_word_embeddings):
        raise CheckFailedError(f"merged weights: {HEAD} is {'missing' if tied else 'there'}, config.json differs")
    if wrong := sorted(stored.keys() ^ (names - {HEAD} if tied else names)):
        raise CheckFailedError(
            f"merged weights: {len(wrong)} tensors are missing or not the model's: {name_some(wrong)}"
        )
    originals = tensors_by_name(base)
    different, num_changed = [], 0
    for name in sorted(names):
        source = name if name != HEAD or HEAD in originals else EMBEDDINGS
        target = name if name in stored else EMBEDDINGS
        changed, same = _compare(name, originals[source], stored[target], adapter)
        num_changed += changed
        if not same and not originals[source].read().isfinite().all():
            raise PokegemmaError(f"{base}: {originals[source].name} contains NaN or infinity; take a sound checkpoint")
        if not same:
            different.append(name)
    if different:
        raise CheckFailedError(
            f"merged weights: {len(different)} of {len(names)} tensors are not base + adapter: {name_some(different)}"
        )
    if not num_changed:
        raise CheckFailedError("the adapter changes nothing; was it trained?")
    return WeightCounts(num_changed, len(names) - num_changed)


def _compare(name: str, original: StoredTensor, merged: StoredTensor, adapter: Adapter) -> tuple[bool, bool]:
    """Return whether the adapter changes a tensor in the type it is stored in, and whether it is as expected."""
    weight, found = original.read(), merged.read()
    if name.endswith("position_embedding.weight") and weight.shape != found.shape:  # merged for another picture size
        weight = interpolate_positions(weight.float(), math.isqrt(len(found)))
    before = weight.to(found.dtype)
    layer = adapter.layers.get(name.removesuffix(".weight"))
    if layer is None or not name.endswith(".weight"):
        expected = adapter.full.get(name, weight).to(found.dtype)
        return not torch.equal(expected, before), torch.equal(expected, found)
    expected = layer.merge_into(weight.float()).to(found.dtype).float()
    change, error = torch.dist(expected, before.float()), torch.dist(expected, found.float())
    noise = WEIGHT_NOISE[str(found.dtype).removeprefix("torch.")] * torch.linalg.vector_norm(expected)
    return bool(change), bool(error <= UNEXPLAINED_CHANGE * change + noise)
