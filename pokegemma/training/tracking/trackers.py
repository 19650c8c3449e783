"""Trackers that cannot stop training: if Weights & Biases or TensorBoard fails, training continues with a warning."""

import contextlib
import functools
import json
import logging
import os
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import (
    WandbCallback,
    get_reporting_integration_callbacks,
    rewrite_logs,
)

from pokegemma.errors import one_line
from pokegemma.training.tracking.settings import SUMMARY_FILE, wandb_timeouts_s

logger = logging.getLogger(__name__)

_CALL_LIMIT_S = 60.0
"""Limit for one log entry, which otherwise takes milliseconds."""
_FILES_LIMIT_S = 600.0
"""Limit for the copy of a checkpoint, which W&B makes if WANDB_LOG_MODEL is set."""
_MARGIN_S = 30.0
"""Time for W&B beyond the timeouts that its service process enforces."""
_HURRIED_LIMIT_S = 5.0
"""Limit for the end of a tracker when Ctrl-C stops a run at once."""
_SERVICE = "wandb-core"
_Calls = queue.SimpleQueue[tuple[Callable[[], object], "queue.SimpleQueue[str | None]"]]
_TOTALS = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos")
"""Entries that transformers logs once, at the end. They go to the run's summary, as transformers' own callback does."""


@contextlib.contextmanager
def guarded_trackers(trainer: Trainer, *, run_id: str | None, earlier_id: str | None) -> Iterator[None]:
    """Replace transformers' trackers by trackers that cannot stop training, and end them when the block ends.

    transformers calls trackers in the training loop, where an error of a tracker ends training. It does not end them;
    when the interpreter exits, W&B would wait for its server without a limit.

    Args:
        run_id: the run's id at W&B.
        earlier_id: the id of the run that is continued.
    """
    trackers: list[Tracker] = []
    for kind in get_reporting_integration_callbacks(trainer.args.report_to):
        callback = trainer.pop_callback(kind)
        if kind is WandbCallback:
            tracker = WandbTracker(WandbRun(run_id, continued=run_id == earlier_id))
        else:
            tracker = Tracker(callback)
        trackers.append(tracker)
        trainer.add_callback(tracker)
    exit_code, limit_s = 1, None
    try:
        yield
        exit_code = 0
    except KeyboardInterrupt:
        limit_s = _HURRIED_LIMIT_S
        raise
    finally:
        for tracker in trackers:
            tracker.close(exit_code, limit_s=limit_s)


def _serve(calls: _Calls, errors: tuple[type[BaseException], ...]) -> None:
    """Make the calls of a queue, and answer each by None or its failure, until one fails."""
    failure = None
    while failure is None:
        call, answer = calls.get()
        failure = "it failed; the error is above"
        try:
            call()
            failure = None
        except errors as error:
            failure = f"{type(error).__name__}: {one_line(error, length=300)}"
        finally:
            answer.put(failure)


class Tracker(TrainerCallback):
    """Pass the trainer's events to a tracker's callback, in the first process, until it fails or takes too long."""

    begin_limit_s = _CALL_LIMIT_S
    errors: tuple[type[BaseException], ...] = (OSError,)
    """Errors that a tracker is expected to raise. Any other is printed with its traceback, and ends it, too."""

    def __init__(self, callback: TrainerCallback) -> None:
        self.name = type(callback).__name__.removesuffix("Callback")
        self._callback = callback
        self._begun = self._failed = False
        self._calls: _Calls | None = None

    def on_train_begin(self, *event: Any, **objects: Any) -> None:
        self._pass_on("on_train_begin", self.begin_limit_s, *event, **objects)

    def on_log(self, *event: Any, **objects: Any) -> None:
        self._pass_on("on_log", _CALL_LIMIT_S, *event, **objects)

    def on_save(self, *event: Any, **objects: Any) -> None:
        self._pass_on("on_save", _FILES_LIMIT_S, *event, **objects)

    def on_train_end(self, *event: Any, **objects: Any) -> None:
        self._pass_on("on_train_end", _FILES_LIMIT_S, *event, **objects)

    def close(self, exit_code: int, *, limit_s: float | None) -> None:
        """End what `on_train_end` did not, within `limit_s` (None: the limit of the tracker)."""

    def _pass_on(self, name: str, limit_s: float, args: Any, state: TrainerState, *event: Any, **objects: Any) -> None:
        if state.is_world_process_zero and not self._failed:
            self._begun = True
            handler = getattr(self._callback, name)
            self._attempt(functools.partial(handler, args, state, *event, **objects), limit_s)

    def _attempt(self, call: Callable[[], object], limit_s: float) -> None:
        """Run `call` in the tracker's thread, since it may never return; warn of the first failure.

        All calls run in one thread, since MLflow stores its run by thread.
        """
        if self._calls is None:
            self._calls = queue.SimpleQueue()
            threading.Thread(target=_serve, args=(self._calls, self.errors), name=self.name, daemon=True).start()
        answer: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._calls.put((call, answer))
        try:
            failure = answer.get(timeout=limit_s)
        except queue.Empty:
            failure = f"no answer within {limit_s:g} s"
        if failure is not None:
            self._calls = None  # the thread hangs, or has ended
            if not self._failed:
                self._failed = True
                self._warn(f"{self.name} failed ({failure}); nothing more is logged there")

    def _warn(self, message: str) -> None:
        logger.warning("%s", message)


