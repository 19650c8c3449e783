"""The training loop of the tutorials counts what it says that it counts."""

from dataclasses import replace

import pytest

from docs.tutorials.quick_training import _importance
from pokegemma.data.prompts import BUTTONS, answer_button
from pokegemma.gemma.batches.collator import IGNORED_LABEL


@pytest.mark.parametrize("samples_per_row", [1, 4])
def test_the_first_token_of_each_button_counts_as_one(make_collator, samples, samples_per_row):
    collator = replace(make_collator("frames"), samples_per_row=samples_per_row)
    batch = collator(samples[:8])
    importance = _importance(batch["labels"], collator, 0.25)
    branches = collator.button_tokens.branches
    expected = [branches[BUTTONS.index(answer_button(sample.output))][0] for sample in samples[:8]]
    assert batch["labels"][importance == 1].tolist() == expected
    num_answer_tokens = int((batch["labels"] != IGNORED_LABEL).sum())
    assert int((importance == 0.25).sum()) == num_answer_tokens - 8
    assert set(importance.unique().tolist()) == {0, 0.25, 1}
