"""Converting to MLX for real: what is written is what the checkpoint says, and one clear line for what is wrong."""

import importlib
import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, Gemma3Config

pytest.importorskip("mlx_vlm", reason="needs ./init.sh --with mlx")

import mlx.core as mx
from mlx_vlm.utils import prepare_inputs

from pokegemma.engines.mlx_engine import MlxEngine, open_processor
from pokegemma.errors import CheckFailedError, PokegemmaError
from pokegemma.export import mlx as exporting
from pokegemma.export.mlx import convert_to_mlx, mlx_config, open_convertible
from pokegemma.export.mlx_check import MlxPart, check_config, check_mlx_weights, check_processor
from pokegemma.gemma.loading import open_checkpoint
from pokegemma.provenance import read_run_record
from tests.export import mlx_cases

PROJECTION = "multi_modal_projector.mm_input_projection_weight"


@pytest.fixture
def checkpoint(mlx_checkpoint: Path, tmp_path: Path) -> Path:
    """Return a copy to break."""
    return Path(shutil.copytree(mlx_checkpoint, tmp_path / "checkpoint"))


@pytest.fixture
def folder(mlx_folder: Path, tmp_path: Path) -> Path:
    """Return a copy to break."""
    return Path(shutil.copytree(mlx_folder, tmp_path / "mlx"))


def change_config(folder: Path, change: Callable[[dict], object]) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    change(config)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def change_weights(folder: Path, change: Callable[[dict], object]) -> None:
    """Change a folder's weights, whether of a checkpoint or for MLX."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file({name: weight.contiguous() for name, weight in weights.items()}, path, metadata={"format": "mlx"})


def refused(checkpoint: Path, tmp_path: Path) -> str:
    """Return the one line that a checkpoint is refused with; nothing is left behind."""
    output = tmp_path / "out" / "mlx"
    with pytest.raises(PokegemmaError) as error:
        convert_to_mlx(checkpoint, output)
    assert error.value.exit_code == 2
    assert not output.parent.exists() or not any(output.parent.iterdir())
    assert "\n" not in str(error.value)
    return str(error.value)


# --- what is written


def test_16_bits_are_the_checkpoint_in_bfloat16(mlx_checkpoint: Path, mlx_folder: Path) -> None:
    ours, theirs = load_file(mlx_folder / "model.safetensors"), load_file(mlx_checkpoint / "model.safetensors")
    assert {weight.dtype for weight in ours.values()} == {torch.bfloat16}
    head = ours.pop("language_model.lm_head.weight")
    assert torch.equal(head, ours["language_model.model.embed_tokens.weight"])
    assert set(ours) == set(theirs)
    convolution = "vision_tower.vision_model.embeddings.patch_embedding.weight"
    ours[convolution] = ours[convolution].permute(0, 3, 1, 2)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name].bfloat16())] == []


def test_the_folder_says_what_it_is(mlx_checkpoint: Path, mlx_folder: Path) -> None:
    assert {path.name for path in mlx_folder.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "run.json",
    }
    template = (mlx_folder / "chat_template.jinja").read_text(encoding="utf-8")
    assert template == (mlx_checkpoint / "chat_template.jinja").read_text(encoding="utf-8")
    record = read_run_record(mlx_folder)
    assert record is not None
    assert record["stage"] == "mlx"
    assert record["options"] == {"model_path": str(mlx_checkpoint), "quantization_bits": 16}
    assert (record["image_size_px"], record["image_tokens"]) == (112, 16)
    assert record["versions"]["mlx-vlm"]


def test_the_server_of_mlx_vlm_reads_a_prompt_with_one_bos(mlx_checkpoint: Path, mlx_folder: Path) -> None:
    processor, question = open_processor(mlx_folder), mlx_cases.make_question(0)
    text = processor.tokenizer.apply_chat_template(list(question.messages), add_generation_prompt=True, tokenize=False)
    # As its server does it; the folder that it converts itself has two.
    made = prepare_inputs(processor, images=list(question.pictures), prompts=[text], add_special_tokens=False)
    expected = mlx_cases.prompt_inputs(open_checkpoint(mlx_checkpoint).processor, question)["input_ids"]
    assert made["input_ids"].tolist() == expected.tolist()
    assert open_checkpoint(mlx_checkpoint).processor.tokenizer("").input_ids == [2]  # the checkpoint's is as it was


def test_transformers_still_understands_its_config(mlx_checkpoint: Path, mlx_folder: Path) -> None:
    ours, theirs = (AutoConfig.from_pretrained(path) for path in (mlx_folder, mlx_checkpoint))
    assert ours.text_config.rope_parameters == theirs.text_config.rope_parameters
    assert (ours.mm_tokens_per_image, ours.vision_config.image_size) == (16, 112)


@pytest.fixture(scope="module")
def folders(mlx_checkpoint: Path, mlx_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Return the checkpoint converted for MLX, by bits."""
    quantised = {bits: tmp_path_factory.mktemp("quantised") / f"{bits}bit" for bits in (4, 8)}
    for bits, folder in quantised.items():
        convert_to_mlx(mlx_checkpoint, folder, bits=bits)
    return {16: mlx_folder, **quantised}


