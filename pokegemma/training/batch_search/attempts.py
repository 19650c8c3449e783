"""Choose the batch sizes to try, and the fastest of those that fit.

The search assumes that more samples in a forward pass never need less memory, and that training never needs less memory
without gradient checkpointing. Speed is measured.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pokegemma.errors import PokegemmaError


@dataclass(frozen=True)
class Trial:
    """The result of training a few steps. `reason`: why it does not fit; then `peak_bytes` may be unknown (None)."""

    fits: bool
    peak_bytes: int | None = None
    decisions_per_second: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Attempt:
    """A batch size that was tried, with or without gradient checkpointing."""

    batch_size: int
    gradient_checkpointing: bool
    trial: Trial


RunTrial = Callable[[int, bool], Trial]
"""Called with (batch size, whether gradient checkpointing is on); trains a few steps."""


def batch_sizes(effective_batch_size: int, num_processes: int) -> list[int]:
    """Return the batch sizes of a process with which batch x accumulation x processes is exactly the effective one.

    Raises:
        PokegemmaError: the processes cannot share the effective batch.
    """
    if effective_batch_size < 1 or effective_batch_size % num_processes:
        raise PokegemmaError(
            f"--effective_batch_size: {effective_batch_size} is not a multiple of the {num_processes} processes"
        )
    share = effective_batch_size // num_processes
    return [size for size in range(1, share + 1) if share % size == 0]


def largest_fitting(fits: Callable[[int], bool], sizes: Sequence[int]) -> int | None:
    """Return the largest of the ascending `sizes` that fits, or None.

    Doubles from the smallest until one does not fit, then bisects: about log2(largest) + log2(number of sizes) calls.
    """
    low, high, at = -1, len(sizes), 0
    while low + 1 < high:
        if fits(sizes[at]):
            low = at
        else:
            high = at
        if high == len(sizes):  # none has failed yet
            at = next((i for i in range(low + 1, high) if sizes[i] >= 2 * sizes[low]), high - 1)
        else:
            at = (low + high) // 2
    return sizes[low] if low >= 0 else None


def try_sizes(run_trial: RunTrial, sizes: Sequence[int], *, gradient_checkpointing: Sequence[bool]) -> list[Attempt]:
    """Return all trials made to find the largest size that fits, with and without gradient checkpointing.

    Args:
        gradient_checkpointing: what to try. Sizes that do not fit with it are not tried without it.
    """
    attempts: list[Attempt] = []
    for checkpointing in sorted(gradient_checkpointing, reverse=True):

        def fits(size: int, checkpointing: bool = checkpointing) -> bool:
            attempts.append(Attempt(size, checkpointing, run_trial(size, checkpointing)))
            return attempts[-1].trial.fits

        largest = largest_fitting(fits, sizes)
        sizes = [size for size in sizes if largest is not None and size <= largest]
    return attempts


def fastest(attempts: Sequence[Attempt]) -> Attempt | None:
    """Return the attempt with the most decisions a second of those that fit, the smallest of equals; or None."""
    fitting = [attempt for attempt in attempts if attempt.trial.fits]
    return min(fitting, key=lambda a: (-(a.trial.decisions_per_second or 0), a.batch_size), default=None)


def combine_trials(trials: Sequence[Trial]) -> Trial:
    """Return the trial of processes that train together: all must fit, and all wait for the slowest."""
    peaks = [trial.peak_bytes for trial in trials if trial.peak_bytes is not None]
    speeds = [trial.decisions_per_second for trial in trials if trial.decisions_per_second is not None]
    fits = all(trial.fits for trial in trials)
    return Trial(
        fits=fits,
        peak_bytes=max(peaks, default=None),
        decisions_per_second=min(speeds) * len(trials) if fits else None,
        reason=next((trial.reason for trial in trials if not trial.fits), ""),
    )
