"""One trial of a batch size, in a process of its own: a few steps of real training and an evaluation, measured.

Started by `runner.TrialRunner` with the flags of the training run, then those that make it a trial.
"""

import json
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pokegemma.cli import parse_options, run
from pokegemma.errors import PokegemmaError, is_out_of_memory
from pokegemma.options import option
from pokegemma.outputs import atomic_file
from pokegemma.training.batch_search.options import SearchOptions
from pokegemma.training.modes import LANGUAGE_MODEL, OFF, modes_in_force
from pokegemma.training.options import DataOptions, ModelOptions, TrainingOptions


@dataclass
class TrialOptions:
    """Options of a trial besides those of training."""

    trial_result: str = option(..., "JSON file to write.")
    trial_limit_bytes: int = option(..., "Largest memory to use on a GPU.")


def peak_resident_bytes() -> int:
    """Return the peak memory of this process. Linux's ru_maxrss would include the process that started it."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


class GpuMemory:
    """Memory of the training device, if it is a GPU: capped at `limit_bytes`, and its peak.

    Memory outside torch's allocator (the CUDA context, other processes) counts as used.
    """

    def __init__(self, device: torch.device, limit_bytes: int) -> None:
        self._device, self._outside, self._sampled = device.type, 0, 0
        if self._device == "cuda":
            free, total = torch.cuda.mem_get_info()
            self._outside = total - free - torch.cuda.memory_reserved()
            torch.cuda.set_per_process_memory_fraction(min(1.0, max(0, limit_bytes - self._outside) / total))
        elif self._device == "mps":
            share = limit_bytes / torch.mps.recommended_max_memory()
            torch.mps.set_per_process_memory_fraction(min(2.0, share))

    def sample(self) -> None:
        """Record the memory in use now, since MPS records no peak."""
        if self._device == "mps":
            self._sampled = max(self._sampled, torch.mps.driver_allocated_memory())

    def peak_bytes(self) -> int | None:
        """Return the peak, or None on a CPU."""
        if self._device == "cuda":
            return torch.cuda.max_memory_reserved() + self._outside
        return self._sampled if self._device == "mps" else None


class MeasureAndLeave(TrainerCallback):
    """Write memory and speed after the last step, and end the process before the model would be saved."""

    def __init__(self, result: Path, memory: GpuMemory) -> None:
        self._result, self._memory = result, memory

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        self._memory.sample()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._memory.sample()

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        self._memory.sample()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> NoReturn:
        speeds = [entry["decisions_per_second"] for entry in state.log_history if "decisions_per_second" in entry]
        timed = speeds[1:]  # the first step warms up
        peak = self._memory.peak_bytes()
        weights = (weight for weight in kwargs["model"].parameters() if weight.requires_grad)
        write_result(
            self._result,
            peak_bytes=peak_resident_bytes() if peak is None else peak,
            decisions_per_second=len(timed) / sum(1 / speed for speed in timed),
            gradient_bytes=sum(weight.numel() * weight.element_size() for weight in weights),
            gradient_checkpointing=modes_in_force(kwargs["model"])["gradient_checkpointing"].get(LANGUAGE_MODEL, OFF),
        )
        sys.exit(0)


def write_result(path: Path, **result: Any) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(result), encoding="utf-8")


def main() -> None:
    _, trial, data, training, model = parse_options(
        SearchOptions, TrialOptions, DataOptions, TrainingOptions, ModelOptions, description=__doc__
    )
    from pokegemma.gemma.batches.shared_memory import SharedMemoryError
    from pokegemma.training.sft import train

    data.eval_dataset_path = training.resume_from_checkpoint = None
    training.train_sampling_strategy = "sequential"  # the longest samples first, in every step
    result = Path(trial.trial_result)
    try:
        memory = GpuMemory(training.device, trial.trial_limit_bytes)
        train(data, training, model, callbacks=[MeasureAndLeave(result, memory)])
    except SharedMemoryError as error:
        write_result(result, shared_memory=str(error))
    except (RuntimeError, MemoryError, OSError, PokegemmaError) as error:
        if not is_out_of_memory(error):
            raise
        write_result(result, out_of_memory=str(error).splitlines()[0])


if __name__ == "__main__":
    run(main)
