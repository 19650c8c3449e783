"""Checkpoints keep their layout and are told apart; wrong ones are refused in one line."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pokegemma.errors import PokegemmaError
from pokegemma.training import models


def test_loading_and_saving_keeps_the_published_key_names(tiny_model: Path, tmp_path: Path) -> None:
    models.load_model(tiny_model).save_pretrained(tmp_path)
    saved, own = (load_file(folder / "model.safetensors") for folder in (tmp_path, tiny_model))
    assert saved.keys() == own.keys()


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


@pytest.mark.parametrize("read", [models.load_model, models.weights_fingerprint])
def test_weights_that_were_cut_off_are_one_line(
    read: Callable[[Path], object], tiny_model: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model, tmp_path, dirs_exist_ok=True)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])  # a download that stopped
    with pytest.raises(PokegemmaError, match=rf"{tmp_path}: the (model|weights) could not be loaded: .* incomplete"):
        read(tmp_path)


def test_an_index_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": ')
    with pytest.raises(PokegemmaError, match="the weights could not be loaded: Expecting value"):
        models.weights_fingerprint(tmp_path)


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
