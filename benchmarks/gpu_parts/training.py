"""Steps of training: the rows of train_throughput.py, one after the other in one process."""

import gc
from typing import Any

import torch

from benchmarks.gpu_parts.plan import LOSSES, Run, is_measured
from benchmarks.train_throughput import (
    ROWS,
    BenchmarkOptions,
    check_losses,
    run_row,
    stock_loss_of_trajectory,
    summarise_row,
)


def options_of(run: Run) -> BenchmarkOptions:
    small = {"samples_per_step": 2, "max_decisions": 3, "num_steps": 1} if run.rehearse else {}
    return BenchmarkOptions(dataset_path=str(run.dataset), shape=run.shape, **small)


def measure(unit: str, run: Run) -> dict[str, Any]:
    if unit == LOSSES:
        return compare_losses(run)
    row = next(row for row in ROWS if row.name == unit)
    measured = run_row(row, options_of(run), timed=True, audit=True)
    gc.collect()  # a trainer and its model refer to each other
    torch.cuda.empty_cache()
    return summarise_row(row, [measured], measured)


def compare_losses(run: Run) -> dict[str, Any]:
    """Return the largest difference of a loss to stock TRL's, of the rows that were measured.

    Raises:
        CheckFailedError: it is too large.
    """
    options = options_of(run)
    rows = [row for row in run.rows("training") if is_measured(row)]
    shown = {row["row"]["layout"] for row in rows if row["row"]["stock"]} | {"trajectory"}
    compared = [row for row in rows if row["row"]["layout"] in shown]
    if not any(not row["row"]["stock"] for row in compared):
        return {"skipped": "no row was measured that could be compared"}
    worst = check_losses(compared, lambda scale: stock_loss_of_trajectory(options, image_scale=scale))
    return {"largest_difference": worst, "compared": [row["unit"] for row in compared]}
