"""Each fast path against stock transformers and TRL in float32: the same loss (1e-5), the same gradients (1e-4)."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch import nn
from transformers import Gemma3ForConditionalGeneration, Gemma3Processor
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from pokegemma.data.prompts import (
    Layout,
    build_messages,
    build_output,
    build_trajectory_messages,
    sample_images,
    trajectory_images,
)
from pokegemma.data.samples import Sample
from pokegemma.data.trajectories import Trajectory
from pokegemma.gemma import block_attention
from pokegemma.gemma.batches.collator import Gemma3Collator
from pokegemma.gemma.batches.feature_encoder import prepare_cache
from pokegemma.gemma.families import FAMILIES
from pokegemma.gemma.loading import open_checkpoint
from pokegemma.training.lora_targets import lora_config
from pokegemma.training.options import ModelOptions, TrainingOptions
from pokegemma.training.trainer import PokemonTrainer

MakeCollator = Callable[[str], Gemma3Collator]
Gradients = dict[str, torch.Tensor]
LORA = ModelOptions(model_name_or_path="tiny", finetuning="lora", lora_dropout=0.0)


@pytest.fixture(scope="module")
def mixed(samples: list[Sample]) -> list[Sample]:
    """Return six samples of two sessions with one to four pictures and texts of different lengths."""
    output = build_output(button="select", reasoning="a much longer reason than all the others", context="menu")
    chosen = [samples[place] for place in (3, 5, 7, 15, 16, 29)]
    chosen[0] = replace(chosen[0], frames=chosen[0].frames[-1:])
    chosen[1] = replace(chosen[1], output=output)
    chosen[2] = replace(chosen[2], frames=chosen[2].frames[-2:], question="Next button?")
    chosen[3] = replace(chosen[3], context=chosen[3].context + " and another goal")
    return chosen


def stock_model(folder: Path) -> Gemma3ForConditionalGeneration:
    """Return the checkpoint as transformers loads it, without anything of ours."""
    return Gemma3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)


def stock_batch(conversations: list[tuple], processor: Gemma3Processor, folder: Path) -> dict[str, torch.Tensor]:
    """Return what TRL's collator makes of (messages, picture paths): loss on the last answer alone."""
    examples = [
        {
            "prompt": messages[:-1],
            "completion": messages[-1:],
            "images": [Image.open(folder / path).convert("RGB") for path in paths],
        }
        for messages, paths in conversations
    ]
    return DataCollatorForVisionLanguageModeling(processor=processor, max_length=None, completion_only_loss=True)(
        examples
    )


def with_lora(model: nn.Module, *, everything: bool = False) -> nn.Module:
    """Return the model with an adapter that has an effect, on the language model or on the tower, too."""
    from peft import get_peft_model

    options = replace(LORA, train_vision_tower=everything, train_projector=everything)
    adapted = get_peft_model(model, lora_config(options, FAMILIES["gemma3"]))
    generator = torch.Generator().manual_seed(0)
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            with torch.no_grad():
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.05)
    return adapted.train()


def loss_and_gradients(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[float, Gradients]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), {name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None}


