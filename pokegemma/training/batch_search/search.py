"""The search for the batch size that trains fastest within memory."""

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pokegemma.training.batch_search.attempts import Attempt, RunTrial, Trial, batch_sizes, fastest, try_sizes
from pokegemma.training.batch_search.dataset import write_trial_dataset
from pokegemma.training.batch_search.options import SearchOptions, is_checkpointing_given
from pokegemma.training.batch_search.ranks import Ranks, in_lockstep
from pokegemma.training.batch_search.report import describe_attempt, gib
from pokegemma.training.batch_search.runner import TrialRunner, memory_budget
from pokegemma.training.options import RunOptions

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SearchResult:
    """All attempts, and the chosen one.

    Attributes:
        chosen: None where not even one sample fits.
        effective_batch_size: samples of an optimizer step, over all processes.
        budget_source: of the budget: --memory_limit_gib, the name of the GPU, or the free memory of the machine.
        limit_bytes: the part of the budget that may be used, the least of all processes.
        row_tokens: tokens of the rows that were trained on, the longest first.
    """

    attempts: Sequence[Attempt]
    chosen: Attempt | None
    effective_batch_size: int
    num_processes: int
    budget_bytes: int
    budget_source: str
    limit_bytes: int
    row_tokens: Sequence[int]

    @property
    def settings(self) -> dict[str, int] | None:
        """The variables of .env that set the chosen size."""
        if self.chosen is None:
            return None
        share = self.effective_batch_size // self.num_processes
        return {"BATCH_SIZE": self.chosen.batch_size, "GRAD_ACCUM": share // self.chosen.batch_size}

    def to_record(self) -> dict[str, Any]:
        """Return the result as the script records it in JSON."""
        found = self.settings and {
            **self.settings,
            "gradient_checkpointing": self.chosen.gradient_checkpointing,
        }
        return {
            "found": found,
            "effective_batch_size": self.effective_batch_size,
            "num_processes": self.num_processes,
            "budget_bytes": self.budget_bytes,
            "budget_is": self.budget_source,
            "limit_bytes": self.limit_bytes,
            "longest_rows_tokens": self.row_tokens,
            "trials": [asdict(attempt) for attempt in self.attempts],
        }


def find_batch_size(
    search: SearchOptions,
    options: RunOptions,
    *,
    arguments: Sequence[str],
    ranks: Ranks,
) -> SearchResult:
    """Train a few steps with each batch size that may be the fastest, and return the fastest of those that fit.

    Args:
        arguments: the command line, which is passed on to the trials.
        ranks: the processes that search together.

    Raises:
        PokegemmaError: the processes cannot share the effective batch, dataset or model cannot be read, or a trial
            fails for another reason than memory.
    """
    training = options.training
    effective = search.effective_batch_size or (
        training.per_device_train_batch_size * training.gradient_accumulation_steps
    )
    sizes = batch_sizes(effective, ranks.size)
    budget, source = memory_budget(training.device, limit_gib=search.memory_limit_gib, local_size=ranks.local_size)
    limit = int(budget * (1 - search.headroom))
    logger.info("memory: %s GiB (%s), of which %s may be used", gib(budget), source, gib(limit))
    smallest_limit = min(ranks.gather(limit))

    with tempfile.TemporaryDirectory(prefix="pokegemma_batch_") as temporary:
        dataset = Path(temporary, "dataset")
        steps = {"step_rows": sizes[-1], "num_steps": search.trial_steps}
        eval_rows = max(sizes[-1], training.per_device_eval_batch_size) if training.evaluates else 0
        lengths = write_trial_dataset(options.data, options.model, dataset, **steps, eval_rows=eval_rows)
        logger.info("training on the %d longest rows, %d to %d tokens", len(lengths), lengths[-1], lengths[0])
        runner = TrialRunner(
            arguments,
            dataset,
            limit_bytes=limit,
            on_gpu=training.device.type != "cpu",
            num_processes=ranks.size,
            **steps,
        )
        attempts = try_sizes(
            _logged(in_lockstep(runner, ranks), limit_bytes=smallest_limit),
            sizes,
            gradient_checkpointing=(
                [training.gradient_checkpointing] if is_checkpointing_given(arguments) else [True, False]
            ),
        )
    return SearchResult(
        attempts=attempts,
        chosen=fastest(attempts),
        effective_batch_size=effective,
        num_processes=ranks.size,
        budget_bytes=budget,
        budget_source=source,
        limit_bytes=smallest_limit,
        row_tokens=lengths,
    )


def _logged(run_trial: RunTrial, *, limit_bytes: int) -> RunTrial:
    def run(batch_size: int, gradient_checkpointing: bool) -> Trial:
        trial = run_trial(batch_size, gradient_checkpointing)
        attempt = Attempt(batch_size, gradient_checkpointing, trial)
        logger.info("%s", describe_attempt(attempt, limit_bytes=limit_bytes))
        return trial

    return run
