"""What differs between families, and what is refused for some of them."""

import os
from pathlib import Path

import pytest
from transformers import AutoConfig, Gemma3Config, Gemma3nConfig, Gemma4Config
from transformers.utils import is_timm_available

from pokegemma.errors import PokegemmaError
from pokegemma.gemma import families
from pokegemma.gemma.loading import open_checkpoint
from pokegemma.gemma.processors import Gemma4PictureProcessor
from pokegemma.gemma.tiny import gemma3n_gemma4
from pokegemma.training.lora_targets import lora_target_pattern

FSDP = "FSDP_TRANSFORMER_CLS_TO_WRAP"
GEMMA3_LAYERS = "Gemma3DecoderLayer,SiglipEncoderLayer"


def gemma4_config(**text: int) -> Gemma4Config:
    return Gemma4Config(text_config=text, vision_config={}, audio_config={})


@pytest.mark.parametrize(
    ("model_type", "advice"),
    [
        ("gemma3_text", "Gemma 3 for text alone .* take google/gemma-3-4b-it, 12b or 27b"),
        ("gemma3n_text", "Gemma 3n for text alone .* take google/gemma-3n-E2B-it or E4B"),
        ("gemma4_text", "Gemma 4 for text alone .* take google/gemma-4-E2B-it"),
        ("gemma4_unified", "'gemma4_unified' is not a Gemma 3, 3n or 4 with vision; take google/gemma-3-4b-it"),
    ],
)
def test_a_model_that_sees_nothing_is_refused_with_one_that_does(model_type: str, advice: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(f'{{"model_type": "{model_type}"}}')
    with pytest.raises(PokegemmaError, match=advice):
        open_checkpoint(tmp_path)


@pytest.mark.skipif(is_timm_available(), reason="timm is here")
def test_gemma_3n_without_timm_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gemma3n"}')
    with pytest.raises(PokegemmaError, match=r"timm and torchvision.*--with gemma3n"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(("config", "name"), [(Gemma3nConfig(), "Gemma 3n"), (Gemma4Config(), "Gemma 4")])
@pytest.mark.parametrize("option", ["--samples_per_row", "--vision_features", "--image_size"])
def test_a_fast_path_of_gemma_3_is_refused_by_name(config: object, name: str, option: str) -> None:
    with pytest.raises(PokegemmaError, match=f"^{option}: not exact for {name} \\(.*\\); leave it out$"):
        families.require_exact(config, option)


def test_gemma_3_takes_every_fast_path() -> None:
    families.require_exact(Gemma3Config(), "--samples_per_row")


def test_reentrant_checkpointing_is_refused_where_layers_share_keys() -> None:
    with pytest.raises(PokegemmaError, match=r"Gemma 4 wrong gradients.*leave out --gradient_checkpointing_kwargs"):
        families.check_checkpointing(gemma4_config(num_kv_shared_layers=20), reentrant=True)
    families.check_checkpointing(gemma4_config(num_kv_shared_layers=20), reentrant=False)
    families.check_checkpointing(gemma4_config(num_kv_shared_layers=0), reentrant=True)
    families.check_checkpointing(Gemma3Config(), reentrant=True)


def test_the_audio_tower_is_told_the_only_attention_it_knows() -> None:
    parts = {"": "sdpa", "text_config": "sdpa", "vision_config": "sdpa", "audio_config": "eager"}
    assert families.attention_of_parts(gemma4_config(), "sdpa") == parts
    assert families.attention_of_parts(Gemma4Config(vision_config={}), "sdpa") == "sdpa"
    assert families.attention_of_parts(Gemma3Config(), "flex_attention") == "flex_attention"
    with pytest.raises(PokegemmaError, match="'flash_attention_2' is wrong for Gemma 4"):
        families.attention_of_parts(gemma4_config(), "flash_attention_2")


def test_every_part_of_gemma_4_has_the_attention_that_was_asked_for(other_models) -> None:
    config = open_checkpoint(other_models("gemma4")).load_model(attn_implementation="eager").config
    assert config.text_config._attn_implementation == "eager"
    assert config.vision_config._attn_implementation == "eager"


def test_fsdp_shards_the_layers_of_the_model_at_hand(
    other_models, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gemma3, gemma4 = open_checkpoint(tiny_model).load_model(), open_checkpoint(other_models("gemma4")).load_model()
    monkeypatch.setenv(FSDP, GEMMA3_LAYERS)
    families.set_fsdp_layers(gemma3, families.FAMILIES["gemma3"])
    assert os.environ[FSDP] == GEMMA3_LAYERS
    families.set_fsdp_layers(gemma4, families.FAMILIES["gemma4"])
    assert os.environ[FSDP] == "Gemma4TextDecoderLayer,Gemma4VisionEncoderLayer"


def test_an_adapter_on_the_tower_of_gemma_3n_is_refused() -> None:
    with pytest.raises(PokegemmaError, match="--train_vision_tower: the tower of Gemma 3n has no linear layers"):
        lora_target_pattern(families.FAMILIES["gemma3n"], named=(), train_vision_tower=True)


@pytest.mark.parametrize("name", ["gemma3n", "gemma4", "gemma4_large"])
def test_loading_and_saving_keeps_the_key_names(name: str, other_models, tmp_path: Path) -> None:
    folder = other_models(name)
    model = open_checkpoint(folder).load_model()
    model.save_pretrained(tmp_path)
    assert open_checkpoint(tmp_path).weights_fingerprint() == open_checkpoint(folder).weights_fingerprint()
    assert type(model).__name__ == AutoConfig.from_pretrained(folder).architectures[0]


def test_tiny_gemma_4_has_no_tokenizer_model_and_its_own_turns(other_models) -> None:
    folder = other_models("gemma4")
    assert not (folder / "tokenizer.model").exists()
    processor = open_checkpoint(folder).processor
    assert isinstance(processor, Gemma4PictureProcessor)
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Next?"}]}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert text == "<bos><|turn>user\n<|image|>Next?<turn|>\n<|turn>model\n"


def test_saving_the_processor_of_gemma_4_keeps_its_files(other_models, tmp_path: Path) -> None:
    folder = other_models("gemma4")
    open_checkpoint(folder).processor.save_pretrained(tmp_path)
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_the_same_seed_makes_the_same_gemma_4(other_models, tmp_path: Path) -> None:
    gemma3n_gemma4.make_tiny_gemma4(tmp_path, max_image_tokens=70, sliding_window=64)
    assert (
        open_checkpoint(tmp_path).weights_fingerprint() == open_checkpoint(other_models("gemma4")).weights_fingerprint()
    )