def assert_same(ours: tuple[float, Gradients], expected: tuple[float, Gradients]) -> None:
    assert ours[0] == pytest.approx(expected[0], abs=1e-5)
    assert ours[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert gradient.norm() > 0, name
        assert (ours[1][name] - gradient).norm() <= 1e-4 * gradient.norm(), name


@contextmanager
def count_tower(model: nn.Module) -> Iterator[dict[str, int]]:
    """Count the pictures that the tower is shown, and how often its first attention runs forward and backward.

    Attention and not the tower: checkpointing runs again what is in a layer.
    """
    tower = next(module for name, module in model.named_modules() if name.endswith("vision_tower"))
    counts = {"forward": 0, "backward": 0, "pictures": 0}

    def pictures(module: nn.Module, args: tuple, kwargs: dict) -> None:
        counts["pictures"] += len(kwargs["pixel_values"])

    def forward(module: nn.Module, args: tuple) -> None:
        counts["forward"] += 1

    def backward(module: nn.Module, *gradients: object) -> None:
        counts["backward"] += 1

    layer = next(module for name, module in tower.named_modules() if name.endswith("layers.0.self_attn"))
    handles = [
        tower.register_forward_pre_hook(pictures, with_kwargs=True),
        layer.register_forward_pre_hook(forward),
        layer.register_full_backward_hook(backward),
    ]
    yield counts
    for handle in handles:
        handle.remove()


@pytest.fixture(scope="module")
def expected(
    mixed: list[Sample], processor: Gemma3Processor, toy_dataset: Path, tiny_model: Path
) -> Callable[..., tuple[float, Gradients]]:
    """Return a function that computes loss and gradients of the mixed samples with stock parts."""

    @functools.cache
    def compute(layout: Layout, *, everything: bool = False) -> tuple[float, Gradients]:
        conversations = [(build_messages(one, layout), sample_images(one, layout)) for one in mixed]
        model = with_lora(stock_model(tiny_model), everything=everything)
        return loss_and_gradients(model, stock_batch(conversations, processor, toy_dataset))

    return compute


@pytest.mark.parametrize("layout", ["grid", "frames"])
def test_a_frozen_tower_without_gradients_has_the_same_loss(
    layout: Layout, mixed: list[Sample], make_collator: MakeCollator, tiny_model: Path, expected: Callable
) -> None:
    model = with_lora(open_checkpoint(tiny_model).load_model())
    assert_same(loss_and_gradients(model, make_collator(layout)(mixed)), expected(layout))


@pytest.mark.parametrize("layout", ["grid", "frames"])
def test_encoding_each_picture_once_keeps_the_tower_gradients(
    layout: Layout, mixed: list[Sample], make_collator: MakeCollator, tiny_model: Path, expected: Callable
) -> None:
    model = with_lora(open_checkpoint(tiny_model).load_model(), everything=True)
    ours = loss_and_gradients(model, make_collator(layout)(mixed))
    assert any("vision_tower" in name for name in ours[1])
    assert any("multi_modal_projector" in name for name in ours[1])
    assert_same(ours, expected(layout, everything=True))


@pytest.mark.parametrize("layout", ["grid", "frames"])
def test_cached_features_give_the_same_loss_without_running_the_tower(
    layout: Layout,
    mixed: list[Sample],
    make_collator: MakeCollator,
    tiny_model: Path,
    toy_dataset: Path,
    tmp_path: Path,
    expected: Callable,
) -> None:
    model, collator = open_checkpoint(tiny_model).load_model(), make_collator(layout)
    paths = [str(toy_dataset / path) for sample in mixed for path in collator.picture_paths(sample)]
    cache = prepare_cache(tmp_path / "features", model, collator.processor, paths, device=model.device)
    model = with_lora(model)
    with count_tower(model) as counts:
        ours = loss_and_gradients(model, replace(collator, features=cache)(mixed))
    assert counts == {"forward": 0, "backward": 0, "pictures": 0}
    assert_same(ours, expected(layout))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layout", ["grid", "frames"])
@pytest.mark.parametrize("samples_per_row", [2, 4, 6])
def test_samples_that_share_a_row_have_the_same_loss_and_gradients(
    samples_per_row: int,
    layout: Layout,
    attention: str,
    mixed: list[Sample],
    make_collator: MakeCollator,
    tiny_model: Path,
    expected: Callable,
) -> None:
    model = with_lora(open_checkpoint(tiny_model).load_model(attn_implementation=attention))
    collator = make_collator(layout)
    batch = replace(collator, samples_per_row=samples_per_row)(mixed)
    assert len(batch["input_ids"]) == -(-len(mixed) // samples_per_row)
    assert batch["attention_mask"].sum() < sum(map(collator.count_tokens, mixed))
    assert_same(loss_and_gradients(model, batch), expected(layout))


def test_the_masks_of_plain_rows_are_wrong_for_shared_rows(
    mixed: list[Sample], make_collator: MakeCollator, tiny_model: Path, expected: Callable
) -> None:
    batch = replace(make_collator("frames"), samples_per_row=6)(mixed)
    del batch["branches"]
    model = with_lora(open_checkpoint(tiny_model).load_model())
    assert abs(loss_and_gradients(model, batch)[0] - expected("frames")[0]) > 1e-3


@pytest.mark.parametrize("queries_per_block", [512, 50])
@pytest.mark.parametrize("num_context", [0, 2])
def test_a_trajectory_has_the_loss_of_its_decisions_one_by_one(
    num_context: int,
    queries_per_block: int,
    samples: list[Sample],
    make_collator: MakeCollator,
    processor: Gemma3Processor,
    tiny_model: Path,
    toy_dataset: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(block_attention, "QUERIES_PER_BLOCK", queries_per_block)
    trajectory = Trajectory(tuple(samples[3:9]), num_context)
    assert len({sample.session for sample in trajectory.samples}) == 1
    parts = [Trajectory(trajectory.samples[: end + 1], num_context) for end in range(num_context, 6)]
    conversations = [(build_trajectory_messages(part), trajectory_images(part)) for part in parts]
    stock = loss_and_gradients(with_lora(stock_model(tiny_model)), stock_batch(conversations, processor, toy_dataset))
    model = with_lora(open_checkpoint(tiny_model).load_model())
    with count_tower(model) as counts:
        ours = loss_and_gradients(model, make_collator("trajectory")([trajectory]))
    assert counts["pictures"] == len(set(trajectory_images(trajectory)))
    assert_same(ours, stock)


def test_a_trajectory_of_one_decision_equals_the_frames_layout(
    samples: list[Sample], make_collator: MakeCollator
) -> None:
    chosen = samples[4:7]  # whose windows are full of different frames
    frames = make_collator("frames")(chosen)
    for row in ([Trajectory((sample,)) for sample in chosen], chosen):
        batch = make_collator("trajectory")(row)
        assert all(torch.equal(batch[name], value) for name, value in frames.items())


def trainer_options(folder: Path) -> dict[str, object]:
    return {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        # Not Adam: it divides by the size of a gradient, so the rounding of one near 0 moves its weight by a step.
        "optim": "sgd",
        "learning_rate": 0.1,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "dataloader_num_workers": 0,
        "warmup_steps": 0,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "gradient_checkpointing": True,
        "save_strategy": "no",
        "eval_strategy": "no",
        "max_length": None,
        "bf16": False,
    }


def steps_of(trainer: SFTTrainer) -> list[tuple[float, float]]:
    trainer.train()
    return [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.slow
def test_training_matches_stock_trl_with_one_tower_pass_a_picture(
    samples: list[Sample], tiny_model: Path, toy_dataset: Path, make_collator: MakeCollator, tmp_path: Path
) -> None:
    """Stock TRL runs the frozen tower twice forward and once backward for every picture of every sample."""
    rows = []
    for sample in samples:
        user, answer = build_messages(sample, "frames")
        images = [str(toy_dataset / path) for path in sample.frames]
        rows.append({"prompt": [user], "completion": [answer], "images": images})
    collator = make_collator("frames")

    def collate(examples: list[dict]) -> dict[str, torch.Tensor]:
        loaded = [{**row, "images": [Image.open(path).convert("RGB") for path in row["images"]]} for row in examples]
        return DataCollatorForVisionLanguageModeling(
            processor=collator.processor, max_length=None, completion_only_loss=True
        )(loaded)

    config = SFTConfig(
        **trainer_options(tmp_path / "stock"),
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    stock = SFTTrainer(
        model=stock_model(tiny_model),
        args=config,
        train_dataset=Dataset.from_list(rows),
        data_collator=collate,
        processing_class=collator.processor,
        peft_config=lora_config(LORA, FAMILIES["gemma3"]),
    )
    with count_tower(stock.model) as counts:
        expected = steps_of(stock)
    assert counts == {"forward": 2 * 6, "backward": 6, "pictures": 6 * 4 * 4}

    ours = [{"sample": sample.to_json()} for sample in samples]
    model = open_checkpoint(tiny_model).load_model()
    paths = [str(toy_dataset / path) for sample in samples for path in sample.frames]
    cache = prepare_cache(tmp_path / "features", model, collator.processor, paths, device=model.device)
    for name, changes, calls in (
        ("plain", {}, 6),
        ("shared", {"samples_per_row": 4}, 6),
        ("cached", {"features": cache}, 0),
        ("both", {"features": cache, "samples_per_row": 2}, 0),
    ):
        trainer = PokemonTrainer(
            model=open_checkpoint(tiny_model).load_model(),
            args=TrainingOptions(**trainer_options(tmp_path / name)),
            train_dataset=Dataset.from_list(ours),
            data_collator=replace(collator, **changes),
            processing_class=collator.processor,
            peft_config=lora_config(LORA, FAMILIES["gemma3"]),
        )
        with count_tower(trainer.model) as counts:
            steps = steps_of(trainer)
        assert (counts["forward"], counts["backward"]) == (calls, 0), name
        assert counts["pictures"] < 6 * 4 * 4
        for (loss, norm), (stock_loss, stock_norm) in zip(steps, expected, strict=True):
            assert loss == pytest.approx(stock_loss, abs=1e-5), name
            assert norm == pytest.approx(stock_norm, rel=1e-4), name
