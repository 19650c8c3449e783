"""Pictures of another size: the model is that of a config of that size, with interpolated position embeddings."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, Gemma3Config, Gemma3ForConditionalGeneration

from pokegemma.data.samples import Sample, read_samples
from pokegemma.errors import PokegemmaError
from pokegemma.evaluation.predict import load_predictor
from pokegemma.export.merge import merge
from pokegemma.gemma.batches.collator import Gemma3Collator
from pokegemma.gemma.loading import open_checkpoint
from pokegemma.gemma.model_image_size import (
    adapter_image_size,
    describe_image_size,
    interpolate_positions,
    picture_facts,
    resize_config,
)
from pokegemma.gemma.tiny.gemma3 import make_tiny_gemma3
from pokegemma.provenance import read_run_record
from pokegemma.training import sft
from pokegemma.training.options import DataOptions, ModelOptions, TrainingOptions
from pokegemma.training.trainable import load_trainable
from tests.processes import call_script

QUICK: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "max_steps": 2,
    "eval_strategy": "no",
    "save_steps": 2,
    "dataloader_num_workers": 0,
    "learning_rate": 1e-2,
    "warmup_steps": 0,
    "use_cpu": True,
    "gradient_checkpointing": False,
}


def published_config() -> Gemma3Config:
    """Return the proportions of google/gemma-3-4b-it: 896 px, patches of 14 px, 4 x 4 of them a token."""
    return Gemma3Config(vision_config={"image_size": 896, "patch_size": 14}, mm_tokens_per_image=256)


def train(dataset: Path, model: Path, output: Path, *, finetuning: str, **changes: Any) -> Path:
    options = ModelOptions(
        model_name_or_path=str(model), finetuning=finetuning, image_size=changes.pop("image_size", 112)
    )
    training = TrainingOptions(output_dir=str(output), **{**QUICK, **changes})
    assert sft.train(DataOptions(dataset_path=str(dataset)), training, options)
    return output


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny checkpoint of 224 px and 256 tokens, whose image processor says 256, too, as published ones do."""
    folder = tmp_path_factory.mktemp("base")
    make_tiny_gemma3(folder)
    config = json.loads((folder / "processor_config.json").read_text())
    config["image_processor"]["image_seq_length"] = 256
    (folder / "processor_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def sample(toy_dataset: Path) -> Sample:
    return next(read_samples(toy_dataset / "train.jsonl"))


@pytest.fixture(scope="module")
def adapter(base: Path, toy_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(toy_dataset, base, tmp_path_factory.mktemp("run") / "adapter", finetuning="lora")


@pytest.fixture(scope="module")
def merged(adapter: Path, toy_dataset: Path) -> Path:
    """Return the adapter merged, and compared on two samples."""
    output = adapter.parent / "merged"
    verification = merge(adapter, output, dtype="float32", verify_on=toy_dataset / "eval.jsonl", num_samples=2)
    assert verification.adapter_effect > 1e-3
    return output


def batch_of(folder: Path, sample: Sample, dataset: Path, image_size_px: int | None = None) -> dict[str, torch.Tensor]:
    processor = open_checkpoint(folder, image_size_px).processor
    return Gemma3Collator(processor=processor, layout="grid", dataset_folder=dataset)([sample])


def test_a_token_is_made_of_as_many_patches_as_before() -> None:
    for size, num_tokens in ((448, 64), (896, 256), (672, 144), (56, 1)):
        config = published_config()
        resize_config(config, size)
        assert (config.vision_config.image_size, config.mm_tokens_per_image) == (size, num_tokens)
    assert describe_image_size(**picture_facts(config)) == "56 px (1 tokens a picture)"


@pytest.mark.parametrize(
    ("size", "nearest"), [(450, "448 px or 504 px"), (224 + 14, "224 px or 280 px"), (10, "56 px"), (-448, "56 px")]
)
def test_a_size_that_does_not_fit_is_refused_with_those_that_do(size: int, nearest: str) -> None:
    with pytest.raises(PokegemmaError, match=rf"--image_size {size}: not a multiple of 56 px.*take {nearest}$"):
        resize_config(published_config(), size)


def test_the_same_size_changes_nothing(base: Path) -> None:
    plain, resized = open_checkpoint(base).load_model(), open_checkpoint(base, image_size=224).load_model()
    assert plain.config.to_dict() == resized.config.to_dict()
    for (name, weight), other in zip(plain.state_dict().items(), resized.state_dict().values(), strict=True):
        assert torch.equal(weight, other), name


def test_without_a_size_nothing_of_the_processor_changes(base: Path) -> None:
    plain, resized = open_checkpoint(base).processor, open_checkpoint(base, 224).processor
    assert plain.to_dict() == resized.to_dict()
    assert plain.full_image_sequence == resized.full_image_sequence


def test_interpolation_keeps_constants_and_linear_ramps() -> None:
    """Cells are centred: the 2 x 2 old cells that a new one covers have it at their middle."""
    side = 16
    row = torch.arange(side, dtype=torch.float32).repeat_interleave(side)
    weight = torch.stack([torch.full((side * side,), 3.0), row], dim=1)
    half = interpolate_positions(weight, side // 2)
    torch.testing.assert_close(half[:, 0], torch.full((64,), 3.0))
    inner = half[:, 1].reshape(8, 8)[2:-2]
    torch.testing.assert_close(inner, (2 * torch.arange(8.0) + 0.5)[2:-2, None].expand(4, 8))
    assert torch.equal(interpolate_positions(half, 8), half)


def test_interpolation_of_bfloat16_is_rounded_only_at_its_end() -> None:
    weight = torch.randn(256, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(interpolate_positions(weight, 8), interpolate_positions(weight.float(), 8).bfloat16())


def test_every_old_position_has_a_say_in_a_much_smaller_picture() -> None:
    """Without antialiasing, a fourth of the size would read 4 of every 16 cells in the middle only."""
    weight = torch.zeros(256, 1, requires_grad=False)
    seen = []
    for place in range(256):
        weight.zero_()[place] = 1.0
        seen.append(interpolate_positions(weight, 2).abs().sum().item())
    assert min(seen) > 1e-4


@pytest.mark.parametrize("size", [112, 280])
def test_hidden_states_are_those_of_a_model_made_for_that_size(
    size: int, base: Path, sample: Sample, toy_dataset: Path
) -> None:
    model = open_checkpoint(base, image_size=size).load_model()
    config = Gemma3Config.from_pretrained(base)
    config.vision_config.image_size = size
    config.mm_tokens_per_image = (size // 14) ** 2
    stock = Gemma3ForConditionalGeneration(config).eval()
    weights = open_checkpoint(base).load_model().state_dict()
    name = next(name for name in weights if name.endswith("position_embedding.weight"))
    grid = weights[name].T.reshape(1, -1, 16, 16)
    grid = torch.nn.functional.interpolate(grid, size=(size // 14, size // 14), mode="bicubic", antialias=size < 224)
    stock.load_state_dict({**weights, name: grid[0].flatten(1).T})
    batch = batch_of(base, sample, toy_dataset, size)
    with torch.inference_mode():
        ours, theirs = (each(**batch, output_hidden_states=True) for each in (model, stock))
    assert ours.image_hidden_states.shape == (1, (size // 14) ** 2, 128)
    assert torch.equal(ours.image_hidden_states, theirs.image_hidden_states)
    assert all(torch.equal(a, b) for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True))
    assert torch.equal(ours.logits, theirs.logits)


def test_everything_that_says_the_size_says_the_same(base: Path) -> None:
    model, processor = open_checkpoint(base, image_size=112).load_model(), open_checkpoint(base, 112).processor
    embeddings, projector = model.model.vision_tower.embeddings, model.model.multi_modal_projector
    assert embeddings.position_embedding.weight.shape == (64, 128)
    assert embeddings.position_ids.tolist() == [list(range(64))]
    assert (embeddings.image_size, embeddings.num_patches, embeddings.num_positions) == (112, 64, 64)
    assert (projector.patches_per_image, projector.tokens_per_side, projector.kernel_size) == (8, 8, 1)
    assert (model.config.vision_config.image_size, model.config.mm_tokens_per_image) == (112, 64)
    assert model.model.vision_tower.config.image_size == 112
    assert processor.image_seq_length == processor.image_processor.image_seq_length == 64
    assert processor.full_image_sequence.count("<image_soft_token>") == 64
    assert dict(processor.image_processor.size) == {"height": 112, "width": 112}


def test_our_batch_is_what_transformers_makes_of_a_resized_processor(
    base: Path, sample: Sample, toy_dataset: Path, tmp_path: Path
) -> None:
    open_checkpoint(base, 112).processor.save_pretrained(tmp_path)
    stock = AutoProcessor.from_pretrained(tmp_path)
    assert stock.full_image_sequence.count("<image_soft_token>") == 64
    batch = batch_of(base, sample, toy_dataset, 112)
    assert batch["pixel_values"].shape == (1, 3, 112, 112)
    assert int(batch["token_type_ids"].sum()) == 64
    collator = Gemma3Collator(processor=stock, layout="grid", dataset_folder=toy_dataset)
    for name, values in collator([sample]).items():
        assert torch.equal(values, batch[name]), name


def test_the_position_embeddings_of_a_quantised_model_are_resized_the_same(base: Path, tmp_path: Path) -> None:
    options = ModelOptions(model_name_or_path=str(base), finetuning="qlora", image_size=112)
    model = load_trainable(
        options.open_checkpoint(), options, TrainingOptions(output_dir=str(tmp_path / "unused"), use_cpu=True)
    )
    whole = open_checkpoint(base, image_size=112).load_model()
    weights = [each.model.vision_tower.embeddings.position_embedding.weight for each in (model, whole)]
    assert type(model.model.language_model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert torch.equal(*weights)


def test_a_run_records_its_size_and_its_adapter_says_it(adapter: Path) -> None:
    record = read_run_record(adapter)
    assert (record["options"]["image_size"], record["image_size_px"], record["image_tokens"]) == (112, 112, 64)
    for folder in (adapter, *adapter.glob("checkpoint-*")):
        processor = AutoProcessor.from_pretrained(folder)
        assert (processor.image_seq_length, processor.image_processor.size["height"]) == (64, 112), folder


def test_the_models_own_size_is_the_run_without_the_option(base: Path, toy_dataset: Path, tmp_path: Path) -> None:
    output = train(toy_dataset, base, tmp_path / "adapter", finetuning="lora", image_size=224, max_steps=1)
    record = read_run_record(output)
    assert (record["options"]["image_size"], record["image_size_px"]) == (None, 224)


def test_a_run_is_not_continued_at_another_size(adapter: Path, base: Path, toy_dataset: Path, tmp_path: Path) -> None:
    copy = tmp_path / "adapter"
    shutil.copytree(adapter, copy)
    with pytest.raises(PokegemmaError, match="image_size was 112, is None"):
        train(toy_dataset, base, copy, finetuning="lora", image_size=None, resume_from_checkpoint="last", max_steps=3)
    record = json.loads((copy / "run.json").read_text())
    del record["options"]["image_size"]  # as runs before the option have it
    (copy / "run.json").write_text(json.dumps(record))
    with pytest.raises(PokegemmaError, match="image_size was None, is 112"):
        train(toy_dataset, base, copy, finetuning="lora", resume_from_checkpoint="last", max_steps=3)


def test_a_resumed_run_keeps_its_size(adapter: Path, base: Path, toy_dataset: Path, tmp_path: Path) -> None:
    copy = tmp_path / "adapter"
    shutil.copytree(adapter, copy)
    train(toy_dataset, base, copy, finetuning="lora", resume_from_checkpoint="last", max_steps=3)
    assert read_run_record(copy)["global_step"] == 3


def test_stock_transformers_loads_the_merged_checkpoint_at_its_size(
    adapter: Path, merged: Path, sample: Sample, toy_dataset: Path
) -> None:
    processor = AutoProcessor.from_pretrained(merged)
    model = AutoModelForImageTextToText.from_pretrained(merged).eval()
    assert (processor.image_seq_length, model.config.mm_tokens_per_image) == (64, 64)
    collator = Gemma3Collator(processor=processor, layout="grid", dataset_folder=toy_dataset)
    ours = load_predictor(adapter, dataset_folder=toy_dataset, layout="grid", dtype="float32", device="cpu")
    assert ours.model.config.mm_tokens_per_image == 64
    with torch.inference_mode():
        expected = ours.model(**ours.collator([sample])).logits
        torch.testing.assert_close(model(**collator([sample])).logits, expected, atol=1e-5, rtol=1e-4)


def test_the_tokenizer_of_a_merged_checkpoint_is_that_of_its_base(merged: Path, base: Path) -> None:
    ours, other = (AutoProcessor.from_pretrained(folder).tokenizer for folder in (merged, base))
    text = "<start_of_turn>user\n\nup\n<start_of_image><image_soft_token><end_of_turn>\n"
    ids = ours(text, add_special_tokens=False)["input_ids"]
    assert ids == other(text, add_special_tokens=False)["input_ids"]
    for skip in (True, False):
        assert ours.decode(ids, skip_special_tokens=skip) == other.decode(ids, skip_special_tokens=skip)
    assert ours.decode(ids, skip_special_tokens=True) == "user\n\nup\n\n"


def test_every_file_of_the_merged_checkpoint_says_the_size(merged: Path) -> None:
    check_files(merged, size=112, num_tokens=64)
    assert read_run_record(merged)["image_size_px"] == 112


def check_files(folder: Path, *, size: int, num_tokens: int) -> None:
    """Check what transformers and llama.cpp's converter read: the size, and the tokens a picture, in every file."""
    config, processor, preprocessor = (
        json.loads((folder / name).read_text())
        for name in ("config.json", "processor_config.json", "preprocessor_config.json")
    )
    assert (config["vision_config"]["image_size"], config["mm_tokens_per_image"]) == (size, num_tokens)
    assert processor["image_seq_length"] == num_tokens
    for image_processor in (processor["image_processor"], preprocessor):
        assert image_processor["size"] == {"height": size, "width": size}
        assert image_processor["image_seq_length"] == num_tokens
        assert image_processor["image_mean"] == image_processor["image_std"] == [0.5, 0.5, 0.5]
    tokens = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"].values()
    special = {token["content"]: token["special"] for token in tokens}
    assert special["<start_of_turn>"] and special["<image_soft_token>"] and not special["\n\n"]
    pooled = size // config["vision_config"]["patch_size"] // math.isqrt(num_tokens)
    assert pooled == 1  # what llama.cpp's converter works out and writes as the projector's scale factor


def test_full_fine_tuning_writes_a_checkpoint_that_says_its_size(
    base: Path, sample: Sample, toy_dataset: Path, tmp_path: Path
) -> None:
    output = train(toy_dataset, base, tmp_path / "full", finetuning="full", learning_rate=1e-4)
    check_files(output, size=112, num_tokens=64)
    model = AutoModelForImageTextToText.from_pretrained(output)
    assert model.model.vision_tower.embeddings.position_embedding.weight.shape == (64, 128)
    batch = batch_of(output, sample, toy_dataset)
    assert model(**batch).loss.isfinite()


def test_an_adapter_without_a_processor_goes_onto_its_base_as_it_is(adapter: Path, tmp_path: Path) -> None:
    assert adapter_image_size(adapter) == 112
    assert adapter_image_size(tmp_path) is None


@pytest.mark.slow
def test_check_train_merge_and_evaluate_agree_on_the_size(
    base: Path, adapter: Path, merged: Path, toy_dataset: Path, tmp_path: Path
) -> None:
    """The check's one step is the script that trains, with its flags."""
    dataset, evaluation = ("--dataset_path", toy_dataset), tmp_path / "evaluation"
    model = ("--model_name_or_path", base, "--finetuning", "lora", "--image_size", 112)
    checks = json.loads(
        run(
            "validate_training",
            *dataset,
            *model,
            "--output_dir",
            tmp_path,
            "--json",
            "--contact_sheet",
            tmp_path / "sheet.png",
        )
    )["checks"]
    summaries = {check["name"]: check["summary"] for check in checks if check["status"] != "FAIL"}
    assert "saved, reloaded" in summaries["one step"]
    lengths = [batch["input_ids"].shape[1] for batch in all_batches(base, toy_dataset, image_size=112)]
    assert f"longest sample {max(lengths)} of" in summaries["token lengths"]
    printed = run(
        "evaluate", "--model_path", merged, *dataset, "--output_dir", evaluation, "--max_samples", 3, "--no_generate"
    )
    assert "image size: 112 px (64 tokens a picture)" in printed
    metrics = json.loads((evaluation / "metrics.json").read_text())
    assert (metrics["image_size_px"], metrics["image_tokens"]) == (112, 64)
    assert "112 px (64 tokens a picture)" in (evaluation / "report.html").read_text()


def run(script: str, *arguments: object) -> str:
    """Run a script of the project; return what it printed to stdout."""
    result = call_script(script, *arguments)
    assert result.returncode == 0, f"{script}: {result.stdout[-2000:]}\n{result.stderr[-2000:]}"
    return result.stdout


def all_batches(base: Path, dataset: Path, *, image_size: int) -> list[dict[str, torch.Tensor]]:
    files = (dataset / "train.jsonl", dataset / "eval.jsonl")
    return [batch_of(base, sample, dataset, image_size) for file in files for sample in read_samples(file)]
