"""Attention over long rows of Gemma 3 in blocks of queries, each with only the keys that it can see.

A trajectory has thousands of tokens, of which five layers of six see 1,024, and samples that share a row do not see
each other. With one dense mask, most of what is computed would be hidden again, and the mask would take the square of
the row's length in memory. A block is plain scaled dot-product attention on slices, so the result is the same.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from pokegemma.gemma.attention_masks import TRUNK, number_pictures, visible_keys

BLOCK_ATTENTION = "blockwise"
"""Value of `_attn_implementation`: sdpa that also takes `BlockMasks`."""

QUERIES_PER_BLOCK = 512

Range = tuple[int, int]


@dataclass(frozen=True)
class Block:
    """Queries [start, end) of a row, the ranges of keys that they need, and which of these each query sees (bool)."""

    start: int
    end: int
    keys: tuple[Range, ...]
    mask: torch.Tensor


@dataclass(frozen=True)
class BlockMasks:
    """The blocks of each row of a batch, for one kind of layer."""

    rows: tuple[tuple[Block, ...], ...]


def cut_row(branches: list[int], pictures: list[int]) -> Iterator[tuple[int, int, int]]:
    """Yield (start of the branch, start, end) of blocks of queries, in order; none ends inside a picture (not -1)."""
    begin, length = 0, len(branches)
    while begin < length:
        stop = next((at for at in range(begin, length) if branches[at] != branches[begin]), length)
        start = begin
        while start < stop:
            end = min(start + QUERIES_PER_BLOCK, stop)
            while end < stop and pictures[end - 1] == pictures[end] != -1:
                end += 1
            yield begin, start, end
            start = end
        begin = stop


def block_masks(
    *,
    positions: torch.Tensor,
    branches: torch.Tensor,
    token_type_ids: torch.Tensor,
    valid: torch.Tensor,
    window: int,
) -> dict[str, BlockMasks]:
    """Return masks for both kinds of text layer that mean what `attention_masks.attention_masks` means, in blocks.

    Args: as there; a row is its trunk, then branch after branch, padded on the right.
    """
    full, sliding = [], []
    pictures, lengths = number_pictures(token_type_ids), valid.sum(1).tolist()
    for row, length in enumerate(lengths):
        vectors = {
            "positions": positions[row, :length],
            "branches": branches[row, :length],
            "pictures": pictures[row, :length],
        }
        on_cpu = {name: vector.tolist() for name, vector in vectors.items()}
        trunk = on_cpu["branches"].count(TRUNK)
        whole, near = [], []
        for begin, start, end in cut_row(on_cpu["branches"], on_cpu["pictures"]):
            first = on_cpu["positions"][start] - window + 1  # the farthest position that a sliding layer looks back to
            whole.append(_block(vectors, start, end, _ranges(trunk, begin, end, 0)))
            near.append(_block(vectors, start, end, _ranges(trunk, begin, end, first), window=window))
        full.append(tuple(whole))
        sliding.append(tuple(near))
    return {"full_attention": BlockMasks(tuple(full)), "sliding_attention": BlockMasks(tuple(sliding))}


def _ranges(trunk: int, begin: int, end: int, first: int) -> tuple[Range, ...]:
    """Return the keys from position `first` on, for queries up to `end` of the branch that starts at `begin`.

    Positions count from the beginning of the trunk, and go on from its end in each branch.
    """
    if begin < trunk:
        return ((max(first, 0), end),)
    own = (begin + max(first - trunk, 0), end)
    return ((max(first, 0), trunk), own) if max(first, 0) < trunk else (own,)


def _block(
    vectors: dict[str, torch.Tensor], start: int, end: int, ranges: tuple[Range, ...], *, window: int | None = None
) -> Block:
    keys = {name: torch.cat([vector[a:b] for a, b in ranges]) for name, vector in vectors.items()}
    queries = {name: vector[start:end] for name, vector in vectors.items()}
    return Block(start, end, ranges, visible_keys(queries, keys, window=window))


def blockwise_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | BlockMasks | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as transformers' sdpa does; with `BlockMasks`, block by block. Padding gets zeros.

    Args:
        query: (batch, heads, length, head size).
        key: (batch, key heads, length, head size), like `value`.

    Returns:
        (batch, length, heads, head size), and None for the weights.
    """
    if not isinstance(attention_mask, BlockMasks):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    groups, length = module.num_key_value_groups, query.shape[2]
    rows = []
    for row, blocks in enumerate(attention_mask.rows):
        parts = []
        for block in blocks:
            keys, values = (
                repeat_kv(torch.cat([states[row : row + 1, :, a:b] for a, b in block.keys], 2), groups)
                for states in (key, value)
            )
            parts.append(
                scaled_dot_product_attention(
                    query[row : row + 1, :, block.start : block.end],
                    keys,
                    values,
                    attn_mask=block.mask[None, None],
                    dropout_p=options.get("dropout", 0.0),
                    scale=options.get("scaling"),
                )
            )
        attended = torch.cat(parts, 2)
        rows.append(pad(attended, (0, 0, 0, length - attended.shape[2])))
    return torch.cat(rows).transpose(1, 2).contiguous(), None


AttentionInterface.register(BLOCK_ATTENTION, blockwise_attention)
AttentionMaskInterface.register(BLOCK_ATTENTION, sdpa_mask)
