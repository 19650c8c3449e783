"""The callback that ends training after some minutes, as if it were the last step."""

import logging
import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import IntervalStrategy

from pokegemma.training.stop_on_signal import is_true_anywhere

logger = logging.getLogger(__name__)


class TimeLimit(TrainerCallback, ExportableState):
    """After the step in which the time is used up, evaluate, save as configured, and end.

    The time of a run that is resumed counts from where its checkpoint was saved.
    """

    def __init__(self, minutes: float) -> None:
        self.minutes = minutes
        self._earlier_s, self._began = 0.0, time.monotonic()

    def state(self) -> dict[str, Any]:
        """Return what checkpoints contain."""
        used_s = self._earlier_s + time.monotonic() - self._began
        return {"args": {"minutes": self.minutes}, "attributes": {"used_s": used_s}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step > 0:  # read from a checkpoint
            saved = (state.stateful_callbacks or {}).get(type(self).__name__, {})
            self._earlier_s = saved.get("attributes", {}).get("used_s", 0.0)
        self._began = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        used_s = self._earlier_s + time.monotonic() - self._began
        if not is_true_anywhere(used_s >= 60 * self.minutes, args) or state.global_step >= state.max_steps:
            return
        control.should_training_stop = True
        control.should_evaluate |= args.eval_strategy != IntervalStrategy.NO
        control.should_save |= args.load_best_model_at_end
        logger.info("%g minutes are over after step %d of %d", self.minutes, state.global_step, state.max_steps)
