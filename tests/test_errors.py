"""Errors of the machine, as libraries raise them."""

import errno
import pickle
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError

from pokegemma.errors import CheckFailedError, PokegemmaError, check_range, check_ranges, is_disk_full, is_out_of_memory


@pytest.mark.parametrize("error_type", [PokegemmaError, CheckFailedError])
def test_an_error_that_torch_raises_again_keeps_its_own_message(error_type: type[PokegemmaError]) -> None:
    name = f"{error_type.__module__}.{error_type.__qualname__}"
    wrapped = (
        f"Caught {error_type.__name__} in DataLoader worker process 0.\nOriginal Traceback (most recent call last):"
    )
    wrapped += f'\n  File "x.py", line 3\n{name}: a.png: cut off\nconvert it again\n'
    assert str(error_type(wrapped)) == "a.png: cut off\nconvert it again"
    assert str(pickle.loads(pickle.dumps(error_type("as it was")))) == "as it was"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 270208 vs 270100"),
        RuntimeError("basic_ios::clear: iostream error"),
    ],
)
def test_a_full_disk_is_known_from_the_errors_of_every_writer(error: BaseException) -> None:
    assert is_disk_full(error)


@pytest.mark.parametrize(
    "error", [OSError(errno.EACCES, "denied"), SafetensorError("header too large"), RuntimeError("shapes differ")]
)
def test_other_errors_are_not_taken_for_a_full_disk(error: BaseException) -> None:
    assert not is_disk_full(error)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_errors_of_memory_are_known_also_as_the_cause_of_others(error: BaseException) -> None:
    assert is_out_of_memory(error)
    outer = PokegemmaError("the model could not be loaded")
    outer.__cause__ = error
    assert is_out_of_memory(outer)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("CUDA error: device-side assert"), OSError(errno.ENOSPC, "full"), ValueError("out of memory")],
)
def test_other_errors_are_not_taken_for_a_lack_of_memory(error: BaseException) -> None:
    assert not is_out_of_memory(error)


@pytest.mark.parametrize(
    ("value", "bounds", "rule"),
    [
        (0, {"at_least": 1}, "0: must be at least 1"),
        (0.0, {"above": 0}, "0.0: must be above 0"),
        (1.0, {"at_least": 0, "below": 1}, "1.0: must be at least 0 and below 1"),
        (70000, {"at_least": 1, "at_most": 65535}, "70000: must be at least 1 and at most 65535"),
        (float("nan"), {"at_least": 0}, "nan: must be at least 0"),
    ],
)
def test_a_number_out_of_its_bounds_is_refused(value: float, bounds: dict[str, float], rule: str) -> None:
    with pytest.raises(PokegemmaError) as error:
        check_range("--x", value, **bounds)
    assert str(error.value) == f"--x {rule}"


def test_numbers_within_their_bounds_and_absent_ones_are_accepted() -> None:
    for value in (None, 0, 0.5, 1):
        check_range("--x", value, at_least=0, at_most=1)
    with pytest.raises(PokegemmaError, match="--b 3"):
        check_ranges(SimpleNamespace(a=1, b=3), "a", "b", at_most=2)
