"""Ask a server real questions on a schedule, and judge its answers."""

import collections
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal, get_args

import numpy as np

from pokegemma.data.prompts import AnswerError, parse_answer
from pokegemma.engines.questions import Question
from pokegemma.serving.client import ServerError, ask, list_models
from pokegemma.serving.processes import Usage

ServerState = Literal["ok", "slow", "invalid", "timeout", "refused"]
"""The result of a check.

ok: a valid answer in time. slow: a valid answer, but later than the limit. The others are failures. invalid: an answer
that is not JSON, has no valid button, or is not a chat completion. timeout: no whole answer in time. refused: no
connection, a broken one, or an error status.
"""

STATES: tuple[ServerState, ...] = get_args(ServerState)
_VALID = ("ok", "slow")
_GIB = 2**30


@dataclass(frozen=True)
class ServerLimits:
    """The limits that a server must keep; None: no such limit.

    Rates and percentiles are over the last `window` checks, and judged once there are `max_consecutive_failures`
    of them; the checks that a window still lacks count as good. `timeout_s` is for a whole answer.
    """

    timeout_s: float = 30.0
    max_latency_p95_s: float | None = 5.0
    min_valid_rate: float = 0.95
    max_consecutive_failures: int = 3
    max_memory_gib: float | None = None
    max_gpu_memory_gib: float | None = None
    max_restarts: int | None = None
    window: int = 20


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


@dataclass(frozen=True)
class Window:
    """The last checks: latencies of those with an answer in seconds, None without any, and the share of valid answers.

    `worst_state` is the most frequent failure, or "ok" without any.
    """

    num_checks: int
    latency_p50_s: float | None
    latency_p95_s: float | None
    latency_p99_s: float | None
    valid_rate: float
    worst_state: ServerState


CheckResults = Sequence[tuple[ServerState, float | None]]
"""State and latency of checks, the oldest first."""


def summarise_window(results: CheckResults) -> Window:
    """Return the figures of some checks."""
    seconds = [latency for _, latency in results if latency is not None]
    p50, p95, p99 = np.percentile(seconds, (50, 95, 99)).tolist() if seconds else (None,) * 3
    failures = collections.Counter(state for state, _ in reversed(results) if state not in _VALID)
    return Window(
        num_checks=len(results),
        latency_p50_s=p50,
        latency_p95_s=p95,
        latency_p99_s=p99,
        valid_rate=sum(state in _VALID for state, _ in results) / max(len(results), 1),
        worst_state=max(failures, key=failures.__getitem__, default="ok"),  # the latest where two are as frequent
    )


def find_breaches(limits: ServerLimits, results: CheckResults, usage: Usage, *, restarts: int) -> tuple[str, ...]:
    """Return the names of the limits that do not hold, each once; see ServerCheck.breaches."""
    breaches: list[str] = []
    if len(results) >= limits.max_consecutive_failures:
        recent = [state for state, _ in results[-limits.max_consecutive_failures :]]
        if not set(recent) & set(_VALID):
            breaches.append(recent[-1])
        num_failures = sum(state not in _VALID for state, _ in results)
        if (limits.window - num_failures) / limits.window < limits.min_valid_rate:
            breaches.append(summarise_window(results).worst_state)
        limit_s = limits.max_latency_p95_s
        if limit_s is not None:
            num_late = sum(latency is not None and latency > limit_s for _, latency in results)
            if 20 * num_late > limits.window:  # 5 % of a full window
                breaches.append("slow")
    for name, used, most in (
        ("memory", usage.memory_bytes, limits.max_memory_gib),
        ("gpu_memory", usage.gpu_memory_bytes, limits.max_gpu_memory_gib),
    ):
        if used is not None and most is not None and used > most * _GIB:
            breaches.append(name)
    if limits.max_restarts is not None and restarts > limits.max_restarts:
        breaches.append("restarts")
    return tuple(dict.fromkeys(breaches))


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

    def window(self) -> Window:
        """Return the figures of the last checks."""
        return summarise_window(list(self._results))

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
