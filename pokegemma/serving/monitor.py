"""Ask a server real questions on a schedule, and judge its answers."""

import collections
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from pokegemma.data.prompts import AnswerError, parse_answer
from pokegemma.engines.questions import Question
from pokegemma.serving.client import ServerError, ask, list_models
from pokegemma.serving.monitor_limits import (
    STATES,
    ServerLimits,
    ServerState,
    WindowFigures,
    find_breaches,
    summarize_window,
)
from pokegemma.serving.processes import Usage


@dataclass(frozen=True)
class ServerCheck:
    """A question and its result.

    `breaches` are the limits that do not hold after this check, over the window: names of states, "memory",
    "gpu_memory" or "restarts". `detail` is the answer, or what went wrong. `latency_s` is None without an answer; bytes
    are None where they are unknown.
    """

    time: str
    number: int
    question: str
    state: ServerState
    latency_s: float | None
    detail: str
    memory_bytes: int | None
    gpu_memory_bytes: int | None
    restarts: int
    breaches: tuple[str, ...]


class Monitor:
    """Checks of one server, and their results."""

    def __init__(
        self,
        server_url: str,
        questions: Sequence[Question],
        limits: ServerLimits,
        *,
        model: str | None = None,
        max_new_tokens: int = 256,
        api_key: str | None = None,
        usage: Callable[[], Usage],
    ) -> None:
        """Prepare to ask `questions` in turn.

        Args:
            model: name in the requests; None: the one that the server lists, or none where it lists none.
            usage: returns what the server's processes use now.
        """
        self.server_url, self.limits = server_url, limits
        self._questions, self._model, self._max_new_tokens = questions, model, max_new_tokens
        self._api_key, self._usage = api_key, usage
        self._results: collections.deque[tuple[ServerState, float | None]] = collections.deque(maxlen=limits.window)
        self._listed_model: str | None = None
        self._listener: object = None
        self.num_checks = self.restarts = 0
        self.counts: collections.Counter[str] = collections.Counter()
        self.breached: collections.Counter[str] = collections.Counter()
        self.last_check: ServerCheck | None = None

    def _model_name(self) -> str | None:
        if self._model is None and self._listed_model is None:
            try:
                names = list_models(self.server_url, timeout_s=self.limits.timeout_s, api_key=self._api_key)
            except ServerError as error:
                if error.failure == "timeout":
                    raise
                return None  # transformers serve fails here on a machine without a cache of the Hub
            self._listed_model = names[0] if len(names) == 1 else None
        return self._model or self._listed_model

    def _ask(self, question: Question) -> tuple[ServerState, float | None, str]:
        """Return the state, the seconds to the end of an answer or None without one, and the detail."""
        start = time.perf_counter()
        try:
            model = self._model_name()
            reply = ask(
                self.server_url,
                question,
                model=model,
                max_new_tokens=self._max_new_tokens,
                timeout_s=max(self.limits.timeout_s - (time.perf_counter() - start), 0.001),
                api_key=self._api_key,
            )
        except ServerError as error:
            self._listed_model = None  # after a failure the server may return with another model
            return error.failure, time.perf_counter() - start if error.failure == "invalid" else None, str(error)
        try:
            button = parse_answer(reply.text).button
        except AnswerError as error:
            cut = "" if reply.complete else f" (cut off after {self._max_new_tokens} tokens)"
            return "invalid", reply.seconds, f"{error}{cut}"
        limit_s = self.limits.max_latency_p95_s
        return "slow" if limit_s is not None and reply.seconds > limit_s else "ok", reply.seconds, button

    def run_check(self) -> ServerCheck:
        """Ask the next question and return its result."""
        question = self._questions[self.num_checks % len(self._questions)]
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        state, latency_s, detail = self._ask(question)
        usage = self._usage()
        # Processes are compared, not the times when they began: those follow a clock that may be set.
        if usage.listener is not None and self._listener not in (None, usage.listener):
            self.restarts += 1
        self._listener = usage.listener or self._listener
        self.num_checks += 1
        self._results.append((state, latency_s))
        breaches = find_breaches(self.limits, list(self._results), usage, restarts=self.restarts)
        self.counts[state] += 1
        self.breached.update(breaches)
        self.last_check = ServerCheck(
            time=now,
            number=self.num_checks,
            question=question.id,
            state=state,
            latency_s=latency_s,
            detail=detail,
            memory_bytes=usage.memory_bytes,
            gpu_memory_bytes=usage.gpu_memory_bytes,
            restarts=self.restarts,
            breaches=breaches,
        )
        return self.last_check

    def window(self) -> WindowFigures:
        """Return the figures of the last checks."""
        return summarize_window(list(self._results))

    def summary(self) -> dict[str, Any]:
        """Return figures of the last window and counts of all checks, for JSON."""
        return {
            "server": self.server_url,
            "passed": not self.breached,
            "num_checks": self.num_checks,
            "states": {state: self.counts[state] for state in STATES},
            "breaches": dict(self.breached),
            "last_check": asdict(self.last_check) if self.last_check else None,
            "window": asdict(self.window()),
        }


def watch(
    monitor: Monitor,
    *,
    interval_s: float,
    num_checks: int | None = None,
    duration_s: float | None = None,
) -> Iterator[ServerCheck]:
    """Yield a check every `interval_s` seconds, from the start of one to that of the next; without limits for ever."""
    start = time.monotonic()
    while num_checks is None or monitor.num_checks < num_checks:
        due = time.monotonic() + interval_s
        yield monitor.run_check()
        if duration_s is not None and max(due, time.monotonic()) - start >= duration_s:
            return
        if num_checks is None or monitor.num_checks < num_checks:
            time.sleep(max(due - time.monotonic(), 0))
