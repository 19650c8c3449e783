"""Every family through training, merging and evaluation, for real, on tiny checkpoints."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from pokegemma.data.prompts import BUTTONS
from pokegemma.data.samples import Sample
from pokegemma.errors import PokegemmaError
from pokegemma.evaluation import predict
from pokegemma.export.merge import merge
from pokegemma.gemma.batches.processor_collator import make_collator
from pokegemma.gemma.button_scores import score_by_rows
from pokegemma.gemma.button_tokens import ButtonTokens
from pokegemma.gemma.loading import open_checkpoint
from pokegemma.gemma.tiny.gemma3 import _published_key
from pokegemma.training import sft
from pokegemma.training.options import DataOptions, ModelOptions, TrainingOptions
from pokegemma.training.preflight import memory, token_lengths
from pokegemma.training.preflight.model_access import check_model_access

FAMILIES = ["gemma3n", "gemma4", "gemma4_large"]


def train(dataset: Path, model: Path, output: Path, *, options: dict[str, Any], **changes: Any) -> None:
    training = TrainingOptions(
        output_dir=str(output),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1,
        max_steps=2,
        eval_steps=2,
        save_steps=2,
        logging_steps=1,
        dataloader_num_workers=0,
        learning_rate=1e-3,
        warmup_steps=0,
        use_cpu=True,
        report_to="none",
        **changes,
    )
    data = {name: options.pop(name) for name in ("samples_per_row", "vision_features") if name in options}
    assert sft.train(
        DataOptions(dataset_path=str(dataset), **data), training, ModelOptions(model_name_or_path=str(model), **options)
    )


def losses_of(output: Path) -> list[float]:
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry[key] for entry in history for key in ("loss", "eval_loss") if key in entry]


def plain_scores(model: torch.nn.Module, collator, sample: Sample, tokens: ButtonTokens) -> torch.Tensor:
    """Write each answer out alone, without padding, and multiply its tokens' probabilities."""
    scores = []
    for branch in tokens.branches:
        batch = collator.prompts([sample])
        start = batch["input_ids"].shape[1]
        added = torch.tensor([[*tokens.prefix, *branch]])
        batch["input_ids"] = torch.cat([batch["input_ids"], added], 1)
        for name, value in (("attention_mask", 1), (collator.family.token_types, 0)):
            batch[name] = torch.nn.functional.pad(batch[name], (0, added.shape[1]), value=value)
        with torch.no_grad():
            logits = model(**batch).logits[0].log_softmax(-1)
        start += len(tokens.prefix) - 1
        scores.append(sum(logits[start + at, token] for at, token in enumerate(branch)))
    return torch.stack(scores).softmax(-1)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_is_trained_merged_and_evaluated(
    name: str, other_models, toy_dataset: Path, samples: list[Sample], tmp_path: Path
) -> None:
    base, adapter, merged = other_models(name), tmp_path / "adapter", tmp_path / "merged"
    train(toy_dataset, base, adapter, options={"finetuning": "lora"})  # with gradient checkpointing, the default
    assert len(losses_of(adapter)) == 3 and all(map(math.isfinite, losses_of(adapter)))
    weights = load_file(adapter / "adapter_model.safetensors")
    assert all(weight.abs().max() > 0 for key, weight in weights.items() if "lora_B" in key)
    assert all(".language_model." in key for key in weights)

    verification = merge(adapter, merged, dtype="float32", verify_on=toy_dataset / "eval.jsonl", num_samples=2)
    assert verification.adapter_effect > 1e-3 and verification.stored_error < 1e-4
    assert set(load_file(merged / "model.safetensors")) == set(load_file(base / "model.safetensors"))
    assert (merged / "tokenizer.model").exists() == (base / "tokenizer.model").exists()

    options: dict[str, Any] = {"dataset_folder": toy_dataset, "layout": "frames", "dtype": "float32", "device": "cpu"}
    predictor = predict.load_predictor(merged, max_new_tokens=4, **options)
    answers, scores = predictor.predict(samples[:3], batch_size=3)
    assert len(answers) == 3 and all(answer.text for answer in answers)
    assert scores.shape == (3, len(BUTTONS)) and scores.sum(1) == pytest.approx(1)
    assert predict.load_predictor(adapter, **options).score(samples[:3]) == pytest.approx(scores, abs=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_scores_are_those_of_plain_rows(name: str, other_models, toy_dataset: Path, samples: list[Sample]) -> None:
    predictor = predict.load_predictor(
        other_models(name), dataset_folder=toy_dataset, layout="grid", dtype="float32", device="cpu"
    )
    tokens = ButtonTokens(
        prefix=(20, 21), branches=((30,), (31,), (32, 33), (32, 34), (35, 36, 37), (35, 36, 38), (39,), (40,))
    )
    scores = score_by_rows(predictor.model, predictor.collator.prompts(samples[4:6]), tokens)
    for sample, row in zip(samples[4:6], scores, strict=True):
        expected = plain_scores(predictor.model, predictor.collator, sample, tokens)
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_nf4_weights_train(name: str, other_models, toy_dataset: Path, tmp_path: Path) -> None:
    train(toy_dataset, other_models(name), tmp_path / "adapter", options={"finetuning": "qlora"})
    assert all(map(math.isfinite, losses_of(tmp_path / "adapter")))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3n", "gemma4"])
def test_full_fine_tuning_leaves_the_audio_alone(name: str, other_models, toy_dataset: Path, tmp_path: Path) -> None:
    base, output = other_models(name), tmp_path / "model"
    options = {"finetuning": "full", "train_vision_tower": True, "train_projector": True}
    train(toy_dataset, base, output, options=options)
    before, after = load_file(base / "model.safetensors"), load_file(output / "model.safetensors")
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert not any("audio" in key for key in changed)
    for part in ("language_model.layers.0", "vision_tower", "embed_vision"):
        assert any(part in key for key in changed), part


@pytest.mark.parametrize("name", ["gemma3n", "gemma4"])
def test_checkpointing_keeps_the_gradients_of_shared_keys(
    name: str, other_models, toy_dataset: Path, samples: list[Sample]
) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = open_checkpoint(other_models(name)).load_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        collator = make_collator(
            open_checkpoint(other_models(name)).processor, layout="grid", dataset_folder=toy_dataset
        )
        model(**collator(samples[:2]), use_cache=False).loss.backward()
        gradients.append(model.model.language_model.layers[0].self_attn.k_proj.weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("option", [{"samples_per_row": 2}, {"vision_features": "features"}])
def test_training_refuses_fast_paths_of_gemma_3(option, other_models, toy_dataset: Path, tmp_path: Path) -> None:
    name = next(iter(option))
    with pytest.raises(PokegemmaError, match=f"--{name}: not exact for Gemma 4"):
        train(toy_dataset, other_models("gemma4"), tmp_path / "out", options={"finetuning": "lora", **option})


@pytest.mark.parametrize("name", FAMILIES)
def test_checks_before_training_know_the_family(name: str, other_models) -> None:
    folder = other_models(name)
    access = check_model_access(str(folder))
    assert access.status == "PASS" and f"{open_checkpoint(folder).family.name}, 4 layers" in access.summary
    config = open_checkpoint(folder).config
    size = memory.measure_model(config)
    body = open_checkpoint(folder).load_model().model
    assert size.num_weights == sum(weight.numel() for weight in body.parameters())
    lengths = token_lengths.TokenLengths(200, 100, 40, 400, 2)
    estimate = memory.estimate_memory(
        config, size, finetuning="lora", lora_r=16, lengths=lengths, batch_size=1, bytes_per_weight=4
    )
    assert all(part > 0 for part in estimate.values())


def test_a_gemma_3_of_other_proportions_trains(tiny_model: Path, toy_dataset: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    open_checkpoint(tiny_model).processor.save_pretrained(base)
    (base / "tokenizer.model").write_bytes((tiny_model / "tokenizer.model").read_bytes())
    record = json.loads((tiny_model / "config.json").read_text())
    record["text_config"] |= {
        "num_hidden_layers": 8,
        "hidden_size": 96,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 16,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"] + ["sliding_attention"] * 2,
    }
    record["vision_config"] |= {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2}
    Gemma3ForConditionalGeneration(Gemma3Config(**record)).save_pretrained(base)
    weights = load_file(base / "model.safetensors")
    weights = {_published_key(key): value for key, value in weights.items()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    train(toy_dataset, base, tmp_path / "adapter", options={"finetuning": "lora"})
    verification = merge(
        tmp_path / "adapter", tmp_path / "merged", dtype="float32", verify_on=toy_dataset / "eval.jsonl", num_samples=1
    )
    assert verification.adapter_effect > 0 and verification.stored_error < 1e-4
