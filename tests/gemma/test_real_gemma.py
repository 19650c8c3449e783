"""A real language model with a random vision tower: its tokens, the tokens of prompts and buttons, fast decisions."""

import shutil
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GemmaTokenizer,
)

from benchmarks.real_gemma_parts.decisions import PLAIN, compare, score_in_fast_ways
from benchmarks.real_gemma_parts.tokens import compare_estimates, read_back
from pokegemma.data import prompts
from pokegemma.data.samples import dataset_files, read_samples
from pokegemma.evaluation.predict import Predictor
from pokegemma.gemma.batches.collator import expand_pictures
from pokegemma.gemma.button_scores import place_branches, score_by_rows
from pokegemma.gemma.button_tokens import ButtonTokens
from pokegemma.gemma.gemma270m.vision import add_vision
from pokegemma.gemma.loading import open_checkpoint
from pokegemma.gemma.tiny.gemma3 import save_published
from pokegemma.gemma.vision_tower import encode_pictures
from tests.data.test_prompts import QUESTION_TOKENS, RULES, RULES_TOKENS

# --- with any language model


def test_a_text_model_with_a_vision_tower_reads_text_as_before(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copyfile(tiny_model / "tokenizer.model", tmp_path / "tokenizer.model")
    tokenizer, config = GemmaTokenizer.from_pretrained(tiny_model), open_checkpoint(tiny_model).config.text_config
    rows = len(tokenizer) - 1  # a model for text alone has no row for the soft token
    text = Gemma3ForCausalLM(Gemma3TextConfig.from_dict({**config.to_dict(), "vocab_size": rows})).eval()
    text.config.name_or_path = str(tiny_model)
    save_published(add_vision(text, tokenizer, image_size_px=56, num_image_tokens=4), tokenizer, tmp_path)
    assert str(tiny_model) not in (tmp_path / "config.json").read_text()
    checkpoint = open_checkpoint(tmp_path)
    model, ids = checkpoint.load_model(), torch.tensor([tokenizer("the path leads up")["input_ids"]])
    assert rows < len(tokenizer) <= model.config.text_config.vocab_size
    with torch.no_grad():
        expected, found = text(ids).logits, model(ids, token_type_ids=torch.zeros_like(ids)).logits
        assert found[..., :rows].numpy() == pytest.approx(expected.numpy(), abs=1e-5)
        num_new = found.shape[-1] - rows
        assert found[..., rows:].numpy() == pytest.approx(expected[..., -num_new:].numpy(), abs=1e-5)
        black, white = encode_pictures(model.model, torch.stack([torch.full((3, 56, 56), x) for x in (-1.0, 1.0)]))
    assert (black - white).norm() > 0.1 * black.norm()


# --- with the real one


@pytest.mark.real_gemma
@pytest.mark.slow(40)
def test_the_real_checkpoint_has_the_tokens_of_the_published_ones(real_gemma: Path) -> None:
    checkpoint, published = open_checkpoint(real_gemma), Gemma3Config()
    config, tokenizer = checkpoint.config, checkpoint.processor.tokenizer
    assert (config.text_config.hidden_size, config.text_config.num_hidden_layers) == (640, 18)
    assert (config.text_config.sliding_window, config.text_config.vocab_size) == (512, 262208)
    assert len(tokenizer) == 262145
    for name, token in (
        ("boi_token_index", "<start_of_image>"),
        ("eoi_token_index", "<end_of_image>"),
        ("image_token_index", "<image_soft_token>"),
    ):
        number = getattr(published, name)
        assert (getattr(config, name), tokenizer.convert_tokens_to_ids(token)) == (number, number)
    assert tokenizer("<bos>hi")["input_ids"] == [2, 2, 2202]


@pytest.mark.real_gemma
@pytest.mark.slow(5)
def test_each_button_is_one_token_that_scores_and_a_server_read(real_gemma: Path) -> None:
    tokenizer = open_checkpoint(real_gemma).processor.tokenizer
    tokens = ButtonTokens.of(tokenizer)
    assert tokenizer.convert_ids_to_tokens(list(tokens.prefix)) == ['{"', "button", '":', '▁"']
    assert [tokenizer.convert_ids_to_tokens(list(branch)) for branch in tokens.branches] == [
        [button] for button in prompts.BUTTONS
    ]
    assert place_branches(tokens)[0] == list(tokens.prefix)
    assert [read_back(tokenizer, tokens, button) for button in prompts.BUTTONS] == list(prompts.BUTTONS)


@pytest.mark.real_gemma
@pytest.mark.slow(8)
def test_the_estimate_is_above_the_tokens_of_every_recorded_text(real_gemma: Path, real_dataset: Path) -> None:
    tokenizer = open_checkpoint(real_gemma).processor.tokenizer
    samples = [sample for path in dataset_files(real_dataset) if path for sample in read_samples(path)]
    found = compare_estimates(tokenizer, samples)
    assert {name: texts["too_low"] for name, texts in found.items()} == {name: [] for name in found}
    assert len(tokenizer(RULES, add_special_tokens=False)["input_ids"]) == RULES_TOKENS
    longest = prompts.build_question(["select"] * prompts.MAX_PREVIOUS_BUTTONS)
    assert len(tokenizer(longest, add_special_tokens=False)["input_ids"]) <= QUESTION_TOKENS
    assert found["prompt"]["most"] <= prompts.MAX_PROMPT_TOKENS


@pytest.mark.real_gemma
@pytest.mark.slow(20)
def test_fast_decisions_are_those_of_plain_passes(real_gemma: Path, toy_dataset: Path) -> None:
    samples = read_samples(toy_dataset / "train.jsonl")
    session = next(list(group) for _, group in groupby(samples, key=lambda sample: sample.session))[:3]
    checkpoint = open_checkpoint(real_gemma)
    collator = checkpoint.collator(layout="frames", dataset_folder=toy_dataset)
    batches = [collator.prompts([sample]) for sample in session]
    stock = Gemma3ForConditionalGeneration.from_pretrained(real_gemma).eval()
    plain = [score_by_rows(stock, expand_pictures(batch), collator.button_tokens) for batch in batches]
    expected = torch.cat(plain).double().numpy()
    assert np.ptp(expected, axis=0).max() > 1e-4  # decisions that differ: else any of them would do
    del stock
    fast = score_in_fast_ways(Predictor(checkpoint.load_model(), collator), session, batches)
    assert PLAIN not in fast and len(fast) == 4
    assert max(compare(found, expected)["largest"] for found in fast.values()) < 1e-4
