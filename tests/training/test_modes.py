"""Modes of training are in force, not only asked for: seen in the model and in its first step."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.siglip import modeling_siglip

from pokegemma.data.samples import Sample
from pokegemma.data.trajectories import Trajectory
from pokegemma.errors import PokegemmaError
from pokegemma.gemma.loading import open_checkpoint
from pokegemma.training import sft
from pokegemma.training.modes import OFF, ON, REENTRANT, ModesObserver, check_modes, modes_in_force
from pokegemma.training.options import DataOptions, ModelOptions, TrainingOptions
from pokegemma.training.trainable import load_trainable
from pokegemma.training.trainer import PokemonTrainer, find_answers

QUICK: dict[str, Any] = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "max_steps": 1,
    "save_strategy": "no",
    "dataloader_num_workers": 0,
    "warmup_steps": 0,
    "use_cpu": True,
    "report_to": "none",
}


def observe(
    model: Path,
    dataset: Path,
    output: Path,
    *,
    bf16: bool = False,
    training: dict[str, Any] | None = None,
    features: Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train a step and return the modes that were in force."""
    asked = ModelOptions(model_name_or_path=str(model), **options)
    data = DataOptions(dataset_path=str(dataset), vision_features=features and str(features))
    arguments = TrainingOptions(
        output_dir=str(output), bf16=bf16, **{"eval_strategy": "no", **QUICK, **(training or {})}
    )
    observer = ModesObserver(asked, arguments)
    assert sft.train(data, arguments, asked, callbacks=[observer])
    assert observer.modes is not None
    return observer.modes


@pytest.mark.parametrize(
    ("training", "expected", "runs"),
    [
        ({}, ON, 2.0),
        ({"gradient_checkpointing": False}, OFF, 1.0),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, REENTRANT, 2.0),
    ],
)
def test_gradient_checkpointing_recomputes_layers_with_an_adapter(
    training: dict[str, Any], expected: str, runs: float, tiny_model: Path, toy_dataset: Path, tmp_path: Path
) -> None:
    modes = observe(tiny_model, toy_dataset, tmp_path / "a", training=training, finetuning="lora")
    assert modes["gradient_checkpointing"]["language_model"] == expected
    # The frozen tower runs without gradients: nothing of it is run again.
    assert modes["runs_per_pass"] == {"language_model": runs, "vision_tower": 1.0}
    assert modes["trained_weights"] == {"language_model": "float32"}
    assert modes["computed_in"] == {"language_model": "float32", "vision_tower": "float32"}


@pytest.mark.parametrize(
    ("kwargs", "expected"), [({"every_n_layers": 2}, {ON, OFF}), ({"preserve_rng_state": False}, {ON})]
)
def test_checkpointing_stays_not_reentrant_with_other_arguments(
    kwargs: dict[str, Any], expected: set[str], tiny_model: Path, toy_dataset: Path, tmp_path: Path
) -> None:
    training = {"gradient_checkpointing_kwargs": kwargs}
    modes = observe(tiny_model, toy_dataset, tmp_path / "a", training=training, finetuning="lora")
    assert set(modes["gradient_checkpointing"]["language_model"].split(", ")) == expected


def test_a_trained_tower_is_checkpointed_too(tiny_model: Path, toy_dataset: Path, tmp_path: Path) -> None:
    modes = observe(tiny_model, toy_dataset, tmp_path / "m", finetuning="full", train_vision_tower=True)
    assert modes["runs_per_pass"] == {"language_model": 2.0, "vision_tower": 2.0}
    assert modes["trained_weights"] == {"language_model": "float32", "vision_tower": "float32"}


def test_every_linear_layer_computes_in_bf16(tiny_model: Path, toy_dataset: Path, tmp_path: Path) -> None:
    modes = observe(tiny_model, toy_dataset, tmp_path / "a", bf16=True, finetuning="lora")
    assert modes["computed_in"] == {"language_model": "bfloat16", "vision_tower": "bfloat16"}
    assert modes["trained_weights"] == {"language_model": "float32"}


@pytest.mark.parametrize(("bf16", "computed"), [(True, "bfloat16, float32"), (False, "float32")])
def test_qlora_stores_only_linear_layers_of_the_language_model_in_4_bits(
    bf16: bool, computed: str, tiny_model: Path, toy_dataset: Path, tmp_path: Path
) -> None:
    modes = observe(tiny_model, toy_dataset, tmp_path / "a", bf16=bf16, finetuning="qlora")
    stored = {"type": "nf4", "nested": True, "storage": "float32", "compute": "float32"}  # autocast does not reach it
    assert modes["4bit"] == {"layers": {"language_model": 6 * 7}, **stored}
    assert modes["computed_in"]["language_model"] == computed
    assert modes["runs_per_pass"]["language_model"] == 2.0


