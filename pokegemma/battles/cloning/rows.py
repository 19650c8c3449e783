"""The decisions of packed trajectories as rows of a memory-mapped dataset, tokenized once."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypedDict

import numpy as np
from accelerate import PartialState
from datasets import Dataset, Features, List, Value
from datasets.exceptions import DatasetGenerationError

from pokegemma.battles.cloning.options import CloningOptions
from pokegemma.battles.cloning.selection import SplitName, select_battles
from pokegemma.battles.policy.checkpoint import PolicyCheckpoint
from pokegemma.battles.policy.prompts import ANSWERS, read_texts
from pokegemma.battles.trajectories.actions import NUM_ACTIONS
from pokegemma.battles.trajectories.packed import PackedTrajectories
from pokegemma.battles.trajectories.records import NO_ACTION
from pokegemma.errors import PokegemmaError

_FEATURES = Features(
    {"input_ids": List(Value("int32")), "num_answer": Value("int32"), "action": Value("int8"), "legal": Value("int16")}
)


class ActionRow(TypedDict):
    """One decision: the tokens of prompt and answer, how many of them are the answer, the action, the legal ones.

    `legal` is a number whose bit A is 1 where action A is legal.
    """

    input_ids: list[int]
    num_answer: int
    action: int
    legal: int


def pack_legal(legal: np.ndarray) -> int:
    """Return (13,) bool as a number."""
    return int((legal.astype(np.int64) << np.arange(NUM_ACTIONS)).sum())


def unpack_legal(number: int) -> np.ndarray:
    """Return what `pack_legal` packed, (13,) bool."""
    return (number >> np.arange(NUM_ACTIONS)) & 1 == 1


def make_rows(battles: PackedTrajectories, indices: Iterable[int], checkpoint: PolicyCheckpoint) -> Iterator[ActionRow]:
    """Yield a row for each decision that teaches something.

    Actions that were never revealed are left out, and so are decisions with one legal action.
    """
    answers = checkpoint.tokenizer(list(ANSWERS), add_special_tokens=False)["input_ids"]
    for index in indices:
        battle = battles[index]
        texts = read_texts(battles, index, checkpoint.text)
        used = [
            place
            for place, action in enumerate(battle.actions[:-1].tolist())
            if action != NO_ACTION and battle.legal[place].sum() > 1
        ]
        prompts = checkpoint.encode([texts[place] for place in used])
        for place, prompt in zip(used, prompts, strict=True):
            action = int(battle.actions[place])
            answer = answers[action]
            yield ActionRow(
                input_ids=[*prompt, *answer],
                num_answer=len(answer),
                action=action,
                legal=pack_legal(battle.legal[place]),
            )


def load_rows(
    battles: PackedTrajectories,
    options: CloningOptions,
    checkpoint: PolicyCheckpoint,
    split: SplitName,
    *,
    cache_dir: Path,
) -> Dataset:
    """Return the rows of a split as a memory-mapped dataset, which the first process writes.

    Raises:
        PokegemmaError: the split has no decision to learn from.
    """

    def rows(**cache_key: str) -> Iterator[ActionRow]:
        is_empty = True
        indices = select_battles(battles, options.battle_filter(), eval_fraction=options.eval_fraction, split=split)
        for row in make_rows(battles, indices, checkpoint):
            yield row
            is_empty = False
        if is_empty:  # datasets (5.2) would report that an instruction corresponds to no data
            raise PokegemmaError(
                f"no decision to {'learn from' if split == 'train' else 'evaluate on'}; change --won_only, "
                "--min_rating, --formats, --since, --until or --eval_fraction"
            )

    key = {"split": split, "content": battles.digest(), "options": repr(options), "model": checkpoint.path}
    with PartialState().main_process_first():
        try:
            return Dataset.from_generator(rows, features=_FEATURES, gen_kwargs=key, cache_dir=str(cache_dir))
        except DatasetGenerationError as error:
            raise PokegemmaError(f"{options.trajectories_dir}: {error.__cause__}") from error


def spread(dataset: Dataset, most: int) -> Dataset:
    """Return at most `most` rows of a dataset, evenly spread."""
    if len(dataset) <= most:
        return dataset
    return dataset.select(np.linspace(0, len(dataset) - 1, most).astype(int).tolist())
