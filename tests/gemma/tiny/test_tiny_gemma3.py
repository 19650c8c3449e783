"""The tiny checkpoint has what the published ones have, and nothing of the machine it was made on."""

import json
from pathlib import Path

from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from pokegemma.gemma.loading import open_checkpoint
from pokegemma.gemma.tiny.gemma3 import make_tiny_gemma3


def test_the_tiny_checkpoint_has_the_published_layout(tiny_model: Path) -> None:
    keys = load_file(tiny_model / "model.safetensors").keys()
    assert "language_model.model.embed_tokens.weight" in keys
    assert "vision_tower.vision_model.embeddings.patch_embedding.weight" in keys
    assert "multi_modal_projector.mm_input_projection_weight" in keys
    assert not any(".head." in key or key.startswith(("model.", "lm_head")) for key in keys)
    config = json.loads((tiny_model / "config.json").read_text())
    assert config["architectures"] == ["Gemma3ForConditionalGeneration"]
    assert config["text_config"]["layer_types"] == ["sliding_attention"] * 5 + ["full_attention"]
    names = {path.name for path in tiny_model.iterdir()}
    assert {"tokenizer.model", "tokenizer.json", "chat_template.jinja", "generation_config.json"} <= names


def test_transformers_loads_it_with_nothing_else(tiny_model: Path) -> None:
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(tiny_model),
        AutoProcessor.from_pretrained(tiny_model),
    )
    assert type(model).__name__ == "Gemma3ForConditionalGeneration"
    assert processor.image_seq_length == 4


def test_the_default_checkpoint_has_256_tokens_a_picture_of_224_px(tmp_path: Path) -> None:
    make_tiny_gemma3(tmp_path)
    config = open_checkpoint(tmp_path).config
    assert (config.mm_tokens_per_image, config.vision_config.image_size) == (256, 224)


def test_fewer_text_layers_have_sliding_attention_only(tmp_path: Path) -> None:
    make_tiny_gemma3(tmp_path, image_size_px=56, num_image_tokens=4, num_text_layers=2)
    model = open_checkpoint(tmp_path).load_model()
    assert model.config.text_config.layer_types == ["sliding_attention"] * 2
    assert len(model.model.language_model.layers) == 2


def test_the_same_seed_makes_the_same_bytes(tiny_model: Path, tmp_path: Path) -> None:
    make_tiny_gemma3(tmp_path, image_size_px=56, num_image_tokens=4, sliding_window=64)
    for path in tiny_model.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


def test_no_path_of_the_machine_is_written(tiny_model: Path) -> None:
    for path in tiny_model.iterdir():
        assert str(tiny_model.parent).encode() not in path.read_bytes(), path.name