def test_qlora_in_bfloat16_stores_and_computes_in_it(tiny_model: Path, toy_dataset: Path, tmp_path: Path) -> None:
    modes = observe(
        tiny_model,
        toy_dataset,
        tmp_path / "a",
        bf16=True,
        finetuning="qlora",
        dtype="bfloat16",
        use_bnb_nested_quant=False,
    )
    stored = {"type": "nf4", "nested": False, "storage": "bfloat16", "compute": "bfloat16"}
    assert modes["4bit"] == {"layers": {"language_model": 6 * 7}, **stored}
    assert modes["computed_in"] == {"language_model": "bfloat16", "vision_tower": "bfloat16"}
    assert modes["trained_weights"] == {"language_model": "float32"}


@pytest.mark.parametrize("name", ["gemma3n", "gemma4", "gemma4_large"])
def test_qlora_of_other_families_stores_only_the_language_model_in_4_bits(
    name: str, other_models, tmp_path: Path
) -> None:
    folder = other_models(name)
    layers = [
        path
        for path, layer in open_checkpoint(folder).load_model().named_modules()
        if isinstance(layer, torch.nn.Linear) and "language_model" in path and "altup" not in path
    ]
    options = ModelOptions(model_name_or_path=str(folder), finetuning="qlora")
    modes = modes_in_force(
        load_trainable(options.open_checkpoint(), options, TrainingOptions(output_dir=str(tmp_path), use_cpu=True))
    )
    assert modes["4bit"]["layers"] == {"language_model": len(layers)}
    assert modes["4bit"]["type"] == "nf4"
    if name == "gemma4":
        assert len(layers) == 33  # 7 in each of 4 layers, but 2 of them share keys and values, and per-layer inputs


# --- attention


@pytest.fixture
def attention_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    """Return a list that every call of an attention function is added to: its name, module class, type of mask."""
    calls: list[tuple[str, str, str]] = []

    def spy(name: str, function: Callable) -> Callable:
        def call(module: torch.nn.Module, *args: Any, **options: Any) -> Any:
            mask = args[3] if len(args) > 3 else options.get("attention_mask")
            calls.append((name, type(module).__name__, type(mask).__name__))
            return function(module, *args, **options)

        return call

    for name in ("sdpa", "blockwise"):
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, name, spy(name, ALL_ATTENTION_FUNCTIONS[name]))
    for module in (modeling_gemma3, modeling_siglip):
        monkeypatch.setattr(module, "eager_attention_forward", spy("eager", module.eager_attention_forward))
    return calls


@pytest.mark.parametrize(("asked", "text"), [("sdpa", "blockwise"), ("eager", "eager")])
def test_the_attention_that_was_asked_for_is_called_in_every_layer(
    asked: str, text: str, attention_calls: list, make_collator, samples: list[Sample], tiny_model: Path
) -> None:
    model = open_checkpoint(tiny_model).load_model(attn_implementation=asked)
    assert modes_in_force(model)["attention"] == {"language_model": text, "vision_tower": asked}
    with torch.no_grad():
        model(**make_collator("grid")(samples[:1]))
    tower, language_model = (asked, "SiglipAttention", "NoneType"), (text, "Gemma3Attention", "Tensor")
    assert Counter(attention_calls) == {tower: 4, language_model: 6}


def test_flex_attention_is_in_force_where_it_was_asked_for(tiny_model: Path) -> None:
    model = open_checkpoint(tiny_model).load_model(
        attn_implementation="flex_attention"
    )  # compiling it for a CPU takes 86 s
    assert modes_in_force(model)["attention"] == {"language_model": "flex_attention", "vision_tower": "flex_attention"}


@pytest.mark.parametrize(("asked", "mask"), [("sdpa", "BlockMasks"), ("eager", "Tensor")])
@pytest.mark.parametrize("layout", ["frames", "trajectory"])
def test_shared_rows_use_block_attention_under_sdpa(
    asked: str, mask: str, layout: str, attention_calls: list, make_collator, samples: list[Sample], tiny_model: Path
) -> None:
    model = open_checkpoint(tiny_model).load_model(attn_implementation=asked)
    collator = replace(make_collator(layout), samples_per_row=3 if layout == "frames" else 1)
    rows = samples[3:6] if layout == "frames" else [Trajectory(tuple(samples[3:6]))]
    batch = collator(rows)
    assert len(batch["input_ids"]) == 1
    with torch.no_grad():
        model(**batch)
    text = [(name, kind) for name, module, kind in attention_calls if module == "Gemma3Attention"]
    assert text == [("blockwise" if asked == "sdpa" else "eager", mask)] * 6


