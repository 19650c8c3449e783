"""The callback that stops a run on SIGTERM or SIGINT, with a checkpoint."""

import logging
import signal
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)


def is_true_anywhere(condition: bool, args: TrainingArguments) -> bool:
    """Return whether a condition holds in any process of a training run; all of them have to ask."""
    if args.world_size == 1:
        return condition
    flag = torch.tensor(float(condition), device=args.device)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return bool(flag.item())


class StopOnSignal(TrainerCallback):
    """On SIGTERM or SIGINT, finish the optimizer step, save a checkpoint and stop; on a second SIGINT, stop at once.

    Use it as a context manager around `Trainer.train`. It saves at the end of a step only, and after the same step in
    every process; transformers' just-in-time checkpoint may save in the middle of an accumulated step.

    Attributes:
        stopped: whether training was stopped. A signal during the last step does not stop it.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopOnSignal":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._requested = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # The signal may reach the processes in different steps.
        if is_true_anywhere(self._requested, args) and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True
            logger.warning("stopping after step %d of %d because of a signal", state.global_step, state.max_steps)
