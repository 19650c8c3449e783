"""Checkpoints keep their layout and are told apart; wrong ones are refused in one line."""

import builtins
import functools
import hashlib
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, Gemma3ImageProcessorPil, Gemma3Processor

from pokegemma.errors import PokegemmaError
from pokegemma.evaluation.predict import load_predictor
from pokegemma.gemma.loading import open_checkpoint
from pokegemma.provenance import write_run_record


def test_loading_and_saving_keeps_the_published_key_names(tiny_model: Path, tmp_path: Path) -> None:
    open_checkpoint(tiny_model).load_model().save_pretrained(tmp_path)
    saved, own = (load_file(folder / "model.safetensors") for folder in (tmp_path, tiny_model))
    assert saved.keys() == own.keys()


def test_the_fingerprint_tells_checkpoints_apart(tiny_model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    model = open_checkpoint(tiny_model).load_model()
    with torch.no_grad():
        model.model.language_model.norm.weight[0] += 0.5
    model.save_pretrained(other)
    assert open_checkpoint(tiny_model).weights_fingerprint() == open_checkpoint(tiny_model).weights_fingerprint()
    assert open_checkpoint(other).weights_fingerprint() != open_checkpoint(tiny_model).weights_fingerprint()


def rename_as_transformers_5(name: str) -> str:
    """Return the name that a Gemma 3 of transformers 5 gives to a weight of a published checkpoint."""
    name = name.replace("language_model.model.", "model.language_model.").replace("vision_model.", "")
    return name.replace("vision_tower.", "model.vision_tower.").replace("multi_modal", "model.multi_modal")


def test_the_fingerprint_is_that_of_what_is_loaded(tiny_model: Path, tmp_path: Path) -> None:
    fingerprint = open_checkpoint(tiny_model).weights_fingerprint()
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
    open_checkpoint(tiny_model).load_model().save_pretrained(tmp_path / "sharded", max_shard_size="4MB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").is_file()
    loaded = open_checkpoint(tiny_model).load_model().state_dict()
    for name in (*copies, "sharded"):
        assert open_checkpoint(tmp_path / name).weights_fingerprint() == fingerprint, name
        same = open_checkpoint(tmp_path / name).load_model().state_dict()
        assert all(torch.equal(same[key], weight) for key, weight in loaded.items()), name
    other = {**weights, "lm_head.weight": head + 1}
    save_file(other, tmp_path / "with_head" / "model.safetensors", metadata={"format": "pt"})
    assert open_checkpoint(tmp_path / "with_head").weights_fingerprint() != fingerprint
    other["lm_head.weight"][0] = head[0]  # the row that is hashed
    save_file(other, tmp_path / "with_head" / "model.safetensors", metadata={"format": "pt"})
    assert open_checkpoint(tmp_path / "with_head").weights_fingerprint() != fingerprint


def test_a_fingerprint_of_an_earlier_version_still_fits(tiny_model: Path, tmp_path: Path) -> None:
    """As versions before the second took it: over the names and files as they are."""
    digest = hashlib.sha256()
    for name, weight in sorted(load_file(tiny_model / "model.safetensors").items()):
        beginning = weight if weight.ndim < 2 else weight[:1]
        digest.update(f"{name}{list(weight.shape)}".encode())
        digest.update(beginning.float().numpy().tobytes())
    assert open_checkpoint(tiny_model).has_fingerprint(digest.hexdigest())
    assert open_checkpoint(tiny_model).has_fingerprint(open_checkpoint(tiny_model).weights_fingerprint())
    assert not open_checkpoint(tiny_model).has_fingerprint("0" * 64)


@pytest.mark.parametrize("method", ["load_model", "weights_fingerprint"])
def test_weights_that_were_cut_off_are_one_line(method: str, tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path, dirs_exist_ok=True)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])  # a download that stopped
    with pytest.raises(
        PokegemmaError, match=rf"{tmp_path}.*: the (model|weights) (could not be loaded|cannot be read): .* incomplete"
    ):
        getattr(open_checkpoint(tmp_path), method)()


def test_an_index_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gemma3"}')
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": ')
    with pytest.raises(PokegemmaError, match=r"model\.safetensors\.index\.json is damaged: Expecting value"):
        open_checkpoint(tmp_path).weights_fingerprint()


def test_what_is_no_gemma_3_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(PokegemmaError, match="'llama' is not a Gemma 3, 3n or 4 with vision"):
        open_checkpoint(tmp_path).load_model()


def test_a_folder_that_does_not_exist_is_named() -> None:
    with pytest.raises(PokegemmaError, match=r"\./nowhere: no such folder"):
        open_checkpoint("./nowhere")


def test_a_hub_id_that_cannot_be_reached_says_what_to_do() -> None:
    with pytest.raises(PokegemmaError, match=r"google/gemma-3-4b-it.*licence.*HUGGINGFACE_TOKEN"):
        open_checkpoint("google/gemma-3-4b-it")


def test_flash_attention_is_refused(tiny_model: Path) -> None:
    with pytest.raises(PokegemmaError, match="causal inside images"):
        open_checkpoint(tiny_model).load_model(attn_implementation="flash_attention_2")


def test_a_predictor_reads_config_json_once(
    tiny_model: Path, toy_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Besides the reads within transformers' own `from_pretrained` of model and processor, which are counted first."""
    adapter = get_peft_model(open_checkpoint(tiny_model).load_model(), LoraConfig(target_modules=r".*language.*q_proj"))
    adapter.save_pretrained(tmp_path)
    fingerprint = open_checkpoint(tiny_model).weights_fingerprint()
    write_run_record(tmp_path, stage="train", options={}, base_fingerprint=fingerprint)
    reads = []
    for module in (builtins, io):  # io.open is what Path.read_text calls

        def count(file: Any, *args: Any, original: Callable = module.open, **options: Any) -> Any:
            reads.append(str(file))
            return original(file, *args, **options)

        monkeypatch.setattr(module, "open", count)

    def count_reads(load: Callable[[], object]) -> int:
        reads.clear()
        load()
        return reads.count(str(tiny_model / "config.json"))

    classes = (AutoModelForImageTextToText, Gemma3Processor, Gemma3ImageProcessorPil)
    inevitable = sum(count_reads(lambda kind=kind: kind.from_pretrained(str(tiny_model))) for kind in classes)
    assert inevitable > 0
    for path in (tiny_model, tmp_path):
        load = functools.partial(load_predictor, path, dataset_folder=toy_dataset, layout="grid", device="cpu")
        assert count_reads(load) == inevitable + 1, path
