"""A training run on a small dataset, to be checked."""

from pathlib import Path
from typing import Any

from pokegemma.data.checks.records import Split
from pokegemma.training.options import DataOptions, ModelOptions, RunOptions
from pokegemma.training.preflight.planned_run import OneProcessOptions, PlannedRun

DATA_OPTIONS = {"layout", "max_decisions", "vision_features"}
MODEL_OPTIONS = {"finetuning", "train_vision_tower", "train_projector"}


def plan_options(model: Path | str, folder: Path, **options: Any) -> RunOptions:
    """Return the options of a run on `model` that writes to `folder`/outputs: LoRA, no data loader workers, seed 0."""
    options = {"finetuning": "lora", "dataloader_num_workers": 0, "seed": 0, "use_cpu": True, **options}
    data = {name: options.pop(name) for name in DATA_OPTIONS & options.keys()}
    trained = {name: options.pop(name) for name in MODEL_OPTIONS & options.keys()}
    return RunOptions(
        DataOptions(dataset_path=str(folder), **data),
        OneProcessOptions(output_dir=str(folder / "outputs"), **options),
        ModelOptions(model_name_or_path=str(model), **trained),
    )


def plan_run(
    train: Split,
    held_out: Split | None,
    model: Path | str,
    folder: Path,
    *,
    step_command: list[str] | None = None,
    **options: Any,
) -> PlannedRun:
    """Return that run, with `folder`/sheet.png as its contact sheet."""
    return PlannedRun(
        options=plan_options(model, folder, **options),
        train=train,
        held_out=held_out,
        contact_sheet=folder / "sheet.png",
        num_workers=1,
        step_command=step_command,
    )
