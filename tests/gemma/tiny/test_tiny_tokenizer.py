"""The tiny tokenizer writes any text, the same as SentencePiece, and adds a BOS as the real one does."""

from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, Gemma3Processor

from pokegemma.data.samples import find_control_token
from pokegemma.gemma.tiny import gemma3n_gemma4


@pytest.mark.parametrize("text", ["up\n\ndown", "Pokémon 東京 🎮", 'a "b"\tc  d', "\n\n\n\n"])
def test_the_tokenizer_gives_any_text_back(text: str, processor: Gemma3Processor) -> None:
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert processor.tokenizer.decode(ids, skip_special_tokens=True) == text


def test_every_special_token_of_all_families_is_known_to_the_data(
    processor: Gemma3Processor, tmp_path: Path, other_models: Callable[[str], Path]
) -> None:
    gemma3n = gemma3n_gemma4.write_gemma3n_processor(tmp_path)
    gemma4 = AutoTokenizer.from_pretrained(other_models("gemma4"))
    for tokenizer in (processor.tokenizer, gemma3n, gemma4):
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        assert len(special) >= 10
        assert [find_control_token(f"go {token} north") for token in special] == special


@pytest.mark.parametrize("text", ["HP <-|> MP", "a <--|> b", "<|> and <||>", "x<|-y"])
def test_arrows_are_no_control_tokens(text: str) -> None:
    assert find_control_token(text) is None


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(codec="utf-8"), max_size=100))
@example(text="Lv 5 to 10 in Rt 1")
@example(text="gqgqgq 東京 🎮 \x00\x7f \u200d é")
def test_a_token_has_at_least_one_byte(text: str, processor: Gemma3Processor) -> None:
    """The rule by which a goal of 200 bytes has at most 200 tokens; digits are split, unknown characters are bytes."""
    assert len(processor.tokenizer(text, add_special_tokens=False)["input_ids"]) <= len(text.encode())


def test_the_fast_tokenizer_agrees_with_sentencepiece(tiny_model: Path, processor: Gemma3Processor) -> None:
    reference = sentencepiece.SentencePieceProcessor(str(tiny_model / "tokenizer.model"))
    for text in ('{"button": "select", "reasoning": "the path leads up"}', "Goal: heal your Pokémon\nNext button?"):
        assert processor.tokenizer(text, add_special_tokens=False)["input_ids"] == reference.encode(text)


def test_the_tokenizer_adds_a_bos_by_itself_as_the_real_one_does(tiny_model: Path, processor: Gemma3Processor) -> None:
    for tokenizer in (processor.tokenizer, AutoTokenizer.from_pretrained(tiny_model)):
        hi = tokenizer("hi", add_special_tokens=False)["input_ids"]
        assert 2 not in hi
        assert tokenizer("hi")["input_ids"] == [2, *hi]
        assert tokenizer("<bos>hi")["input_ids"] == [2, 2, *hi]  # the real one: 2, 2, 2202


def test_the_tokenizers_of_other_families_add_a_bos_too(tmp_path: Path, other_models: Callable[[str], Path]) -> None:
    gemma3n_gemma4.write_gemma3n_processor(tmp_path)
    for folder in (tmp_path, other_models("gemma4")):
        assert AutoTokenizer.from_pretrained(folder)("<bos>hi")["input_ids"][:3].count(2) == 2
