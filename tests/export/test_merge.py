"""Merging for real: the same logits, the published layout, and one clear line for what is wrong."""

import json
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from pokegemma.errors import CheckFailedError, PokegemmaError
from pokegemma.export.merge import merge
from pokegemma.export.merge_limits import STORED_TOLERANCE
from pokegemma.export.merge_logits import Verification, check_verification
from pokegemma.gemma.adapters.reading import read_adapter
from pokegemma.gemma.families import FAMILIES
from pokegemma.gemma.loading import open_checkpoint
from pokegemma.gemma.tiny.gemma3 import make_tiny_gemma3
from pokegemma.provenance import PROJECT_ROOT, read_run_record, write_run_record
from pokegemma.training.lora_targets import lora_config
from pokegemma.training.options import ModelOptions, TrainingOptions
from pokegemma.training.trainable import load_trainable


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an adapter with random weights on language model, tower and projector, as training would leave it."""
    folder = tmp_path_factory.mktemp("adapter")
    options = ModelOptions(
        model_name_or_path=str(tiny_model), finetuning="lora", train_vision_tower=True, train_projector=True
    )
    torch.manual_seed(0)
    model = get_peft_model(open_checkpoint(tiny_model).load_model(), lora_config(options, FAMILIES["gemma3"]))
    for name, weight in model.named_parameters():
        if "lora_B" in name or ("modules_to_save" in name and weight.requires_grad):
            torch.nn.init.normal_(weight, std=0.02)
    model.save_pretrained(folder)
    write_run_record(
        folder,
        stage="train",
        options={"layout": "frames"},
        status="completed",
        base_model=str(tiny_model),
        base_fingerprint=open_checkpoint(tiny_model).weights_fingerprint(),
    )
    return folder


@pytest.fixture(scope="module")
def held_out(toy_dataset: Path) -> Path:
    return toy_dataset / "eval.jsonl"


@pytest.fixture(scope="module")
def merged(adapter: Path, held_out: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Verification]:
    output = tmp_path_factory.mktemp("merged") / "model"
    return output, merge(adapter, output, verify_on=held_out, num_samples=3)


def test_merged_and_stored_weights_say_what_adapter_and_base_say(merged: tuple[Path, Verification]) -> None:
    verification = merged[1]
    assert verification.num_samples == 3
    assert verification.adapter_effect > 0.01
    assert verification.merged_error < 1e-5
    assert 0 < verification.stored_error < STORED_TOLERANCE["bfloat16"]  # rounded, so not nothing


def test_the_merged_folder_has_the_published_layout_and_type(
    merged: tuple[Path, Verification], tiny_model: Path
) -> None:
    ours, base = load_file(merged[0] / "model.safetensors"), load_file(tiny_model / "model.safetensors")
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in base.items()}
    assert {value.dtype for value in ours.values()} == {torch.bfloat16}
    names = {path.name for path in merged[0].iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "processor_config.json",
        "chat_template.jinja",
        "run.json",
    } <= names
    assert (merged[0] / "tokenizer.model").read_bytes() == (tiny_model / "tokenizer.model").read_bytes()
    assert not any("adapter" in name for name in names)


def test_every_trained_part_reaches_the_merged_weights(merged: tuple[Path, Verification], tiny_model: Path) -> None:
    ours, base = load_file(merged[0] / "model.safetensors"), load_file(tiny_model / "model.safetensors")
    changed = {key for key in base if not torch.equal(ours[key], base[key].bfloat16())}
    for part in ("language_model.model.layers.0.mlp.up_proj", "vision_tower.vision_model.encoder.layers.0.mlp.fc1"):
        assert f"{part}.weight" in changed
    assert "multi_modal_projector.mm_input_projection_weight" in changed
    assert "language_model.model.embed_tokens.weight" not in changed


def test_transformers_loads_the_merged_folder_with_nothing_else(merged: tuple[Path, Verification]) -> None:
    model, processor = AutoModelForImageTextToText.from_pretrained(merged[0]), AutoProcessor.from_pretrained(merged[0])
    assert model.dtype == torch.bfloat16
    assert processor.chat_template and model.generation_config.eos_token_id == [1, 7]
    assert model.config.get_text_config().use_cache


def test_the_record_carries_layout_and_training(merged: tuple[Path, Verification], adapter: Path) -> None:
    record = read_run_record(merged[0])
    assert record["options"]["layout"] == "frames"
    assert record["training"]["base_fingerprint"] == read_run_record(adapter)["base_fingerprint"]
    assert record["verification"]["merged_error"] == merged[1].merged_error


def test_float32_keeps_the_merge_exact(adapter: Path, held_out: Path, tmp_path: Path) -> None:
    result = merge(adapter, tmp_path / "m", dtype="float32", verify_on=held_out, num_samples=1)
    assert result.stored_error <= STORED_TOLERANCE["float32"]


def test_an_adapter_trained_on_nf4_weights_is_merged_onto_whole_ones(
    toy_dataset: Path, tiny_model: Path, tmp_path: Path
) -> None:
    options = ModelOptions(model_name_or_path=str(tiny_model))
    training = TrainingOptions(output_dir=str(tmp_path / "unused"), use_cpu=True)
    model = get_peft_model(
        load_trainable(options.open_checkpoint(), options, training), lora_config(options, FAMILIES["gemma3"])
    )
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    model.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "m", dtype="float32")
    with safe_open(tmp_path / "m" / "model.safetensors", framework="pt") as weights:
        assert not any("quant" in key or "absmax" in key for key in weights.keys())  # noqa: SIM118
    expected = PeftModel.from_pretrained(
        open_checkpoint(tiny_model).load_model(), tmp_path / "adapter"
    ).merge_and_unload()
    weight = open_checkpoint(tmp_path / "m").load_model().model.language_model.layers[0].mlp.up_proj.weight
    assert torch.equal(weight, expected.model.language_model.layers[0].mlp.up_proj.weight)


def test_an_adapter_that_changes_nothing_fails_verification(tiny_model: Path, held_out: Path, tmp_path: Path) -> None:
    untrained = get_peft_model(
        open_checkpoint(tiny_model).load_model(), LoraConfig(target_modules=r".*language_model\..*q_proj")
    )
    untrained.save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckFailedError, match="changes nothing"):
        merge(tmp_path / "adapter", tmp_path / "m", verify_on=held_out, num_samples=1)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_without_samples_nothing_is_verified(adapter: Path, held_out: Path, tmp_path: Path) -> None:
    (tmp_path / "eval.jsonl").touch()
    with pytest.raises(PokegemmaError, match=r"eval\.jsonl contains no samples"):
        merge(adapter, tmp_path / "model", verify_on=tmp_path / "eval.jsonl")
    assert merge(adapter, tmp_path / "model", verify_on=held_out, num_samples=0) is None


@pytest.mark.parametrize("error", [1.0, float("nan")])
def test_merged_weights_that_say_something_else_fail(error: float) -> None:
    good = {"num_samples": 1, "adapter_effect": 0.5, "merged_error": 1e-6, "stored_error": 1e-3, "dtype": "bfloat16"}
    check_verification(Verification(**good))
    with pytest.raises(CheckFailedError, match="merged weights differ"):
        check_verification(Verification(**{**good, "merged_error": error}))
    with pytest.raises(CheckFailedError, match=r"stored bfloat16 weights differ .*; --dtype float32 keeps them"):
        check_verification(Verification(**{**good, "stored_error": error}))
    with pytest.raises(CheckFailedError, match=r"by 1\.00e-03 of the logits \(at most 0e\+00\)"):
        check_verification(Verification(**good), stored_tolerance=0)


def test_another_base_of_the_same_shape_is_refused(adapter: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    make_tiny_gemma3(other, seed=1, image_size_px=56, num_image_tokens=4)
    weights = load_file(other / "model.safetensors")
    weights["language_model.model.norm.weight"] += 0.1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PokegemmaError, match="is not the base of this adapter"):
        merge(adapter, tmp_path / "m", base=str(other))
    assert not (tmp_path / "m").exists()


def test_a_base_of_another_shape_is_refused_without_a_record(adapter: Path, tiny_model: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(adapter, bare, ignore=shutil.ignore_patterns("run.json"))
    weights = load_file(bare / "adapter_model.safetensors")
    wide = {key: torch.cat([value, value], dim=-1) if "lora_A" in key else value for key, value in weights.items()}
    save_file(wide, bare / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PokegemmaError, match="is it the wrong base"):
        merge(bare, tmp_path / "m", base=str(tiny_model))
    assert not (tmp_path / "m").exists()


def test_the_merged_model_itself_is_not_taken_for_the_base(tiny_model: Path, tmp_path: Path) -> None:
    """A bfloat16 base, as published: its vectors stay the same in merging, only matrices change."""
    base = tmp_path / "base"
    open_checkpoint(tiny_model).load_model(dtype="bfloat16").save_pretrained(base)
    open_checkpoint(tiny_model).processor.save_pretrained(base)
    shutil.copyfile(tiny_model / "tokenizer.model", base / "tokenizer.model")
    model = get_peft_model(
        open_checkpoint(base).load_model(),
        LoraConfig(target_modules=r".*language_model\..*q_proj", init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "adapter")
    write_run_record(
        tmp_path / "adapter", stage="train", options={}, base_fingerprint=open_checkpoint(base).weights_fingerprint()
    )
    merge(tmp_path / "adapter", tmp_path / "m", base=str(base))
    with pytest.raises(PokegemmaError, match="is not the base of this adapter"):
        merge(tmp_path / "adapter", tmp_path / "twice", base=str(tmp_path / "m"))


def test_a_named_checkpoint_keeps_the_layout_of_its_run(adapter: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoint-5"
    shutil.copytree(adapter, checkpoint, ignore=shutil.ignore_patterns("run.json"))
    record = {**read_run_record(adapter), "status": "running"}
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    merge(checkpoint, tmp_path / "m")
    assert read_run_record(tmp_path / "m")["options"]["layout"] == "frames"
    with pytest.raises(PokegemmaError, match="did not finish"):
        read_adapter(tmp_path / "run")


def test_an_output_that_holds_the_adapter_is_refused(adapter: Path) -> None:
    with pytest.raises(PokegemmaError, match=r"--output_path .* contains the input"):
        merge(adapter, adapter.parent, overwrite=True)
    assert (adapter / "adapter_config.json").is_file()


def test_a_quantised_base_is_refused(adapter: Path, quantised_model: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "bare", ignore=shutil.ignore_patterns("run.json"))
    with pytest.raises(PokegemmaError, match="quantised; name the full-precision"):
        merge(tmp_path / "bare", tmp_path / "m", base=str(quantised_model))


def test_an_unfinished_adapter_is_refused(adapter: Path, tmp_path: Path) -> None:
    unfinished = tmp_path / "unfinished"
    (unfinished / "checkpoint-5").mkdir(parents=True)
    with pytest.raises(PokegemmaError, match=r"did not finish \(checkpoint-5\)"):
        read_adapter(unfinished)
    shutil.copytree(adapter, tmp_path / "stopped")
    write_run_record(tmp_path / "stopped", stage="train", options={}, status="interrupted")
    with pytest.raises(PokegemmaError, match="did not finish"):
        read_adapter(tmp_path / "stopped")


def test_a_truncated_adapter_is_refused(adapter: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(adapter, damaged)
    whole = (damaged / "adapter_model.safetensors").read_bytes()
    (damaged / "adapter_model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PokegemmaError, match="incomplete or damaged"):
        read_adapter(damaged)


def test_a_whole_model_is_not_taken_for_an_adapter(tiny_model: Path) -> None:
    with pytest.raises(PokegemmaError, match="nothing to merge"):
        read_adapter(tiny_model)


def test_too_little_disk_space_is_said_before_writing(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    with pytest.raises(PokegemmaError, match=r"GiB needed, 0\.0 GiB free"):
        merge(adapter, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow(7)
def test_a_disk_that_fills_up_leaves_one_line_and_no_folder(adapter: Path, tmp_path: Path) -> None:
    def no_large_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))

    script = PROJECT_ROOT / "scripts" / "merge_qlora.py"
    result = subprocess.run(
        [sys.executable, script, "--lora_path", adapter, "--output_path", tmp_path / "m"],
        capture_output=True,
        text=True,
        preexec_fn=no_large_files,
    )
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith(f"error: {tmp_path / 'm'} could not be written")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_unasked(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "mine.txt").write_text("keep")
    with pytest.raises(PokegemmaError, match="pass --overwrite"):
        merge(adapter, tmp_path / "m")
    assert (tmp_path / "m" / "mine.txt").read_text() == "keep"