def parts_of(folder: Path) -> list[MlxPart]:
    return [MlxPart(**part) for part in read_run_record(folder)["parts"]]


@pytest.mark.parametrize(("bits", "error"), [(8, 0.01), (4, 0.1)])
def test_quantising_leaves_the_vision_tower_whole(bits: int, error: float, folders: dict[int, Path]) -> None:
    parts = {(part.name, part.stored): part for part in parts_of(folders[bits])}
    quantised = f"{bits} bits"
    assert set(parts) == {
        ("embeddings", quantised),
        ("LM head", quantised),
        ("language model", quantised),
        ("language model", "bfloat16"),
        ("projector", "bfloat16"),
        ("vision tower", "bfloat16"),
    }
    assert parts["language model", "bfloat16"].num_weights == 6 * 4 * 128 + 6 * 2 * 32 + 128  # norms
    for (_, stored), part in parts.items():
        assert error / 3 < part.error < error if stored == quantised else part.error < 3e-3
        per_weight = 8 * part.num_bytes / part.num_weights
        assert per_weight == (bits + 0.5 if stored == quantised else 16)
    weights = [folders[number] / "model.safetensors" for number in (bits, 16)]
    assert weights[0].stat().st_size < (0.55 if bits == 4 else 0.7) * weights[1].stat().st_size
    engine = MlxEngine(folders[bits])
    assert engine.weights == quantised
    assert len(engine.write(mlx_cases.make_question(0), max_new_tokens=3)) <= 3