def test_with_cached_features_the_tower_runs_once_a_picture(
    tiny_model: Path, toy_dataset: Path, tmp_path: Path
) -> None:
    pictures = []

    def look(module: torch.nn.Module, inputs: tuple, output: Any) -> None:
        if isinstance(module, modeling_siglip.SiglipVisionModel):
            pictures.append(len(output.last_hidden_state))

    handle = torch.nn.modules.module.register_module_forward_hook(look)
    try:
        modes = observe(
            tiny_model,
            toy_dataset,
            tmp_path / "a",
            finetuning="lora",
            features=tmp_path / "features",
            training={"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4},
        )
    finally:
        handle.remove()
    assert modes["computed_in"] == {"language_model": "float32"}
    assert modes["runs_per_pass"] == {"language_model": 2.0}
    assert sum(pictures) == len({path.read_bytes() for path in (toy_dataset / "grid_images").iterdir()})
    state = json.loads((tmp_path / "a" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "eval_loss" in entry] == [1]


# --- rows


@pytest.mark.parametrize(
    ("view", "num_rows", "num_answers"),
    [
        ({}, 2, [1, 1]),
        ({"samples_per_row": 2}, 1, [2]),
        ({"layout": "trajectory", "max_decisions": 5, "overlap_decisions": 2}, 2, [5, 3]),
        ({"layout": "trajectory", "max_decisions": 5, "overlap_decisions": 0}, 2, [5, 5]),
    ],
)
def test_rows_contain_the_requested_number_of_decisions(
    view: dict[str, Any],
    num_rows: int,
    num_answers: list[int],
    tiny_model: Path,
    toy_dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batches: list[dict[str, torch.Tensor]] = []
    step = PokemonTrainer.training_step

    def look(trainer: PokemonTrainer, model: torch.nn.Module, inputs: dict[str, Any], *args: Any) -> torch.Tensor:
        batches.append(dict(inputs))
        return step(trainer, model, inputs, *args)

    monkeypatch.setattr(PokemonTrainer, "training_step", look)
    asked = ModelOptions(model_name_or_path=str(tiny_model), finetuning="lora")
    batch = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "eval_strategy": "no"}
    training = TrainingOptions(output_dir=str(tmp_path / "a"), **{**QUICK, **batch})
    training.train_sampling_strategy = "sequential"
    assert sft.train(DataOptions(dataset_path=str(toy_dataset), **view), training, asked)
    (row,) = batches
    assert len(row["input_ids"]) == num_rows
    starts = find_answers(row["labels"])[0].tolist()
    assert [starts.count(number) for number in range(num_rows)] == num_answers


# --- what was asked for and is not in force


def modes(**changes: Any) -> dict[str, Any]:
    found = {
        "4bit": None,
        "attention": {"language_model": "blockwise", "vision_tower": "sdpa"},
        "gradient_checkpointing": {"language_model": ON},
    }
    return {**found, **changes}


@pytest.mark.parametrize(
    ("found", "asked", "message"),
    [
        ({}, {"finetuning": "qlora"}, "--finetuning qlora: .* no layer"),
        ({"4bit": {"layers": {"language_model": 42}}}, {}, "--finetuning lora: .* language_model"),
        (
            {"4bit": {"layers": {"language_model": 42, "lm_head": 1}}},
            {"finetuning": "qlora"},
            "--finetuning qlora: .* language_model, lm_head",
        ),
        ({}, {"attn_implementation": "eager"}, "--attn_implementation eager: blockwise"),
        ({"attention": {"language_model": "eager"}}, {}, "--attn_implementation sdpa: eager"),
        ({"gradient_checkpointing": {"language_model": OFF}}, {}, "not reentrant.* is off"),
        ({"gradient_checkpointing": {"language_model": REENTRANT}}, {}, "not reentrant.* is reentrant"),
    ],
)
def test_a_mode_that_is_not_in_force_is_refused_in_one_line(found: dict, asked: dict, message: str) -> None:
    options = ModelOptions(model_name_or_path="m", **{"finetuning": "lora", **asked})
    with pytest.raises(PokegemmaError, match=message) as caught:
        check_modes(modes(**found), options, checkpointing=ON)
    assert "\n" not in str(caught.value)


def test_requested_modes_that_are_in_force_are_accepted() -> None:
    check_modes(modes(), ModelOptions(model_name_or_path="m", finetuning="lora"), checkpointing=ON)


def test_bf16_that_is_not_in_force_ends_training_in_its_first_step(
    tiny_model: Path, toy_dataset: Path, tmp_path: Path
) -> None:
    asked = ModelOptions(model_name_or_path=str(tiny_model), finetuning="lora")
    arguments = TrainingOptions(
        output_dir=str(tmp_path / "a"), bf16=False, **{**QUICK, "max_steps": 5, "eval_strategy": "no"}
    )
    observer = ModesObserver(asked, TrainingOptions(output_dir=str(tmp_path / "a"), bf16=True, **QUICK))
    with pytest.raises(PokegemmaError, match=r"bf16 .* float32"):
        sft.train(DataOptions(dataset_path=str(toy_dataset)), arguments, asked, callbacks=[observer])
