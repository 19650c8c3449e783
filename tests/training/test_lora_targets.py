"""Which parts of a model are trained, and where adapters go."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from peft import PeftModel

from pokegemma.gemma.families import FAMILIES
from pokegemma.gemma.loading import open_checkpoint
from pokegemma.training.lora_targets import lora_config
from pokegemma.training.options import ModelOptions, TrainingOptions
from pokegemma.training.trainable import is_reentrant, load_trainable


def trained_parts(options: ModelOptions) -> set[str]:
    model = load_trainable(options.open_checkpoint(), options, TrainingOptions(output_dir="unused", use_cpu=True))
    if options.use_peft:
        model = PeftModel(model, lora_config(options, FAMILIES["gemma3"]))
    names = [name for name, weight in model.named_parameters() if weight.requires_grad]
    parts = ("vision_tower", "multi_modal_projector", "language_model")
    return {next(part for part in parts if part in name) for name in names}


@pytest.mark.parametrize("finetuning", ["qlora", "lora", "full"])
@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ({}, set()),
        ({"train_vision_tower": True}, {"vision_tower"}),
        ({"train_projector": True}, {"multi_modal_projector"}),
        ({"train_vision_tower": True, "train_projector": True}, {"vision_tower", "multi_modal_projector"}),
    ],
)
def test_tower_and_projector_are_trained_by_flag_only(
    finetuning: str, flags: dict[str, bool], parts: set[str], tiny_model: Path
) -> None:
    options = ModelOptions(model_name_or_path=str(tiny_model), finetuning=finetuning, **flags)
    assert trained_parts(options) == {"language_model", *parts}


@pytest.mark.parametrize("names", [["all-linear"], ["q_proj", "v_proj"]])
def test_named_target_modules_do_not_reach_the_tower(names: list[str], tiny_model: Path) -> None:
    options = ModelOptions(model_name_or_path=str(tiny_model), finetuning="lora", lora_target_modules=names)
    assert trained_parts(options) == {"language_model"}


def test_every_linear_layer_of_the_language_model_gets_an_adapter(tiny_model: Path) -> None:
    options = ModelOptions(model_name_or_path=str(tiny_model), finetuning="lora")
    model = PeftModel(open_checkpoint(tiny_model).load_model(), lora_config(options, FAMILIES["gemma3"]))
    assert sum(name.endswith("lora_A.default.weight") for name, _ in model.named_parameters()) == 6 * 7


@pytest.mark.parametrize(
    ("kwargs", "zero3", "expected"),
    [
        (None, False, False),
        ({"use_reentrant": True}, False, True),
        ({"use_reentrant": False}, False, False),
        # TRL asks for it by a name that transformers no longer reads; a dict of the user's has both names.
        (None, True, False),
        ({"use_reentrant": False}, True, True),
    ],
)
def test_checkpointing_is_reentrant_where_transformers_is_told_so(
    kwargs: dict[str, Any] | None, zero3: bool, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = TrainingOptions(output_dir=str(tmp_path), use_cpu=True, gradient_checkpointing_kwargs=kwargs)
    training.deepspeed_plugin = SimpleNamespace(zero_stage=3) if zero3 else None
    assert is_reentrant(training, adapter=True) is expected
    training.activation_checkpointing = False
    assert is_reentrant(training, adapter=True) is False
