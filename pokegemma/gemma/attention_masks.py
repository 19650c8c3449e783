"""Attention masks of Gemma 3 for rows of several samples or answers, for which those of transformers are wrong.

For samples packed one after the other, transformers (5.23) looks up a token's picture by its place in the row. In
sliding layers it has replaced the place by the position within the sample, so every sample after the first one gets the
pictures of the first. This came with https://github.com/huggingface/transformers/pull/46850; we have found no report.
TRL refuses to pack pictures: https://github.com/huggingface/trl/issues/4339. A beginning that several samples share
cannot be expressed there at all.
"""

import torch
from transformers import PreTrainedModel
from transformers.models.gemma3.modeling_gemma3 import get_block_sequence_ids_for_mask

from pokegemma.errors import PokegemmaError

TRUNK = 0
"""Number of the branch that all other branches continue."""


def attention_masks(
    *,
    positions: torch.Tensor,
    branches: torch.Tensor,
    token_type_ids: torch.Tensor,
    valid: torch.Tensor,
    window: int,
    dtype: torch.dtype,
    num_queries: int | None = None,
) -> dict[str, torch.Tensor]:
    """Return masks (batch, 1, queries, length) for both kinds of text layer.

    A token sees all tokens with lower positions on the trunk or its own branch, and all of its own picture. In a
    sliding layer it sees the last `window` positions of these. For a plain row, which is all trunk, these are the masks
    of transformers.

    Args:
        positions: (batch, length) int64, within the sample.
        branches: (batch, length) int64, `TRUNK` or the number of the branch that a token belongs to.
        token_type_ids: (batch, length), 1 at the soft tokens of pictures.
        valid: (batch, length), 0 at padding.
        dtype: bool for masks that are True where a token sees, a floating type for masks to add; see `mask_dtype`.
        num_queries: number of tokens at the end of the row that get masks; the others are in a cache.
    """
    length = positions.shape[1]
    queries = slice(length - (num_queries or length), length)
    keys = {"positions": positions, "branches": branches, "pictures": number_pictures(token_type_ids)}
    asking = {name: vector[:, queries] for name, vector in keys.items()}
    is_token = valid.bool()[:, None, :]
    itself = torch.eye(length, dtype=torch.bool, device=positions.device)[queries]  # padding must see something

    def mask(window: int | None) -> torch.Tensor:
        allowed = ((visible_keys(asking, keys, window=window) & is_token) | itself)[:, None]
        if dtype == torch.bool:
            return allowed
        return torch.zeros_like(allowed, dtype=dtype).masked_fill_(~allowed, torch.finfo(dtype).min)

    return {"full_attention": mask(None), "sliding_attention": mask(window)}


def number_pictures(token_type_ids: torch.Tensor) -> torch.Tensor:
    """Return (batch, length) int64: which picture of its row a soft token belongs to, -1 elsewhere."""
    return get_block_sequence_ids_for_mask(token_type_ids)


def visible_keys(
    queries: dict[str, torch.Tensor], keys: dict[str, torch.Tensor], *, window: int | None
) -> torch.Tensor:
    """Return (..., queries, keys) bool: which keys a query sees in a layer with a window of positions, or without one.

    Args:
        queries: `positions`, `branches` and `pictures`, each (..., queries).
        keys: the same, (..., keys).
    """
    asking = {name: vector[..., :, None] for name, vector in queries.items()}
    asked = {name: vector[..., None, :] for name, vector in keys.items()}
    related = (asked["branches"] == TRUNK) | (asked["branches"] == asking["branches"])
    same_picture = (asked["pictures"] == asking["pictures"]) & (asking["pictures"] >= 0)
    visible = ((asked["positions"] <= asking["positions"]) & related) | same_picture
    return visible if window is None else visible & (asked["positions"] > asking["positions"] - window)


def mask_dtype(model: PreTrainedModel) -> torch.dtype:
    """Return the type of mask that a model's attention takes: bool for sdpa, else the type it computes in.

    Raises:
        PokegemmaError: it takes neither.
    """
    attention, device = model.config.get_text_config()._attn_implementation, model.device.type
    if attention in ("sdpa", "blockwise"):
        return torch.bool
    if attention != "eager":
        raise PokegemmaError(f"attention {attention!r} takes no custom masks; use --attn_implementation sdpa or eager")
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype
