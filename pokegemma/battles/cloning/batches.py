"""Batches of decisions: for training, and for scoring the 13 actions."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pokegemma.battles.cloning.rows import ActionRow, unpack_legal
from pokegemma.gemma.batches.collator import IGNORED_LABEL


@dataclass
class TrainingBatches:
    """Collate rows for training: the loss is on the action only.

    Returns input_ids, attention_mask, position_ids and labels, each (rows, length). Labels are -100 except for the
    answer's tokens, which are at the ends of all rows: padding is at their beginnings.
    """

    pad_id: int

    def __call__(self, rows: Sequence[ActionRow]) -> dict[str, torch.Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        batch = {
            name: torch.full((len(rows), length), value)
            for name, value in (("input_ids", self.pad_id), ("attention_mask", 0), ("labels", IGNORED_LABEL))
        }
        for place, row in enumerate(rows):
            ids, num_answer = torch.tensor(row["input_ids"]), row["num_answer"]
            batch["input_ids"][place, -len(ids) :] = ids
            batch["attention_mask"][place, -len(ids) :] = 1
            batch["labels"][place, -num_answer:] = ids[-num_answer:]
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        return batch


@dataclass
class ScoringBatches:
    """Collate rows for scoring: input_ids (rows, length) of the prompts, their lengths, actions, legal (rows, 13)."""

    pad_id: int

    def __call__(self, rows: Sequence[ActionRow]) -> dict[str, torch.Tensor]:
        prompts = [row["input_ids"][: -row["num_answer"]] for row in rows]
        length = max(map(len, prompts))
        return {
            "input_ids": torch.tensor([[*row, *[self.pad_id] * (length - len(row))] for row in prompts]),
            "lengths": torch.tensor(list(map(len, prompts))),
            "actions": torch.tensor([row["action"] for row in rows]),
            "legal": torch.stack([torch.from_numpy(unpack_legal(row["legal"])) for row in rows]),
        }
