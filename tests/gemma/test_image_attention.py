"""Causal attention inside pictures: stock transformers without token types, in every layout and wherever it is read."""

import json
import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, Gemma3nConfig, Gemma3Processor, Gemma4Config

from pokegemma.data.prompts import build_messages, build_trajectory_messages, sample_images, trajectory_images
from pokegemma.data.samples import Sample
from pokegemma.data.trajectories import Trajectory
from pokegemma.errors import PokegemmaError
from pokegemma.evaluation.predict import Predictor, load_predictor
from pokegemma.evaluation.trajectories import predict_trajectories
from pokegemma.export.merge import merge
from pokegemma.gemma import block_attention
from pokegemma.gemma.batches.collator import Gemma3Collator
from pokegemma.gemma.batches.feature_encoder import prepare_cache
from pokegemma.gemma.families import stop_tokens
from pokegemma.gemma.image_attention import adapter_image_attention, is_causal
from pokegemma.gemma.loading import open_checkpoint
from pokegemma.provenance import read_run_record
from pokegemma.training import sft
from pokegemma.training.options import DataOptions, ModelOptions, TrainingOptions
from tests.gemma.test_model_image_size import QUICK
from tests.processes import call_script
from tests.training.test_fast_paths import assert_same, loss_and_gradients, stock_batch, stock_model, with_lora


def train(dataset: Path, model: Path, output: Path, **changes: Any) -> Path:
    named = {name: changes.pop(name, default) for name, default in (("finetuning", "lora"), ("image_attention", None))}
    training = TrainingOptions(output_dir=str(output), **{**QUICK, **changes})
    assert sft.train(DataOptions(dataset_path=str(dataset)), training, ModelOptions(str(model), **named))
    return output


@pytest.fixture(scope="module")
def causal_processor(tiny_model: Path) -> Gemma3Processor:
    return open_checkpoint(tiny_model, image_attention="causal").processor


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, toy_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(toy_dataset, tiny_model, tmp_path_factory.mktemp("run") / "adapter", image_attention="causal")


@pytest.fixture(scope="module")
def merged(adapter: Path, toy_dataset: Path) -> Path:
    output = adapter.parent / "merged"
    assert merge(adapter, output, dtype="float32", verify_on=toy_dataset / "eval.jsonl", num_samples=2)
    return output


@pytest.fixture
def mixed(samples: list[Sample]) -> list[Sample]:
    """Return four samples of two sessions with one to four pictures."""
    chosen = [samples[place] for place in (3, 7, 15, 29)]
    return [replace(chosen[0], frames=chosen[0].frames[-1:]), *chosen[1:]]


def without_token_types(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: values for name, values in batch.items() if name != "token_type_ids"}


def stock_result(tiny_model: Path, conversations: list[tuple], folder: Path, *, causal: bool) -> tuple:
    batch = stock_batch(conversations, open_checkpoint(tiny_model).processor, folder)
    assert batch["token_type_ids"].any()
    return loss_and_gradients(with_lora(stock_model(tiny_model)), without_token_types(batch) if causal else batch)


