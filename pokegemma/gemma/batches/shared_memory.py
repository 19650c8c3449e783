"""Shared memory (/dev/shm), through which the workers of a DataLoader pass their batches.

Docker's default is 64 MiB. If it is full, torch's queue drops the batch in a thread of the worker, and training
waits for that batch forever: https://github.com/pytorch/pytorch/issues/5040.
"""

import math
import os
import sys
from pathlib import Path

import torch
from torch.utils.data import get_worker_info

from pokegemma.errors import PokegemmaError

FOLDER = Path("/dev/shm")
PREFETCH_FACTOR = 2
"""Batches that each worker makes ahead: torch's default."""

SEMAPHORE_BYTES = 64 * 1024
"""Shared memory of a worker's queues and events: 48 KiB measured."""

_MIB = 2**20


class SharedMemoryError(PokegemmaError):
    """Shared memory has too little space for the batches of a DataLoader's workers."""


def free_bytes() -> int | None:
    """Return how many bytes are free in /dev/shm; None where torch does not use it, or it has no limit."""
    if not sys.platform.startswith("linux") or not FOLDER.is_dir():
        return None
    state = os.statvfs(FOLDER)
    return state.f_bavail * state.f_frsize if state.f_blocks else None  # mounted with size=0: no limit


def describe(needed: int, free: int) -> str:
    return f"{FOLDER} has {free / _MIB:.1f} MiB free, and data loader workers need {needed / _MIB:.1f} MiB"


def advise(needed: int, *, flag: str = "--dataloader_num_workers") -> str:
    return f"start the container with docker run --shm-size={math.ceil(needed / _MIB)}m, or pass {flag} 0"


def check_free(needed: int, *, flag: str = "--dataloader_num_workers") -> None:
    """Refuse to start workers whose batches do not fit into /dev/shm.

    Raises:
        SharedMemoryError: they do not fit; the message contains the needed and the free size, and `flag`.
    """
    free = free_bytes()
    if free is not None and needed > free:
        raise SharedMemoryError(f"{describe(needed, free)}: {advise(needed, flag=flag)}")


def share(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Move a batch that a worker has made to shared memory now, where an error reaches training; return it.

    The worker's queue would do it later, in a thread whose errors are only printed.

    Raises:
        SharedMemoryError: shared memory is full.
    """
    if get_worker_info() is not None:
        try:
            for tensor in batch.values():
                tensor.share_memory_()
        except RuntimeError as error:
            raise SharedMemoryError(
                f"a data loader worker could not share its batch ({' '.join(str(error).split())}); "
                "use fewer workers or a smaller batch, or give /dev/shm more room (docker run --shm-size)"
            ) from error
    return batch
