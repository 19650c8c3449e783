"""What the trainer counts: answers in labels, right buttons and losses a row of the dataset."""

from types import SimpleNamespace

import pytest
import torch

from pokegemma.gemma.button_tokens import ButtonTokens
from pokegemma.training.trainer import PokemonTrainer, find_answers

TOKENS = ButtonTokens(prefix=(7,), branches=tuple((number, 9) for number in range(10, 18)))
ANSWER = [7, 12, 9, 50]  # prefix, the two tokens of a button, and some text


def labels_of(rows: list[list[list[int]]]) -> torch.Tensor:
    """Return labels (rows, 16) with answers that have two unlabelled tokens before each."""
    labels = torch.full((len(rows), 16), -100)
    for row, answers in zip(labels, rows, strict=True):
        start = 0
        for answer in answers:
            start += 2
            row[start : start + len(answer)] = torch.tensor(answer)
            start += len(answer)
    return labels


def test_answers_are_counted_in_reading_order() -> None:
    rows, starts, ends = find_answers(labels_of([[ANSWER, ANSWER[:3]], [], [[5] * 14]]))
    assert rows.tolist() == [0, 0, 2]
    assert starts.tolist() == [2, 8, 2]
    assert ends.tolist() == [6, 11, 16]


@pytest.mark.parametrize("layout", ["grid", "trajectory"])
def test_a_button_is_correct_if_all_its_tokens_are(layout: str) -> None:
    labels = labels_of([[ANSWER, ANSWER], [ANSWER]])
    is_top1 = torch.zeros(2, 15, dtype=torch.bool)  # of the next token
    is_top1[0, 8:10] = True  # both button tokens of the second answer
    is_top1[1, 2] = True  # one of two of the third
    log_probs = torch.zeros(2, 15)
    log_probs[0, 1:5] = -1.0  # the first answer
    log_probs[1, 1:5] = -0.5
    trainer = SimpleNamespace(data_collator=SimpleNamespace(button_tokens=TOKENS, layout=layout))
    outputs = SimpleNamespace(is_top1=is_top1, log_probs=log_probs)
    scores = PokemonTrainer._score(trainer, {"labels": labels}, outputs).tolist()
    answers = [[0, 1, 4, 4], [1, 1, 0, 4], [0, 1, 2, 4]]  # correct buttons, decisions, loss, tokens
    if layout == "grid":  # each answer is a row of the dataset
        assert scores == answers
    else:
        assert scores == [[1, 2, 4, 8], [0, 1, 2, 4]]