@pytest.mark.parametrize(
    ("layout", "samples_per_row", "attention", "cached"),
    [
        ("grid", 1, "sdpa", False),
        ("frames", 1, "eager", False),
        ("frames", 4, "sdpa", False),
        ("frames", 4, "eager", False),
        ("frames", 2, "sdpa", True),
    ],
)
def test_loss_and_gradients_are_those_of_stock_transformers_without_token_types(
    layout: str,
    samples_per_row: int,
    attention: str,
    cached: bool,
    mixed: list[Sample],
    tiny_model: Path,
    causal_processor: Gemma3Processor,
    toy_dataset: Path,
    tmp_path: Path,
) -> None:
    conversations = [(build_messages(one, layout), sample_images(one, layout)) for one in mixed]
    model = open_checkpoint(tiny_model, image_attention="causal").load_model(attn_implementation=attention)
    collator = Gemma3Collator(causal_processor, layout, toy_dataset, samples_per_row)
    if cached:
        paths = [str(toy_dataset / path) for sample in mixed for path in sample.frames]
        collator.features = prepare_cache(tmp_path / "features", model, causal_processor, paths, device=model.device)
    ours = loss_and_gradients(with_lora(model), collator(mixed))
    assert_same(ours, stock_result(tiny_model, conversations, toy_dataset, causal=True))
    bidirectional = stock_result(tiny_model, conversations, toy_dataset, causal=False)
    assert abs(ours[0] - bidirectional[0]) > 1e-3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_trajectory_is_causal_inside_its_pictures(
    attention: str,
    samples: list[Sample],
    tiny_model: Path,
    causal_processor: Gemma3Processor,
    toy_dataset: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(block_attention, "QUERIES_PER_BLOCK", 50)
    trajectory = Trajectory(tuple(samples[3:7]))
    parts = [Trajectory(trajectory.samples[:end]) for end in range(1, 5)]
    conversations = [(build_trajectory_messages(part), trajectory_images(part)) for part in parts]
    model = with_lora(open_checkpoint(tiny_model, image_attention="causal").load_model(attn_implementation=attention))
    ours = loss_and_gradients(model, Gemma3Collator(causal_processor, "trajectory", toy_dataset)([trajectory]))
    assert_same(ours, stock_result(tiny_model, conversations, toy_dataset, causal=True))
    assert abs(ours[0] - stock_result(tiny_model, conversations, toy_dataset, causal=False)[0]) > 1e-3


def test_a_conversation_with_a_cache_scores_as_stock_rows_without_token_types(
    samples: list[Sample], tiny_model: Path, causal_processor: Gemma3Processor, toy_dataset: Path
) -> None:
    trajectory = Trajectory(tuple(samples[3:6]))
    collator = Gemma3Collator(causal_processor, "trajectory", toy_dataset)
    model = open_checkpoint(tiny_model, image_attention="causal").load_model()
    said = predict_trajectories(Predictor(model, collator, max_new_tokens=6), [trajectory])
    batch = collator([trajectory])
    row, tokens = collator.tokenize(trajectory), collator.button_tokens
    stock = stock_model(tiny_model)
    for start, scores, answer in zip(row.answer_starts, said.scores, said.answers, strict=True):
        num_pictures = row.ids[:start].count(model.config.image_token_index) // 4
        pixels = batch["pixel_values"][batch["image_index"][:num_pictures]]
        with torch.inference_mode():
            expected = []
            for branch in tokens.branches:
                ids = torch.tensor([[*row.ids[:start], *tokens.prefix, *branch]])
                logits = stock(input_ids=ids, pixel_values=pixels).logits[0].log_softmax(-1)
                places = range(ids.shape[1] - len(branch), ids.shape[1])
                expected.append(sum(logits[place - 1, ids[0, place]] for place in places))
            written = stock.generate(
                input_ids=torch.tensor([row.ids[:start]]), pixel_values=pixels, max_new_tokens=6, do_sample=False
            )
        assert scores == pytest.approx(torch.stack(expected).softmax(-1).numpy(), abs=1e-5)
        tokenizer = causal_processor.tokenizer
        assert answer.text == tokenizer.decode(written[0, start:], skip_special_tokens=True)


def test_stock_processors_read_the_switch_of_checkpoints_and_adapters(adapter: Path, merged: Path) -> None:
    """By the tokenizer's config, which transformers means to stop reading in 5.29: then this fails, and docs change."""
    messages = [{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (56, 56))}]}]
    for folder in (merged, adapter, *adapter.glob("checkpoint-*")):
        processor = AutoProcessor.from_pretrained(folder)
        made = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
        assert set(made) == {"input_ids", "attention_mask", "pixel_values"}, folder
        assert is_causal(processor), folder


def test_stock_generate_matches_our_scores_of_a_causal_model(
    merged: Path, samples: list[Sample], toy_dataset: Path
) -> None:
    predictor = load_predictor(
        merged, dataset_folder=toy_dataset, layout="grid", dtype="float32", device="cpu", max_new_tokens=12
    )
    processor, model = AutoProcessor.from_pretrained(merged), AutoModelForImageTextToText.from_pretrained(merged)
    for sample in samples[:3]:
        messages = build_messages(sample, "grid")[:1]
        picture = {"type": "image", "image": Image.open(toy_dataset / sample.image).convert("RGB")}
        content = [picture if part["type"] == "image" else part for part in messages[0]["content"]]
        made = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
        )
        with torch.inference_mode():
            batch = predictor.collator.prompts([sample])
            assert torch.equal(made["input_ids"], batch["input_ids"])
            torch.testing.assert_close(model(**made).logits, predictor.model(**batch).logits, atol=1e-5, rtol=1e-4)
            stops = stop_tokens(processor.tokenizer)
            written = model.generate(**made, max_new_tokens=12, do_sample=False, eos_token_id=stops)
        text = processor.tokenizer.decode(written[0, made["input_ids"].shape[1] :], skip_special_tokens=True)
        assert text == predictor.generate([sample])[0].text


def test_everything_a_run_leaves_says_causal(adapter: Path, merged: Path, tiny_model: Path) -> None:
    assert json.loads((merged / "config.json").read_text())["image_attention"] == "causal"
    assert "image_attention" not in json.loads((tiny_model / "config.json").read_text())
    for folder in (adapter, merged):
        assert read_run_record(folder)["image_attention"] == "causal"
    assert adapter_image_attention(adapter) == "causal"
    assert adapter_image_attention(tiny_model) is None


