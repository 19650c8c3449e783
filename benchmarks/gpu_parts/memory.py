"""Memory of real training steps next to the estimate, and the search for a batch size, with the checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu_parts.plan import Run
from pokegemma import cli
from pokegemma.environment import default_finetuning
from pokegemma.training.batch_search.options import SearchOptions
from pokegemma.training.batch_search.ranks import Ranks
from pokegemma.training.batch_search.search import find_batch_size
from pokegemma.training.options import DataOptions, ModelOptions, RunOptions, TrainingOptions
from pokegemma.training.preflight.memory import estimate_memory, measure_model
from pokegemma.training.preflight.planned_run import PlannedRun
from pokegemma.training.preflight.token_lengths import check_token_lengths

SEARCH_GIB = 24.0
"""The search may use as much as a common GPU has, so that on a larger one, too, it finds sizes that do not fit."""


def measure(unit: str, run: Run) -> dict[str, Any]:
    if unit == "search":
        return search(run, default_finetuning(), effective_batch_size=4, limit_gib=SEARCH_GIB)
    if unit == "qlora" and default_finetuning() != "qlora":
        return {"skipped": "bitsandbytes is not installed"}
    return search(run, unit, effective_batch_size=1, limit_gib=None)


def search(run: Run, finetuning: str, *, effective_batch_size: int, limit_gib: float | None) -> dict[str, Any]:
    """Search as scripts/find_batch_size.py does, with gradient checkpointing; return its record and the estimates.

    Each trial trains on the longest samples, in a process of its own. An effective batch of one sample is one trial.
    """
    arguments = [
        *("--dataset_path", str(run.dataset), "--model_name_or_path", str(run.checkpoint), "--layout", "frames"),
        *("--finetuning", finetuning, "--gradient_checkpointing", "true", "--eval_strategy", "no"),
        *("--report_to", "none", "--dataloader_num_workers", "0"),
    ]
    data, training, model = cli.parse_options(
        DataOptions, TrainingOptions, ModelOptions, description="", argv=arguments
    )
    options = RunOptions(data, training, model)
    limits = SearchOptions(effective_batch_size=effective_batch_size, memory_limit_gib=limit_gib, trial_steps=2)
    result = find_batch_size(limits, options, arguments=arguments, ranks=Ranks(rank=0, size=1, local_size=1))
    record, estimate = result.to_record(), estimator(options)
    for trial in record["trials"]:
        trial["estimated_bytes"] = estimate(trial["batch_size"])
    return {"finetuning": finetuning, "dtype": model.dtype, **record}


def estimator(options: RunOptions) -> Callable[[int], dict[str, int]]:
    """Return a function from a batch size to the estimate of scripts/validate_training.py."""
    train, _ = options.data.find_splits()
    planned = PlannedRun(options, train, held_out=None, contact_sheet=Path(), num_workers=0, step_command=None)
    checkpoint = options.model.open_checkpoint()
    config, size = checkpoint.config, measure_model(checkpoint.config)
    check, lengths = check_token_lengths(
        [train],
        {train.name: checkpoint.collator(layout=options.data.layout, dataset_folder=train.folder)},
        max_positions=config.text_config.max_position_embeddings,
        max_length=None,
        rows=planned.rows,
    )
    assert lengths is not None, check.summary
    return lambda batch_size: estimate_memory(
        config,
        size,
        finetuning=options.model.finetuning,
        lora_r=options.model.lora_r,
        lengths=lengths,
        batch_size=batch_size,
        bytes_per_weight=planned.bytes_per_weight,
    )
