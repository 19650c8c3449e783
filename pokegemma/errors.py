"""Errors that are meant for the user."""

import errno
from typing import Any

_OF_A_WORKER = ".\nOriginal Traceback (most recent call last):"
"""Where the traceback begins in the message of an error that a DataLoader's worker raised."""

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DISK_FULL_TEXTS = ("No space left on device", "Disk quota exceeded", "File too large")
_TORCH_SAVE_TEXTS = ("inline_container.cc", "PytorchStreamWriter", "iostream error")
"""Parts of what torch.save raises where a write fails: without an errno and without the name of the file."""

_OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "_ALLOC_FAILED", "by signal: Killed")
"""Parts of the messages of CUDA, MPS, CPU allocators, cuBLAS, cuDNN, and of a data loader whose worker was killed."""

_DEAD_WORKER = "DataLoader worker (pid"


class PokegemmaError(Exception):
    """A mistake of the user in one line: what is wrong, where, the value, what to do. Scripts exit with `exit_code`."""

    exit_code = 2

    def __init__(self, message: str = "") -> None:
        if _OF_A_WORKER in message:  # torch raises the type again, with the worker's traceback as its message
            message = message.rpartition(f"{type(self).__name__}: ")[2].strip()
        super().__init__(message)


class CheckFailedError(PokegemmaError):
    """The input could be read, but a check on it failed."""

    exit_code = 1


def one_line(error: BaseException, *, length: int | None = 200) -> str:
    """Return an error's message in one line, of at most `length` characters; None: all of it."""
    return " ".join(str(error).split())[:length]


def is_disk_full(error: BaseException) -> bool:
    """Return whether a file could not be written for lack of space, as the system, safetensors or torch report it."""
    if isinstance(error, OSError):
        return error.errno in _DISK_FULL or any(text in str(error) for text in _DISK_FULL_TEXTS)
    if isinstance(error, RuntimeError):
        return any(text in str(error) for text in _TORCH_SAVE_TEXTS)
    return type(error).__name__ == "SafetensorError" and any(text in str(error) for text in _DISK_FULL_TEXTS)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an error, or one of its causes, means that memory was short."""
    while error is not None:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
            return True
        if isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False


def describe_machine_error(error: BaseException) -> str | None:
    """Return one line for an error of the machine: a full disk, no memory, a killed worker. None for all others."""
    reason = one_line(error)
    if is_disk_full(error):
        path = getattr(error, "filename", None) or f"a file ({reason})"
        return f"{path} could not be written, the disk is full; free some space, then repeat"
    if isinstance(error, RuntimeError) and _DEAD_WORKER in str(error):
        return f"{reason} (out of memory?); use fewer data loader workers or a smaller batch"
    if is_out_of_memory(error):
        return f"not enough memory ({reason or type(error).__name__}); use a smaller batch"
    return None


def check_range(
    name: str,
    value: float | None,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> None:
    """Check that a number is within its bounds; None, for an option that was not given, always is.

    Example:
        >>> check_range("--num_frames", 0, at_least=1)
        Traceback (most recent call last):
        pokegemma.errors.PokegemmaError: --num_frames 0: must be at least 1

    Raises:
        PokegemmaError: `value` is out of bounds, or not a number (NaN).
    """
    rules = {"at least": at_least, "above": above, "at most": at_most, "below": below}
    bounds = {rule: bound for rule, bound in rules.items() if bound is not None}
    holds = {
        "at least": lambda bound: value >= bound,
        "above": lambda bound: value > bound,
        "at most": lambda bound: value <= bound,
        "below": lambda bound: value < bound,
    }
    if value is not None and not all(holds[rule](bound) for rule, bound in bounds.items()):
        rule = " and ".join(f"{rule} {bound:g}" for rule, bound in bounds.items())
        raise PokegemmaError(f"{name} {value}: must be {rule}")


def check_ranges(options: Any, *names: str, **bounds: float) -> None:
    """Check several fields of an options dataclass with `check_range`; the flag of a field is --NAME.

    Raises:
        PokegemmaError: as there.
    """
    for name in names:
        check_range(f"--{name}", getattr(options, name), **bounds)
