"""The tiny checkpoint has what the published ones have; wrong checkpoints are refused in one line."""

import json
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor, Gemma3Processor

from pokegemma.errors import PokegemmaError
from pokegemma.training import models


def keys_of(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        return set(weights.keys())


def test_the_tiny_checkpoint_has_the_published_layout(tiny_model: Path) -> None:
    keys = keys_of(tiny_model)
    assert "language_model.model.embed_tokens.weight" in keys
    assert "vision_tower.vision_model.embeddings.patch_embedding.weight" in keys
    assert "multi_modal_projector.mm_input_projection_weight" in keys
    assert not any(".head." in key or key.startswith(("model.", "lm_head")) for key in keys)
    config = json.loads((tiny_model / "config.json").read_text())
    assert config["architectures"] == ["Gemma3ForConditionalGeneration"]
    assert config["text_config"]["layer_types"] == ["sliding_attention"] * 5 + ["full_attention"]
    names = {path.name for path in tiny_model.iterdir()}
    assert {"tokenizer.model", "tokenizer.json", "chat_template.jinja", "generation_config.json"} <= names


def test_loading_and_saving_keeps_the_published_key_names(tiny_model: Path, tmp_path: Path) -> None:
    models.load_model(tiny_model).save_pretrained(tmp_path)
    assert keys_of(tmp_path) == keys_of(tiny_model)


def test_transformers_loads_it_with_nothing_else(tiny_model: Path) -> None:
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(tiny_model),
        AutoProcessor.from_pretrained(tiny_model),
    )
    assert type(model).__name__ == "Gemma3ForConditionalGeneration"
    assert processor.image_seq_length == 4


def test_the_default_checkpoint_has_256_tokens_a_picture_of_224_px(tmp_path: Path) -> None:
    models.make_tiny_gemma3(tmp_path)
    config = models.load_config(tmp_path)
    assert (config.mm_tokens_per_image, config.vision_config.image_size) == (256, 224)


def test_the_same_seed_makes_the_same_bytes(tiny_model: Path, tmp_path: Path) -> None:
    models.make_tiny_gemma3(tmp_path, image_size_px=56, num_image_tokens=4, sliding_window=64)
    for path in tiny_model.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


def test_no_path_of_the_machine_is_written(tiny_model: Path) -> None:
    for path in tiny_model.iterdir():
        assert str(tiny_model.parent).encode() not in path.read_bytes(), path.name


@pytest.mark.parametrize("text", ["up\n\ndown", "Pokémon 東京 🎮", 'a "b"\tc  d', "\n\n\n\n"])
def test_the_tokenizer_gives_any_text_back(text: str, processor: Gemma3Processor) -> None:
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert processor.tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_fast_tokenizer_agrees_with_sentencepiece(tiny_model: Path, processor: Gemma3Processor) -> None:
    reference = sentencepiece.SentencePieceProcessor(str(tiny_model / "tokenizer.model"))
    for text in ('{"button": "select", "reasoning": "the path leads up"}', "Goal: heal your Pokémon\nNext button?"):
        assert processor.tokenizer(text, add_special_tokens=False)["input_ids"] == reference.encode(text)


def test_the_fingerprint_tells_checkpoints_apart(tiny_model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    model = models.load_model(tiny_model)
    with torch.no_grad():
        model.model.language_model.norm.weight[0] += 0.5
    model.save_pretrained(other)
    assert models.weights_fingerprint(tiny_model) == models.weights_fingerprint(tiny_model)
    assert models.weights_fingerprint(other) != models.weights_fingerprint(tiny_model)


def test_the_fingerprint_reads_sharded_checkpoints(tiny_model: Path, tmp_path: Path) -> None:
    models.load_model(tiny_model).save_pretrained(tmp_path, max_shard_size="4MB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert len(models.weights_fingerprint(tmp_path)) == 64


def test_what_is_no_gemma_3_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(PokegemmaError, match="'llama' is not a Gemma 3, 3n or 4 with vision"):
        models.load_model(tmp_path)


def test_a_folder_that_does_not_exist_is_named() -> None:
    with pytest.raises(PokegemmaError, match=r"\./nowhere: no such folder"):
        models.load_processor("./nowhere")


def test_a_hub_id_that_cannot_be_reached_says_what_to_do() -> None:
    with pytest.raises(PokegemmaError, match=r"google/gemma-3-4b-it.*licence.*HUGGINGFACE_TOKEN"):
        models.load_config("google/gemma-3-4b-it")


def test_flash_attention_is_refused(tiny_model: Path) -> None:
    with pytest.raises(PokegemmaError, match="causal inside images"):
        models.load_model(tiny_model, attn_implementation="flash_attention_2")