@pytest.mark.parametrize("bits", [8, 4])
def test_every_matrix_of_the_language_model_has_its_bits_in_groups_of_64(
    bits: int, mlx_checkpoint: Path, folders: dict[int, Path]
) -> None:
    written, stored = (load_file(path / "model.safetensors") for path in (folders[bits], mlx_checkpoint))
    stored["language_model.lm_head.weight"] = stored["language_model.model.embed_tokens.weight"]
    matrices = {name for name, w in stored.items() if name.startswith("language_model.") and w.dim() == 2}
    assert len(matrices) == 6 * 7 + 2
    assert {name for name, weight in written.items() if weight.dtype == torch.uint32} == matrices
    for name in matrices:
        rows, columns = stored[name].shape
        assert written[name].shape == (rows, columns * bits // 32)
        for kind in ("scales", "biases"):
            assert written[f"{name.removesuffix('.weight')}.{kind}"].shape == (rows, columns // 64)
    assert {w.dtype for name, w in written.items() if name not in matrices} == {torch.bfloat16}
    config = json.loads((folders[bits] / "config.json").read_text(encoding="utf-8"))
    assert (config["quantization"]["bits"], config["quantization"]["group_size"]) == (bits, 64)


def test_a_published_config_is_completed_with_its_defaults(tmp_path: Path) -> None:
    published = {
        "model_type": "gemma3",
        "mm_tokens_per_image": 256,
        "image_token_index": 262144,
        "eos_token_id": [1, 106],
        "text_config": {
            "model_type": "gemma3_text",
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "image_size": 896,
            "num_attention_heads": 16,
            "num_hidden_layers": 27,
            "patch_size": 14,
            "vision_use_head": False,
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(published), encoding="utf-8")
    # As training and merging leave it: transformers 5 has written it anew.
    Gemma3Config.from_pretrained(tmp_path).save_pretrained(tmp_path / "merged")
    for folder in (tmp_path, tmp_path / "merged"):
        config = mlx_config(folder, Gemma3Config.from_pretrained(folder))
        text = config["text_config"]
        assert (config["hidden_size"], text["hidden_size"], text["mm_tokens_per_image"]) == (2560, 2560, 256)
        assert text["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
        assert (text["rope_global_base_freq"], text["rope_local_base_freq"]) == (1_000_000.0, 10_000.0)
        assert (text["num_attention_heads"], text["head_dim"], text["vocab_size"]) == (8, 256, 262208)
        assert (text["sliding_window_pattern"], text["sliding_window"]) == (6, 1024)
        assert config["eos_token_id"] == [1, 106]


def test_a_bidirectional_model_is_warned_of_and_a_causal_one_is_not(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="pokegemma")
    convert_to_mlx(checkpoint, tmp_path / "first")
    assert ["causal inside pictures" in message for message in caplog.messages] == [True]
    caplog.clear()
    change_config(checkpoint, lambda config: config.update(image_attention="causal"))
    convert_to_mlx(checkpoint, tmp_path / "second")
    assert caplog.messages == []
    assert json.loads((tmp_path / "second" / "config.json").read_text(encoding="utf-8"))["image_attention"] == "causal"
    assert read_run_record(tmp_path / "second")["image_attention"] == "causal"


def test_a_result_is_replaced_only_when_asked(mlx_checkpoint: Path, folder: Path) -> None:
    with pytest.raises(PokegemmaError, match="exists; choose another path or pass --overwrite"):
        convert_to_mlx(mlx_checkpoint, folder)
    convert_to_mlx(mlx_checkpoint, folder, bits=8, overwrite=True)
    assert read_run_record(folder)["options"]["quantization_bits"] == 8


def test_several_files_of_weights_are_converted(checkpoint: Path, tmp_path: Path) -> None:
    open_checkpoint(checkpoint).load_model().save_pretrained(tmp_path / "shards", max_shard_size="2MB")
    (checkpoint / "model.safetensors").unlink()
    for file in (tmp_path / "shards").glob("model*"):
        shutil.copy(file, checkpoint)
    assert len(list(checkpoint.glob("*.safetensors"))) > 1
    parts = convert_to_mlx(checkpoint, tmp_path / "mlx")
    assert len(parts) == 5


# --- what is refused


def test_an_adapter_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "adapter_config.json").write_text("{}", encoding="utf-8")
    assert "is an adapter; merge it first: scripts/merge_qlora.py" in refused(checkpoint, tmp_path)


def test_another_family_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "config.json").write_text('{"model_type": "gemma4"}')
    assert "is a Gemma 4" in refused(checkpoint, tmp_path)


def test_quantised_weights_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    quantised = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    change_config(checkpoint, lambda config: config.update(quantization_config=quantised))
    assert "its weights are quantised; convert the full-precision checkpoint" in refused(checkpoint, tmp_path)


def test_a_folder_for_mlx_is_refused(mlx_folder: Path, tmp_path: Path) -> None:
    assert "for MLX already" in refused(mlx_folder, tmp_path)


@pytest.mark.parametrize("part", ["vision_tower", "multi_modal_projector"])
def test_a_model_without_eyes_is_refused(part: str, checkpoint: Path, tmp_path: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    save_file({name: weight for name, weight in weights.items() if part not in name}, checkpoint / "model.safetensors")
    assert f"its weights contain no {part}" in refused(checkpoint, tmp_path)


def test_a_missing_tensor_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    del weights["language_model.model.layers.3.self_attn.q_proj.weight"]
    save_file(weights, checkpoint / "model.safetensors")
    assert "layers.3.self_attn.q_proj.weight" in refused(checkpoint, tmp_path)


def test_no_weights_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    assert "no weights (model.safetensors or" in refused(checkpoint, tmp_path)


def test_positions_that_mlx_vlm_does_not_know_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 8.0, "rope_theta": 1e6, "original_max_position_embeddings": 1024}
    change_config(checkpoint, lambda config: config["text_config"]["rope_parameters"].update(full_attention=yarn))
    assert "mlx-vlm does not know its positions" in refused(checkpoint, tmp_path)


def test_an_order_of_layers_that_mlx_vlm_does_not_know_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    change_config(checkpoint, lambda config: config["text_config"]["layer_types"].reverse())
    assert "mlx-vlm does not know its order of layers (full_attention, sliding" in refused(checkpoint, tmp_path)


def test_an_output_that_holds_the_model_is_refused(checkpoint: Path) -> None:
    with pytest.raises(PokegemmaError, match=r"--output_path .* contains the input"):
        convert_to_mlx(checkpoint, checkpoint.parent, overwrite=True)
    assert (checkpoint / "model.safetensors").is_file()


def test_a_full_disk_is_said_before_anything_is_written(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 100, 2**20))
    assert "0.1 GiB needed, 0.0 GiB free on this disk" in refused(checkpoint, tmp_path)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_the_space_asked_for_is_what_is_written(bits: int, mlx_checkpoint: Path, folders: dict[int, Path]) -> None:
    assert exporting._size(mlx_checkpoint, bits) == sum(part.num_bytes for part in parts_of(folders[bits]))


def test_without_mlx_vlm_one_line_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlx_vlm.utils", None)
    for module in ("export.mlx", "export.mlx_check", "engines.mlx_engine"):
        monkeypatch.delitem(sys.modules, f"pokegemma.{module}")
    with pytest.raises(PokegemmaError, match=r"install it with: \./init\.sh --with mlx") as error:
        importlib.import_module("pokegemma.export.mlx")
    assert "\n" not in str(error.value)


# --- planted faults


def test_two_swapped_rows_are_found(mlx_checkpoint: Path, folder: Path) -> None:
    def swap(weights: dict[str, torch.Tensor]) -> None:
        weights[PROJECTION][:2] = weights[PROJECTION][:2].flip(0)

    check_mlx_weights(mlx_checkpoint, folder, bits=16)
    change_weights(folder, swap)
    with pytest.raises(CheckFailedError, match="mm_input_projection_weight differs from the checkpoint by"):
        check_mlx_weights(mlx_checkpoint, folder, bits=16)


def test_two_swapped_rows_of_a_quantised_matrix_are_found(
    mlx_checkpoint: Path, folders: dict[int, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders[4], tmp_path / "mlx")
    name = "language_model.model.layers.0.self_attn.q_proj.weight"
    weights = mx.load(str(tmp_path / "mlx" / "model.safetensors"))
    half = weights[name].shape[0] // 2
    weights[name] = mx.concatenate([weights[name][half:], weights[name][:half]])
    mx.save_safetensors(str(tmp_path / "mlx" / "model.safetensors"), weights)
    with pytest.raises(CheckFailedError, match=r"layers\.0\.self_attn\.q_proj\.weight differs"):
        check_mlx_weights(mlx_checkpoint, tmp_path / "mlx", bits=4)


@pytest.mark.parametrize(
    "name", [PROJECTION, "vision_tower.vision_model.post_layernorm.bias", "language_model.lm_head.weight"]
)
def test_a_tensor_that_was_not_written_is_found(name: str, mlx_checkpoint: Path, folder: Path) -> None:
    change_weights(folder, lambda weights: weights.pop(name))
    with pytest.raises(CheckFailedError, match="was not written"):
        check_mlx_weights(mlx_checkpoint, folder, bits=16)


def test_a_tensor_too_many_is_found(mlx_checkpoint: Path, folder: Path) -> None:
    change_weights(folder, lambda weights: weights.update(extra=torch.zeros(2)))
    with pytest.raises(CheckFailedError, match="extra is not in the checkpoint"):
        check_mlx_weights(mlx_checkpoint, folder, bits=16)


@pytest.mark.parametrize(
    ("file", "old", "new", "says"),
    [
        ("chat_template.jinja", "'<start_of_turn>'", "'<turn>'", "gives another prompt"),
        ("processor_config.json", '"image_seq_length": 16,\n  "p', '"image_seq_length": 4,\n  "p', "another prompt"),
        ("processor_config.json", "0.00392156862745098", "0.0078", "gives other pixels"),
    ],
)
def test_another_processor_is_found(
    file: str, old: str, new: str, says: str, mlx_checkpoint: Path, folder: Path
) -> None:
    processor, config = open_checkpoint(mlx_checkpoint).processor, open_convertible(mlx_checkpoint).config
    check_processor(processor, folder, config)
    text = (folder / file).read_text(encoding="utf-8")
    assert old in text
    (folder / file).write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(CheckFailedError, match=says):
        check_processor(processor, folder, config)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [(None, "hidden_size", 2048), ("text_config", "rope_scaling", None), ("vision_config", "layer_norm_eps", 1e-5)],
)
def test_a_config_that_says_something_else_is_found(
    section: str | None, key: str, value: object, mlx_checkpoint: Path, folder: Path
) -> None:
    config = mlx_config(mlx_checkpoint, open_convertible(mlx_checkpoint).config)
    check_config(folder, config)
    change_config(folder, lambda written: (written[section] if section else written).update({key: value}))
    with pytest.raises(CheckFailedError, match=f"mlx-vlm takes {key} for {value}"):
        check_config(folder, config)
