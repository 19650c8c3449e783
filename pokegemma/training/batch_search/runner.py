"""Run each trial of a batch size in a process of its own, watch its memory, and interpret how it ended."""

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from pokegemma.data.samples import EVAL_FILE
from pokegemma.environment import GIB
from pokegemma.errors import PokegemmaError
from pokegemma.training.batch_search.attempts import Trial
from pokegemma.training.batch_search.report import gib

_POLL_S = 0.05
_LAST_LINES = 8


def memory_budget(device: torch.device, *, limit_gib: float | None, local_size: int) -> tuple[int, str]:
    """Return the memory that a process may use in bytes, and its origin: the user's limit, the GPU or free memory.

    Args:
        local_size: processes that share the memory of this machine, where there is no GPU.
    """
    if limit_gib is not None:
        return int(limit_gib * GIB), "--memory_limit_gib"
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[1], torch.cuda.get_device_name()
    if device.type == "mps":
        return torch.mps.recommended_max_memory(), "Apple GPU"
    return psutil.virtual_memory().available // local_size, "memory free on this machine"


@dataclass(frozen=True)
class Ended:
    """How a watched process ended: its peak memory with its children, and whether it was killed at the limit."""

    returncode: int
    peak_bytes: int
    stopped: bool


def resident_bytes(process: psutil.Process) -> int:
    """Return the memory of a process, and what its children (data loader workers) do not share with it."""
    total = process.memory_info().rss
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it ended, or is about to
            total += child.memory_full_info().uss
    return total


def kill_with_children(process: psutil.Process) -> None:
    """Kill a process and all that it has started; what has ended is no error."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for member in (*process.children(recursive=True), process):
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()


def run_watched(command: Sequence[str], *, log: Path, limit_bytes: int | None) -> Ended:
    """Run a command, its output into `log`, and kill it when it takes more than `limit_bytes` of memory (None: never).

    An exception in this process, such as that of Ctrl-C or SIGTERM, kills the command, too.
    """
    peak, stopped = 0, False
    with (
        open(log, "wb") as output,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT) as started,
    ):
        process = psutil.Process(started.pid)
        try:
            while started.poll() is None:
                with contextlib.suppress(psutil.Error):
                    peak = max(peak, resident_bytes(process))
                if limit_bytes is not None and peak > limit_bytes:
                    stopped = True
                    break
                time.sleep(_POLL_S)
        finally:
            if started.poll() is None:
                kill_with_children(process)
    return Ended(started.returncode, peak, stopped)


def interpret_end(
    ended: Ended, result: dict[str, Any] | None, log: str, *, limit_bytes: int, with_gradients: bool
) -> Trial:
    """Return whether a trial fits or ran out of memory, from how its process ended.

    Args:
        result: the content of the file that the trial writes; None if it wrote none.
        with_gradients: count the gradients of trained weights twice, for the buckets of DistributedDataParallel.

    Raises:
        PokegemmaError: it ended for any other reason.
    """
    if ended.stopped:
        reason = f"stopped at {gib(ended.peak_bytes)} of {gib(limit_bytes)} GiB"
        return Trial(False, ended.peak_bytes, reason=reason)
    for reason in ("out_of_memory", "shared_memory"):
        if result is not None and reason in result:
            return Trial(False, reason=result[reason])
    if ended.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return Trial(False, reason="killed, as the system does when its memory runs out")
    if ended.returncode or result is None:
        lines = [line for line in log.splitlines() if line.strip()]
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        raise PokegemmaError(
            f"a trial failed for another reason than memory (exit status {ended.returncode}): "
            + (errors[-1] if errors else "\n".join(["its last lines:", *lines[-_LAST_LINES:]]))
        )
    peak = result["peak_bytes"] + (result["gradient_bytes"] if with_gradients else 0)
    if peak > limit_bytes:
        return Trial(False, peak, reason=f"{gib(peak)} of {gib(limit_bytes)} GiB")
    return Trial(True, peak, result["decisions_per_second"])


def check_trial_mode(result: dict[str, Any] | None, *, expected: bool) -> None:
    """Refuse a trial that trained with gradient checkpointing and should not, or the reverse.

    Raises:
        PokegemmaError: it did.
    """
    in_force = (result or {}).get("gradient_checkpointing")
    if in_force is not None and (in_force != "off") is not expected:
        raise PokegemmaError(f"a trial with --gradient_checkpointing {str(expected).lower()} had it {in_force}")


@dataclass(frozen=True)
class TrialRunner:
    """Trains a few steps with a batch size, with or without gradient checkpointing, and returns the `Trial`.

    Attributes:
        arguments: the flags of the training run.
        dataset: a folder with the rows of `num_steps` optimizer steps of `step_rows` each, and those of one evaluation
            where training evaluates.
        limit_bytes: the largest memory to use.
        on_gpu: whether `limit_bytes` is the memory of a GPU.
    """

    arguments: Sequence[str]
    dataset: Path
    step_rows: int
    num_steps: int
    limit_bytes: int
    on_gpu: bool
    num_processes: int

    def __call__(self, batch_size: int, gradient_checkpointing: bool) -> Trial:
        with tempfile.TemporaryDirectory(prefix="pokegemma_trial_", ignore_cleanup_errors=True) as temporary:
            folder, result = Path(temporary), None
            command = self._command(folder, batch_size, gradient_checkpointing)
            log = folder / "log"
            ended = run_watched(command, log=log, limit_bytes=None if self.on_gpu else self.limit_bytes)
            if (folder / "result.json").is_file():
                result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
            check_trial_mode(result, expected=gradient_checkpointing)
            if result is not None and "shared_memory" in result and batch_size == 1:
                raise PokegemmaError(result["shared_memory"])  # no batch is smaller
            if result is not None and "peak_bytes" in result and not self.on_gpu:
                result["peak_bytes"] = max(result["peak_bytes"], ended.peak_bytes)  # with workers
            return interpret_end(
                ended,
                result,
                log.read_text(encoding="utf-8", errors="replace"),
                limit_bytes=self.limit_bytes,
                with_gradients=self.num_processes > 1,
            )

    def _command(self, folder: Path, batch_size: int, gradient_checkpointing: bool) -> list[str]:
        evaluates = (self.dataset / EVAL_FILE).is_file()
        options = {
            "dataset_path": self.dataset,
            "output_dir": folder / "output",
            "max_steps": self.num_steps,
            "per_device_train_batch_size": batch_size,
            "gradient_accumulation_steps": self.step_rows // batch_size,
            "gradient_checkpointing": gradient_checkpointing,
            "auto_find_batch_size": False,  # it would hide that a size does not fit
            "logging_strategy": "steps",
            "logging_steps": 1,
            "eval_on_start": False,
            "eval_strategy": "steps" if evaluates else "no",
            "eval_steps": self.num_steps,
            "save_strategy": "no",
            "report_to": "none",
            "trial_result": folder / "result.json",
            "trial_limit_bytes": self.limit_bytes,
        }
        flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        return [sys.executable, "-m", "pokegemma.training.batch_search.trial", *self.arguments, *flags]
