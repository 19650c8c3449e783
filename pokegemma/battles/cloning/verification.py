"""Recorded decisions on which a merged policy is compared with its adapter."""

from itertools import islice
from pathlib import Path
from typing import Any

from pokegemma.battles.cloning.batches import TrainingBatches
from pokegemma.battles.cloning.rows import make_rows
from pokegemma.battles.policy.checkpoint import open_policy
from pokegemma.battles.trajectories.packed import PackedTrajectories
from pokegemma.export.merge_logits import VerificationExamples


def recorded_decisions(adapter: Path, battles: Path, *, base: str | None, count: int) -> VerificationExamples:
    """Return the first decisions of packed trajectories, as the policy of an adapter reads them.

    Args:
        base: of the adapter; None: the one that it names.

    Raises:
        PokegemmaError: the adapter or the trajectories cannot be read.
    """
    policy, packed = open_policy(adapter, base=base), PackedTrajectories(battles)
    rows: list[Any] = list(islice(make_rows(packed, range(len(packed)), policy), count))
    return VerificationExamples(rows, TrainingBatches(policy.tokenizer.pad_token_id or 0))
