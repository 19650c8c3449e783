"""The eight buttons are told apart in the tokens of an answer."""

from pathlib import Path

import pytest
from transformers import Gemma3Processor

from pokegemma.data.prompts import BUTTONS, build_output
from pokegemma.gemma.button_tokens import ButtonTokens
from pokegemma.gemma.tiny import tokenizer as tiny_tokenizer


def test_button_tokens_tell_the_eight_buttons_apart(processor: Gemma3Processor) -> None:
    tokens = ButtonTokens.of(processor.tokenizer)
    assert processor.tokenizer.decode(tokens.prefix) == '{"button": "'
    for index, button in enumerate(BUTTONS):
        output = build_output(button=button, reasoning="the path", context="navigation")
        answer = processor.tokenizer(output, add_special_tokens=False)["input_ids"]
        found, start, end = tokens.locate(answer)
        assert (found, start) == (index, len(tokens.prefix))
        assert processor.tokenizer.decode(answer[start:end]) == button


def test_button_tokens_of_a_tokenizer_that_splits_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_tokenizer, "_VOCABULARY_SIZE", 330)
    tokenizer = tiny_tokenizer.train_tokenizer(tmp_path, seed=0)
    tokens = ButtonTokens.of(tokenizer)
    lengths = {button: len(branch) for button, branch in zip(BUTTONS, tokens.branches, strict=True)}
    assert lengths["start"] > 1 and lengths["select"] > 1  # both begin with s
    for index, button in enumerate(BUTTONS):
        output = build_output(button=button, reasoning="x", context="y")
        assert tokens.locate(tokenizer(output, add_special_tokens=False)["input_ids"])[0] == index


def test_an_answer_that_names_no_button_is_not_located(processor: Gemma3Processor) -> None:
    answer = processor.tokenizer('{"button": "jump"}', add_special_tokens=False)["input_ids"]
    with pytest.raises(ValueError, match="not an answer"):
        ButtonTokens.of(processor.tokenizer).locate(answer)
