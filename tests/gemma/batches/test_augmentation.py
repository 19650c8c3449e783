"""Augmentation changes colours, is the same for a seed, an epoch and a picture, and never touches evaluation."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pokegemma.data.samples import read_samples
from pokegemma.errors import PokegemmaError
from pokegemma.gemma.batches.augmentation import Augmentation
from pokegemma.gemma.loading import open_checkpoint
from pokegemma.training.options import DataOptions
from tests.processes import call_script

PICTURE = Image.fromarray(np.arange(240 * 160 * 3, dtype=np.uint32).reshape(160, 240, 3).astype(np.uint8))


def changed(path: str = "frames/s/0001.png", **options: float) -> np.ndarray:
    return np.asarray(Augmentation(**options).apply(PICTURE, path))


def test_a_picture_changes_with_seed_epoch_and_path_only() -> None:
    first = changed(colour=0.1, noise=0.02, seed=1)
    assert np.array_equal(first, changed("/elsewhere/frames/s/0001.png", colour=0.1, noise=0.02, seed=1))
    for other in (
        changed(colour=0.1, noise=0.02, seed=2),
        changed(colour=0.1, noise=0.02, seed=1, epoch=1),
        changed("frames/s/0002.png", colour=0.1, noise=0.02, seed=1),
    ):
        assert not np.array_equal(first, other)


def test_colours_change_by_no_more_than_asked_for_and_nothing_moves() -> None:
    recorded, augmented = np.asarray(PICTURE).astype(float), changed(colour=0.1).astype(float)
    assert 1 < np.abs(augmented - recorded).max() <= 255 * 0.2 + 1
    for channel in range(3):
        assert np.corrcoef(recorded[..., channel].ravel(), augmented[..., channel].ravel())[0, 1] > 0.98


def test_noise_has_its_standard_deviation() -> None:
    grey = Image.new("RGB", (240, 160), (128, 128, 128))
    noisy = np.asarray(Augmentation(noise=0.04).apply(grey, "a/b.png")).astype(float)
    assert noisy.std() == pytest.approx(0.04 * 255, rel=0.05)
    assert noisy.mean() == pytest.approx(128, abs=0.5)


@pytest.mark.parametrize("layout", ["grid", "frames", "trajectory"])
def test_the_collator_changes_pictures_and_nothing_else(toy_dataset: Path, tiny_model: Path, layout: str) -> None:
    samples = list(read_samples(toy_dataset / "train.jsonl"))[:2]
    checkpoint = open_checkpoint(tiny_model)
    plain = checkpoint.collator(layout=layout, dataset_folder=toy_dataset)
    augmented = checkpoint.collator(
        layout=layout, dataset_folder=toy_dataset, augmentation=Augmentation(colour=0.1, seed=3)
    )
    expected, batch = plain.prompts(samples), augmented.prompts(samples)
    assert not torch.equal(expected.pop("pixel_values"), batch.pop("pixel_values"))
    assert all(torch.equal(expected[name], batch[name]) for name in expected.keys() | batch.keys())


def test_stored_features_cannot_be_augmented() -> None:
    with pytest.raises(PokegemmaError, match="--augment_colour"):
        DataOptions(dataset_path="data", vision_features="features", augment_colour=0.1)
    with pytest.raises(PokegemmaError, match="--augment_noise"):
        DataOptions(dataset_path="data", augment_noise=0.7)


def train(toy_dataset: Path, tiny_model: Path, output: Path, *flags: object) -> list[float]:
    """Train two steps with a learning rate of 0; return their losses, and the evaluation's as the last."""
    done = call_script(
        "sft_pokemon_gemma3",
        *("--dataset_path", toy_dataset, "--model_name_or_path", tiny_model, "--output_dir", output),
        *("--finetuning", "lora", "--max_steps", "2", "--per_device_train_batch_size", "4", "--report_to", "none"),
        *("--gradient_accumulation_steps", "1", "--logging_steps", "1", "--dataloader_num_workers", "0"),
        *("--learning_rate", "0", "--lr_scheduler_type", "constant", "--warmup_steps", "0", "--lora_dropout", "0"),
        *flags,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    state = next(output.rglob("trainer_state.json"))
    history = json.loads(state.read_text())["log_history"]
    evaluated = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    return [entry["loss"] for entry in history if "loss" in entry] + evaluated[-1:]


@pytest.mark.slow
def test_training_sees_changed_pictures_and_evaluation_the_recorded_ones(
    toy_dataset: Path, tiny_model: Path, tmp_path: Path
) -> None:
    flags = ("--augment_colour", "0.3", "--augment_noise", "0.1")
    plain = train(toy_dataset, tiny_model, tmp_path / "plain")
    first, again = (train(toy_dataset, tiny_model, tmp_path / name, *flags) for name in ("a", "b"))
    assert first == again
    assert len(first) == 3
    assert all(one != other for one, other in zip(plain[:2], first[:2], strict=True))
    assert plain[2] == first[2]