class WandbTracker(Tracker):
    """Weights & Biases, whose calls go to a service process, which talks to its server."""

    def __init__(self, run: "WandbRun") -> None:
        import wandb
        from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError

        super().__init__(run)
        self.name = "Weights & Biases"
        self.errors = (OSError, ValueError, wandb.Error, HandleAbandonedError, MailboxClosedError)
        self.begin_limit_s = 2 * run.init_timeout_s + _MARGIN_S
        self._run, self._wandb = run, wandb

    def close(self, exit_code: int, *, limit_s: float | None) -> None:
        """Finish the run and end the service process, by force when it does not end by itself."""
        if not self._begun:
            return
        limit_s = limit_s or (_HURRIED_LIMIT_S if self._failed else self._run.finish_timeout_s + _MARGIN_S)
        killer = threading.Timer(limit_s, _kill_service)  # ends every wait for it
        killer.daemon = True
        killer.start()
        try:
            self._attempt(functools.partial(self._end, exit_code), limit_s + _HURRIED_LIMIT_S)
        finally:
            killer.cancel()
            _kill_service()

    def _end(self, exit_code: int) -> None:
        try:
            self._wandb.finish(exit_code)
        finally:
            with contextlib.suppress(SystemExit):  # the service process ended with an error
                self._wandb.teardown(exit_code)

    def _warn(self, message: str) -> None:
        logging.getLogger("wandb").setLevel(logging.CRITICAL)  # otherwise an error for each line that training prints
        command = self._run.upload_command
        super()._warn(f"{message}. Upload what was logged: {command}" if command else message)


class WandbRun(WandbCallback):
    """transformers' callback with our run id, limited waits and the trainer's steps; offline if no server answers."""

    def __init__(self, run_id: str | None, *, continued: bool) -> None:
        super().__init__()
        self.run_id, self.continued = run_id, continued
        self.init_timeout_s, self.finish_timeout_s = wandb_timeouts_s()
        self.upload_command: str | None = None
        self._summary: dict[str, Any] = {}

    def setup(self, args: TrainingArguments, state: TrainerState, model: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._start(args)
        super().setup(args, state, model, **kwargs)

    def _start(self, args: TrainingArguments) -> None:
        timeouts = {"init_timeout": self.init_timeout_s, "finish_timeout": self.finish_timeout_s}
        start = functools.partial(
            self._wandb.init,
            project=os.environ.get("WANDB_PROJECT", "huggingface"),
            name=args.run_name,
            id=None if os.environ.get("WANDB_RUN_ID") else self.run_id,  # an agent refuses any other id than its own
            settings=self._wandb.Settings(**timeouts, finish_timeout_raises=True),
        )
        try:
            run = start(resume="allow" if self.continued else None)
        except self._wandb.Error as error:
            reason = one_line(error, length=300)
            with contextlib.suppress(SystemExit):
                self._wandb.teardown()
            run = start(mode="offline")
            logger.warning("Weights & Biases: %s. This run is logged offline, in %s", reason, run.settings.sync_dir)
        flag = "" if run.offline else "--no-skip-online "  # without it, `wandb sync` skips a run that was online
        self.upload_command = f"wandb sync {flag}{run.settings.sync_dir}"

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: Any, model: Any = None, logs: Any = None, **kw: Any
    ) -> None:
        # Without `step`, W&B counts calls, from 0 again in an offline run that is continued. It ignores known steps.
        run, step = self._wandb.run, state.global_step
        run.summary.update({key: value for key, value in logs.items() if key in _TOTALS})
        if step >= run.starting_step:
            values = rewrite_logs({key: value for key, value in logs.items() if key not in _TOTALS})
            values["train/global_step"] = step
            run.log(values, step=step)
            self._summary |= values
            if run.offline:  # W&B writes this file online only
                text = json.dumps(self._summary, default=float)
                Path(run.settings.files_dir, SUMMARY_FILE).write_text(text, encoding="utf-8")


def _kill_service() -> None:
    """Kill the service process of W&B that this process started, if any, and its children."""
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.name() == _SERVICE:
                for process in [*child.children(recursive=True), child]:
                    process.kill()
