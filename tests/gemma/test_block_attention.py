"""Attention in blocks of queries: the same masks as dense ones, and never a key too few."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pokegemma.gemma import block_attention
from pokegemma.gemma.attention_masks import TRUNK, attention_masks
from pokegemma.gemma.block_attention import BlockMasks, block_masks, cut_row


def make_row(pieces: list[list[int]], *, shared: bool) -> dict[str, list[int]]:
    """Return positions, branches and token types of a row: runs of text (odd numbers) and pictures (even numbers)."""
    positions, branches, types = [], [], []
    trunk = 0
    for number, runs in enumerate(pieces):
        branch = TRUNK if number == 0 or not shared else number
        start = len(positions) if branch == TRUNK else trunk
        for kind, run in enumerate(runs):
            types += [kind % 2] * run
        length = sum(runs)
        positions += range(start, start + length)
        branches += [branch] * length
        trunk = trunk if branch != TRUNK else len(positions)
    return {"positions": positions, "branches": branches, "token_type_ids": types}


def make_batch(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    length = max(len(row["positions"]) for row in rows)
    names = ("positions", "branches", "token_type_ids")
    batch = {name: torch.tensor([row[name] + [0] * (length - len(row[name])) for row in rows]) for name in names}
    batch["valid"] = torch.tensor(
        [[1] * len(row["positions"]) + [0] * (length - len(row["positions"])) for row in rows]
    )
    return batch


def as_dense(masks: BlockMasks, length: int) -> torch.Tensor:
    dense = torch.zeros(len(masks.rows), length, length, dtype=torch.bool)
    for row, blocks in zip(dense, masks.rows, strict=True):
        for block in blocks:
            keys = torch.cat([torch.arange(start, end) for start, end in block.keys])
            row[block.start : block.end, keys] = block.mask
    return dense


runs = st.lists(st.integers(1, 9), min_size=1, max_size=7).filter(lambda runs: len(runs) % 2 == 1)


@settings(deadline=None, max_examples=200)
@given(
    rows=st.lists(st.tuples(st.lists(runs, min_size=1, max_size=4), st.booleans()), min_size=1, max_size=3),
    window=st.integers(1, 40),
    queries=st.integers(1, 20),
)
def test_blocks_mean_what_dense_masks_mean(rows: list[tuple[list[list[int]], bool]], window: int, queries: int) -> None:
    batch = make_batch([make_row(pieces, shared=shared) for pieces, shared in rows])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_attention, "QUERIES_PER_BLOCK", queries)
        blocks = block_masks(**batch, window=window)
    dense = attention_masks(**batch, window=window, dtype=torch.bool)
    for kind, masks in blocks.items():
        expected = dense[kind][:, 0] & batch["valid"].bool()[:, :, None]  # padding asks nothing
        assert torch.equal(as_dense(masks, expected.shape[-1]), expected), kind


def test_blocks_leave_out_what_nobody_sees() -> None:
    row = make_row([[3000]], shared=False)
    blocks = block_masks(**make_batch([row]), window=1024)
    (full,), (sliding,) = blocks["full_attention"].rows, blocks["sliding_attention"].rows
    assert [(block.start, block.end) for block in full] == [(a, min(a + 512, 3000)) for a in range(0, 3000, 512)]
    assert [block.keys for block in full][-1] == ((0, 3000),)
    assert [block.keys for block in sliding][-1] == ((2560 - 1023, 3000),)
    assert sum(block.mask.numel() for block in sliding) < 0.5 * 3000**2


def test_a_branch_sees_the_trunk_and_itself() -> None:
    row = make_row([[10], [600], [20]], shared=True)
    blocks = block_masks(**make_batch([row]), window=1024)["full_attention"].rows[0]
    assert [block.keys for block in blocks] == [
        ((0, 10),),
        ((0, 10), (10, 522)),
        ((0, 10), (10, 610)),
        ((0, 10), (610, 630)),
    ]


def test_no_block_ends_inside_a_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_attention, "QUERIES_PER_BLOCK", 4)
    pictures = [-1, -1, -1, 0, 0, 0, -1, 1, 1, 2, 2]
    assert list(cut_row([0] * 11, pictures)) == [(0, 0, 6), (0, 6, 11)]
