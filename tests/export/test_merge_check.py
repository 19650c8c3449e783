"""A merged checkpoint on disk is compared with base and adapter, tensor by tensor, without any sample."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from pokegemma.errors import CheckFailedError, PokegemmaError
from pokegemma.export.merge import merge
from pokegemma.export.merge_check import WeightCounts, check_merged_weights, weight_names
from pokegemma.gemma.adapters.reading import Adapter, read_adapter
from pokegemma.gemma.loading import open_checkpoint
from pokegemma.provenance import write_run_record

UP_PROJ = "language_model.model.layers.0.mlp.up_proj.weight"
EMBEDDINGS, HEAD = "language_model.model.embed_tokens.weight", "lm_head.weight"


def make_adapter(folder: Path, base: Path, *, size: float = 1, **config) -> Adapter:
    """Write an adapter with random weights, of which `size` is a factor."""
    torch.manual_seed(0)
    model = get_peft_model(
        open_checkpoint(base).load_model(), LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **config)
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name or "lora_embedding_B" in name:
                weight *= size
    model.save_pretrained(folder)
    return read_adapter(folder)


@pytest.fixture(scope="module")
def names(tiny_model: Path) -> set[str]:
    return weight_names(open_checkpoint(tiny_model).load_model())


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    """Return one so small that bfloat16 keeps a part of what it changes: 3e-4 of the weights."""
    return make_adapter(
        tmp_path_factory.mktemp("adapter"), tiny_model, size=1e-3, target_modules=r".*language_model.*(up|q)_proj"
    )


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def merged(request: pytest.FixtureRequest, adapter: Adapter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merged") / "model"
    merge(adapter.path, folder, dtype=request.param)
    return folder


@pytest.fixture
def change(merged: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that copies the merged checkpoint and gives its tensors to a function to be changed."""

    def copy(edit: Callable[[dict[str, torch.Tensor]], object]) -> Path:
        folder = tmp_path / "changed"
        shutil.copytree(merged, folder)
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return copy


def test_what_was_merged_is_as_expected(merged: Path, tiny_model: Path, adapter: Adapter, names: set[str]) -> None:
    assert check_merged_weights(merged, str(tiny_model), adapter, names) == WeightCounts(changed=12, unchanged=140)


def test_a_layer_that_was_not_merged_is_named(change, tiny_model: Path, adapter: Adapter, names: set[str]) -> None:
    before = load_file(tiny_model / "model.safetensors")[UP_PROJ]
    folder = change(lambda tensors: tensors.update({UP_PROJ: before.to(tensors[UP_PROJ])}))
    with pytest.raises(CheckFailedError, match=r"1 of 152 tensors .*: layers\.0\.mlp\.up_proj\.weight"):
        check_merged_weights(folder, str(tiny_model), adapter, names)