def test_adapter_and_merged_checkpoint_give_the_same_causal_scores(
    adapter: Path, merged: Path, tiny_model: Path, samples: list[Sample], toy_dataset: Path, tmp_path: Path
) -> None:
    shutil.copytree(adapter, tmp_path / "told nothing")
    path = tmp_path / "told nothing" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["return_mm_token_type_ids"]
    path.write_text(json.dumps(config))
    view = {"dataset_folder": toy_dataset, "layout": "frames", "dtype": "float32", "device": "cpu"}
    of = {folder: load_predictor(folder, **view).score(samples[:4]) for folder in (adapter, merged, path.parent)}
    assert of[adapter] == pytest.approx(of[merged], abs=1e-5)
    assert abs(of[path.parent] - of[adapter]).max() > 1e-4


def test_config_json_wins_over_tokenizer_files_of_another_model(merged: Path, tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(merged, tmp_path / "copy")
    shutil.copyfile(tiny_model / "tokenizer_config.json", tmp_path / "copy" / "tokenizer_config.json")
    assert is_causal(open_checkpoint(tmp_path / "copy").processor)
    shutil.copytree(tiny_model, tmp_path / "other")
    shutil.copyfile(merged / "tokenizer_config.json", tmp_path / "other" / "tokenizer_config.json")
    assert not is_causal(open_checkpoint(tmp_path / "other").processor)


def test_a_run_is_not_continued_with_another_attention(
    adapter: Path, tiny_model: Path, toy_dataset: Path, tmp_path: Path
) -> None:
    shutil.copytree(adapter, tmp_path / "adapter")
    again = {"resume_from_checkpoint": "last", "max_steps": 3}
    for asked in (None, "bidirectional"):
        with pytest.raises(PokegemmaError, match="image_attention was causal, is None"):
            train(toy_dataset, tiny_model, tmp_path / "adapter", image_attention=asked, **again)
    train(toy_dataset, tiny_model, tmp_path / "adapter", image_attention="causal", **again)
    assert read_run_record(tmp_path / "adapter")["global_step"] == 3


@pytest.mark.parametrize("finetuning", ["lora", "full"])
def test_what_is_trained_on_a_causal_model_is_causal_without_being_told(
    finetuning: str, merged: Path, samples: list[Sample], toy_dataset: Path, tmp_path: Path
) -> None:
    output = train(toy_dataset, merged, tmp_path / "again", finetuning=finetuning, max_steps=1, learning_rate=1e-4)
    assert read_run_record(output)["image_attention"] == "causal"
    predictor = load_predictor(output, dataset_folder=toy_dataset, layout="grid", dtype="float32", device="cpu")
    assert predictor.model.config.image_attention == "causal"
    assert not predictor.collator.prompts(samples[:1])["token_type_ids"].any()


def test_a_causal_model_is_not_trained_to_be_bidirectional(merged: Path, toy_dataset: Path, tmp_path: Path) -> None:
    message = "--image_attention bidirectional: .*merged was trained .*causal"
    with pytest.raises(PokegemmaError, match=message):
        train(toy_dataset, merged, tmp_path / "again", image_attention="bidirectional")
    with pytest.raises(PokegemmaError, match="--image_attention both: not one of bidirectional, causal"):
        open_checkpoint(merged, image_attention="both")


@pytest.mark.parametrize(("config", "name"), [(Gemma3nConfig(), "Gemma 3n"), (Gemma4Config(), "Gemma 4")])
def test_other_families_refuse_it_by_name(
    config: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.save_pretrained(tmp_path)
    monkeypatch.setattr("pokegemma.gemma.families.is_timm_available", lambda: True)  # the config needs none
    with pytest.raises(PokegemmaError, match=f"^--image_attention: not exact for {name}"):
        open_checkpoint(tmp_path, image_attention="causal")


def test_the_switch_goes_with_a_processor_to_the_workers_of_a_data_loader(causal_processor: Gemma3Processor) -> None:
    assert is_causal(pickle.loads(pickle.dumps(causal_processor)))


@pytest.mark.slow
def test_check_and_evaluation_take_a_model_as_causal(
    tiny_model: Path, merged: Path, toy_dataset: Path, tmp_path: Path
) -> None:
    dataset, evaluation = ("--dataset_path", toy_dataset), tmp_path / "evaluation"
    check = (*dataset, "--finetuning", "lora", "--output_dir", tmp_path, "--contact_sheet", tmp_path / "sheet.png")
    told = ("--model_name_or_path", tiny_model, "--image_attention", "causal")
    checks = json.loads(run("validate_training", *check, *told, "--json"))["checks"]
    assert "saved, reloaded" in next(check["summary"] for check in checks if check["name"] == "one step")
    run("evaluate", "--model_path", merged, *dataset, "--output_dir", evaluation, "--max_samples", 3, "--no_generate")
    assert json.loads((evaluation / "metrics.json").read_text())["image_attention"] == "causal"
    assert re.search(r"image attention\W.*\bcausal\b", (evaluation / "report.html").read_text())


def run(script: str, *arguments: object) -> str:
    """Run a script of the project; return what it printed to stdout."""
    result = call_script(script, *arguments)
    assert result.returncode == 0, f"{script}: {result.stdout[-2000:]}\n{result.stderr[-2000:]}"
    return result.stdout
