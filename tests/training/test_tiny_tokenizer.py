"""The tiny tokenizer writes any text, and the same as SentencePiece."""

from pathlib import Path

import pytest
import sentencepiece
from transformers import Gemma3Processor


@pytest.mark.parametrize("text", ["up\n\ndown", "Pokémon 東京 🎮", 'a "b"\tc  d', "\n\n\n\n"])
def test_the_tokenizer_gives_any_text_back(text: str, processor: Gemma3Processor) -> None:
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert processor.tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_fast_tokenizer_agrees_with_sentencepiece(tiny_model: Path, processor: Gemma3Processor) -> None:
    reference = sentencepiece.SentencePieceProcessor(str(tiny_model / "tokenizer.model"))
    for text in ('{"button": "select", "reasoning": "the path leads up"}', "Goal: heal your Pokémon\nNext button?"):
        assert processor.tokenizer(text, add_special_tokens=False)["input_ids"] == reference.encode(text)
