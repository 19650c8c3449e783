"""The arithmetic of a decision's cost against operations and bytes that were counted."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, Gemma3ForConditionalGeneration

from benchmarks.decision_cost import GEMMA_3_4B, Pass, Rates, generation_passes, picture_pass, text_pass
from pokegemma.gemma.loading import open_checkpoint


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Gemma3ForConditionalGeneration:
    """Return a tiny model whose attention is matrix products, which the counter knows on a CPU."""
    return open_checkpoint(tiny_model).load_model(attn_implementation="eager")


@pytest.mark.parametrize("num_pictures", [1, 3])
def test_the_operations_of_a_picture_are_those_counted(
    model: Gemma3ForConditionalGeneration, num_pictures: int
) -> None:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model.get_image_features(torch.zeros(num_pictures, 3, 56, 56))
    assert picture_pass(model.config, num_pictures=num_pictures).flop == counter.get_total_flops() > 0


@pytest.mark.parametrize(("num_cached", "num_tokens", "num_logits"), [(0, 40, 1), (0, 40, 40), (25, 30, 9), (50, 1, 1)])
def test_the_operations_of_tokens_are_those_counted(
    model: Gemma3ForConditionalGeneration, num_cached: int, num_tokens: int, num_logits: int
) -> None:
    assert num_cached < model.config.text_config.sliding_window
    cache = DynamicCache()
    with torch.no_grad():
        if num_cached:
            model(input_ids=torch.ones(1, num_cached, dtype=torch.long), past_key_values=cache)
        with FlopCounterMode(display=False) as counter:
            ids = torch.ones(1, num_tokens, dtype=torch.long)
            model(input_ids=ids, past_key_values=cache, logits_to_keep=num_logits)
    expected = text_pass(model.config, num_tokens, num_cached=num_cached, num_logits=num_logits)
    assert expected.flop == counter.get_total_flops()


def test_the_bytes_are_those_of_the_matrices_and_of_the_cache(model: Gemma3ForConditionalGeneration) -> None:
    def matrices(module: torch.nn.Module) -> int:
        return sum(
            weight.numel() for name, weight in module.named_parameters() if weight.ndim > 1 and "pos" not in name
        )

    tower = matrices(model.model.vision_tower) + matrices(model.model.multi_modal_projector)
    assert picture_pass(model.config, num_pictures=5, bytes_per_weight=4).bytes == 4 * tower
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=torch.ones(1, 30, dtype=torch.long), past_key_values=cache)
    cached = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    text = text_pass(model.config, 10, num_cached=20, bytes_per_weight=0.5, bytes_per_value=4)
    assert text.bytes == 0.5 * matrices(model.model.language_model) + 4 * cached  # the embedding is the head


def test_a_sliding_layer_looks_back_its_window_only() -> None:
    near, far = (text_pass(GEMMA_3_4B, 1, num_cached=cached) for cached in (1024, 5024))
    assert GEMMA_3_4B.text_config.layer_types.count("full_attention") == 5
    assert far.flop - near.flop == 5 * 4 * 4000 * 2048
    assert far.bytes - near.bytes == 5 * 2 * 2 * 4000 * 1024


def test_gemma_3_4b_has_the_published_size() -> None:
    assert picture_pass(GEMMA_3_4B).flop == pytest.approx(5.45e12, rel=0.01)
    bytes_read = picture_pass(GEMMA_3_4B).bytes + text_pass(GEMMA_3_4B, 1).bytes
    assert bytes_read / 2 == pytest.approx(4.3e9, rel=0.01)  # parameters; its model card calls it 4B


def test_a_floor_is_what_a_pass_has_more_of_pass_by_pass() -> None:
    rates = Rates(flop_per_s=10, bytes_per_s=2)
    assert rates.floor_s([Pass(flop=100, bytes=2)]) == 10
    assert rates.floor_s([Pass(flop=100, bytes=2), Pass(flop=1, bytes=8)]) == 14
    assert rates.floor_s([]) == 0


def test_a_generated_token_is_a_pass_after_all_before_it() -> None:
    first, second, third = generation_passes(GEMMA_3_4B, 100, 3, num_cached=7)
    assert first == text_pass(GEMMA_3_4B, 100, num_cached=7)
    assert (second, third) == tuple(text_pass(GEMMA_3_4B, 1, num_cached=cached) for cached in (107, 108))
    quantised = generation_passes(GEMMA_3_4B, 100, 3, num_cached=7, bytes_per_weight=4.5 / 8)
    assert [one.flop for one in quantised] == [first.flop, second.flop, third.flop]
    assert quantised[2].bytes < 0.3 * third.bytes
    assert dataclasses.astuple(generation_passes(GEMMA_3_4B, 5, 1)[0]) > (0, 0)
