"""Checkpoints keep their layout and are told apart; wrong ones are refused in one line."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pokegemma.errors import PokegemmaError
from pokegemma.gemma import checkpoint_files, loading


def test_loading_and_saving_keeps_the_published_key_names(tiny_model: Path, tmp_path: Path) -> None:
    loading.load_model(tiny_model).save_pretrained(tmp_path)
    saved, own = (load_file(folder / "model.safetensors") for folder in (tmp_path, tiny_model))
    assert saved.keys() == own.keys()


def test_the_fingerprint_tells_checkpoints_apart(tiny_model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    model = loading.load_model(tiny_model)
    with torch.no_grad():
        model.model.language_model.norm.weight[0] += 0.5
    model.save_pretrained(other)
    assert checkpoint_files.weights_fingerprint(tiny_model) == checkpoint_files.weights_fingerprint(tiny_model)
    assert checkpoint_files.weights_fingerprint(other) != checkpoint_files.weights_fingerprint(tiny_model)


def rename_as_transformers_5(name: str) -> str:
    """Return the name that a Gemma 3 of transformers 5 gives to a weight of a published checkpoint."""
    name = name.replace("language_model.model.", "model.language_model.").replace("vision_model.", "")
    return name.replace("vision_tower.", "model.vision_tower.").replace("multi_modal", "model.multi_modal")


def test_the_fingerprint_is_that_of_what_is_loaded(tiny_model: Path, tmp_path: Path) -> None:
    fingerprint = checkpoint_files.weights_fingerprint(tiny_model)
    weights = load_file(tiny_model / "model.safetensors")
    head = weights["language_model.model.embed_tokens.weight"].clone()
    copies = {
        "spelling": {rename_as_transformers_5(name): weight for name, weight in weights.items()},
        "with_head": {**weights, "lm_head.weight": head},
        "with_old_head": {**weights, "language_model.lm_head.weight": head},
    }
    for name, tensors in copies.items():
        (tmp_path / name).mkdir()
        shutil.copyfile(tiny_model / "config.json", tmp_path / name / "config.json")
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    loading.load_model(tiny_model).save_pretrained(tmp_path / "sharded", max_shard_size="4MB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").is_file()
    loaded = loading.load_model(tiny_model).state_dict()
    for name in (*copies, "sharded"):
        assert checkpoint_files.weights_fingerprint(tmp_path / name) == fingerprint, name
        same = loading.load_model(tmp_path / name).state_dict()
        assert all(torch.equal(same[key], weight) for key, weight in loaded.items()), name
    other = {**weights, "lm_head.weight": head + 1}
    save_file(other, tmp_path / "with_head" / "model.safetensors", metadata={"format": "pt"})
    assert checkpoint_files.weights_fingerprint(tmp_path / "with_head") != fingerprint
    other["lm_head.weight"][0] = head[0]  # the row that is hashed
    save_file(other, tmp_path / "with_head" / "model.safetensors", metadata={"format": "pt"})
    assert checkpoint_files.weights_fingerprint(tmp_path / "with_head") != fingerprint


def test_a_fingerprint_of_an_earlier_version_still_fits(tiny_model: Path, tmp_path: Path) -> None:
    """As versions before the second took it: over the names and files as they are."""
    digest = hashlib.sha256()
    for name, weight in sorted(load_file(tiny_model / "model.safetensors").items()):
        beginning = weight if weight.ndim < 2 else weight[:1]
        digest.update(f"{name}{list(weight.shape)}".encode())
        digest.update(beginning.float().numpy().tobytes())
    assert checkpoint_files.has_fingerprint(tiny_model, digest.hexdigest())
    assert checkpoint_files.has_fingerprint(tiny_model, checkpoint_files.weights_fingerprint(tiny_model))
    assert not checkpoint_files.has_fingerprint(tiny_model, "0" * 64)


@pytest.mark.parametrize("read", [loading.load_model, checkpoint_files.weights_fingerprint])
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
        checkpoint_files.weights_fingerprint(tmp_path)


def test_what_is_no_gemma_3_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(PokegemmaError, match="'llama' is not a Gemma 3, 3n or 4 with vision"):
        loading.load_model(tmp_path)


def test_a_folder_that_does_not_exist_is_named() -> None:
    with pytest.raises(PokegemmaError, match=r"\./nowhere: no such folder"):
        loading.load_processor("./nowhere")


def test_a_hub_id_that_cannot_be_reached_says_what_to_do() -> None:
    with pytest.raises(PokegemmaError, match=r"google/gemma-3-4b-it.*licence.*HUGGINGFACE_TOKEN"):
        loading.load_config("google/gemma-3-4b-it")


def test_flash_attention_is_refused(tiny_model: Path) -> None:
    with pytest.raises(PokegemmaError, match="causal inside images"):
        loading.load_model(tiny_model, attn_implementation="flash_attention_2")
