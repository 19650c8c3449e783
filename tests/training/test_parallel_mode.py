"""The parallel mode that a launcher asks for, against the one that is in force."""

from pathlib import Path

import pytest
import torch

from pokegemma.errors import PokegemmaError
from pokegemma.training.options import DataOptions, ModelOptions, RunOptions, TrainingOptions
from pokegemma.training.parallel_mode import ParallelMode, check_requested_mode, mode_in_force, require_mode
from pokegemma.training.parallel_mode import requested_mode as requested
from pokegemma.training.sft import check_options


@pytest.fixture
def training(tmp_path: Path) -> TrainingOptions:
    return TrainingOptions(output_dir=str(tmp_path), use_cpu=True)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, ParallelMode("none", 1)),
        ({"WORLD_SIZE": "2"}, ParallelMode("ddp", 2)),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "WORLD_SIZE": "4"}, ParallelMode("fsdp2", 4)),
        ({"ACCELERATE_USE_FSDP": "true"}, ParallelMode("fsdp1", 1)),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
            ParallelMode("deepspeed_zero3", 1),
        ),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, ParallelMode("megatron_lm", 1)),
    ],
)
def test_the_requested_mode_is_read_from_the_variables_of_the_launcher(
    variables: dict[str, str], expected: ParallelMode, training: TrainingOptions
) -> None:
    assert requested(training, variables) == expected


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM"])
def test_a_mode_that_accelerate_would_replace_is_refused_before_loading(
    variable: str, training: TrainingOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_requested_mode(training)
    monkeypatch.setenv(variable, "true")  # after the options were read: as where accelerate ignores it
    with pytest.raises(PokegemmaError, match="the accelerate config asks for"):
        check_requested_mode(training)


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_sharding_of_4_bit_weights_is_refused(
    variable: str, training: TrainingOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = RunOptions(DataOptions(dataset_path="data"), training, ModelOptions(finetuning="qlora"))
    monkeypatch.setenv(variable, "true")
    with pytest.raises(PokegemmaError, match=r"--finetuning qlora .* (fsdp1|deepspeed_zero0)"):
        check_options(options)


def test_a_number_of_processes_that_accelerate_does_not_have_is_refused(
    training: TrainingOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(PokegemmaError, match=r"2 processes.* 1;"):
        check_requested_mode(training)


def test_an_unwrapped_model_is_in_no_parallel_mode(training: TrainingOptions) -> None:
    model = torch.nn.Linear(2, 2)
    assert mode_in_force(torch.compile(model)).model_class == "Linear"
    assert mode_in_force(model) == ParallelMode("none", 1, model_class="Linear", num_sharded=0, num_parameters=2)
    assert require_mode(model, training) == vars(mode_in_force(model))


@pytest.mark.parametrize("version", ["1", "2"])
def test_a_model_that_is_not_in_the_requested_mode_is_refused(
    version: str, training: TrainingOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", version)
    with pytest.raises(PokegemmaError, match=rf"fsdp{version} with 1 process.* none .* 0 of 2 parameters"):
        require_mode(torch.nn.Linear(2, 2), training)