def test_half_a_layer_is_seen(change, tiny_model: Path, adapter: Adapter, names: set[str]) -> None:
    before = load_file(tiny_model / "model.safetensors")[UP_PROJ]
    folder = change(lambda tensors: tensors[UP_PROJ][:192].copy_(before[:192]))
    with pytest.raises(CheckFailedError, match=r"1 of 152 tensors .*: layers\.0\.mlp\.up_proj\.weight"):
        check_merged_weights(folder, str(tiny_model), adapter, names)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: tensors.pop(UP_PROJ), r"1 tensors are missing .*: layers\.0\.mlp\.up_proj\.weight"),
        (lambda tensors: tensors.update(extra=torch.ones(1)), "1 tensors .*: extra"),
        (lambda tensors: tensors[EMBEDDINGS][7].mul_(2), "2 of 152 tensors .*: embed_tokens.weight, lm_head.weight"),
        (lambda tensors: tensors.update({HEAD: tensors[EMBEDDINGS] * 2}), "lm_head.weight is there, config.json"),
    ],
)
def test_tensors_that_are_gone_left_over_or_changed_are_named(
    edit, message: str, change, tiny_model: Path, adapter: Adapter, names: set[str]
) -> None:
    with pytest.raises(CheckFailedError, match=message):
        check_merged_weights(change(edit), str(tiny_model), adapter, names)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_of_one_use_of_tied_weights_unties_them(
    target: str, tiny_model: Path, toy_dataset: Path, names: set[str], tmp_path: Path
) -> None:
    tied = make_adapter(tmp_path / "adapter", tiny_model, target_modules=[target])
    verification = merge(
        tied.path, tmp_path / "m", dtype="float32", verify_on=toy_dataset / "eval.jsonl", num_samples=1
    )
    assert verification.adapter_effect > 0.1 and verification.merged_error < 1e-5
    base, ours = (load_file(folder / "model.safetensors") for folder in (tiny_model, tmp_path / "m"))
    assert torch.equal(ours[HEAD], base[EMBEDDINGS]) is (target == "embed_tokens")
    assert torch.equal(ours[EMBEDDINGS], base[EMBEDDINGS]) is (target == "lm_head")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (config["tie_word_embeddings"], config["text_config"].get("tie_word_embeddings")) == (False, False)
    # As merging without the clone would leave it: the change has reached both uses.
    changed = ours[HEAD if target == "lm_head" else EMBEDDINGS]
    ours = {key: tensor for key, tensor in ours.items() if key != HEAD} | {EMBEDDINGS: changed}
    save_file(ours, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    other = "embed_tokens.weight" if target == "lm_head" else HEAD
    with pytest.raises(CheckFailedError, match=f"1 of 152 tensors .*: {other}"):
        check_merged_weights(tmp_path / "m", str(tiny_model), tied, names)


def test_an_adapter_that_changes_nothing_fails_without_samples(tiny_model: Path, tmp_path: Path) -> None:
    untrained = make_adapter(tmp_path / "adapter", tiny_model, size=0, target_modules=r".*language_model.*q_proj")
    with pytest.raises(CheckFailedError, match="changes nothing"):
        merge(untrained.path, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_base_that_is_not_finite_is_named(adapter: Adapter, tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors[UP_PROJ][0, 0] = float("nan")
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PokegemmaError, match=f"base: {UP_PROJ} contains NaN"):
        merge(adapter.path, tmp_path / "m", base=str(tmp_path / "base"))


def test_a_base_that_lacks_a_tensor_is_refused(adapter: Adapter, tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    del tensors["vision_tower.vision_model.post_layernorm.bias"]
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PokegemmaError, match=r"lack 1 of the model's 152 tensors: vision_tower\.post_layernorm\.bias"):
        merge(adapter.path, tmp_path / "m", base=str(tmp_path / "base"))


def test_a_base_in_another_spelling_and_in_shards_is_the_same_base(
    adapter: Adapter, merged: Path, tiny_model: Path, tmp_path: Path
) -> None:
    base, record = tmp_path / "base", {"base_fingerprint": open_checkpoint(tiny_model).weights_fingerprint()}
    shutil.copytree(tiny_model, base, ignore=shutil.ignore_patterns("*.safetensors"))
    model = open_checkpoint(tiny_model).load_model()
    model.save_pretrained(base, max_shard_size="4MB", save_original_format=False)
    assert "model.vision_tower.encoder.layers.0.mlp.fc1" in (base / "model.safetensors.index.json").read_text()
    shutil.copytree(adapter.path, tmp_path / "adapter")
    write_run_record(tmp_path / "adapter", stage="train", options={}, **record)
    dtype = "float32" if "float32" in (merged / "run.json").read_text() else "bfloat16"
    merge(tmp_path / "adapter", tmp_path / "m", base=str(base), dtype=dtype)
    first, second = (open_checkpoint(folder).load_model().state_dict() for folder in (merged, tmp_path / "m"))
    assert all(torch.equal(second[key], weight) for key, weight in first.items())


def test_an_adapter_of_a_quantised_base_merges_onto_the_whole_one(
    adapter: Adapter, tiny_model: Path, quantised_model: Path, tmp_path: Path
) -> None:
    shutil.copytree(adapter.path, tmp_path / "adapter")
    record = {"base_model": str(quantised_model), "base_fingerprint": "0" * 64}
    write_run_record(tmp_path / "adapter", stage="train", options={}, **record)
    merge(tmp_path / "adapter", tmp_path / "m", base=str(tiny_model))
    write_run_record(tmp_path / "adapter", stage="train", options={}, **{**record, "base_model": "/gone"})
    with pytest.raises(PokegemmaError, match=r"is not the base .* trained on /gone, .* quantised"):
        merge(tmp_path / "adapter", tmp_path / "m2", base=str(tiny_model))
