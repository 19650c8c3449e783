"""Ask a server real questions on a schedule, and judge what it answers."""

import collections
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal, get_args

import numpy as np

from pokegemma.data.prompts import AnswerError, parse_answer
from pokegemma.engines.questions import Question
from pokegemma.serving.client import Failure, ServerError, ask, list_models
from pokegemma.serving.processes import Usage

logger = logging.getLogger(__name__)

State = Literal["healthy", "slow", "lying", "refusing", "hanging", "dead"]
"""What a check says of a server. slow: a right answer, too late; lying: an answer that is none (no JSON, no valid
button, no chat completion); refusing: an error status; hanging: no whole answer in time; dead: no connection, or a
broken one."""

STATES: tuple[State, ...] = get_args(State)

_STATE_OF_FAILURE: dict[Failure, State] = {
    "unreachable": "dead",
    "timeout": "hanging",
    "refused": "refusing",
    "malformed": "lying",
}
_GIB = 2**30


@dataclass(frozen=True)
class Limits:
    """When a server is not as it should be; None: no such limit.

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
class Check:
    """One question and what came of it.

    `breaches` are the limits that do not hold after this check, over the window: names of states, "memory",
    "gpu_memory" or "restarts". `detail` is the answer, or what went wrong. Bytes are None where they are unknown.
    """

    time: str
    number: int
    question: str
    state: State
    latency_s: float | None
    detail: str
    memory_bytes: int | None
    gpu_memory_bytes: int | None
    restarts: int
    breaches: tuple[str, ...]


@dataclass(frozen=True)
class Window:
    """The last checks: latencies of those that were answered in seconds, None without any, and shares."""

    num_checks: int
    latency_p50_s: float | None
    latency_p95_s: float | None
    latency_p99_s: float | None
    valid_rate: float
    worst_state: State


class Monitor:
    """Checks of one server, and what is remembered of them."""

    def __init__(
        self,
        server_url: str,
        questions: Sequence[Question],
        limits: Limits,
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
        self._last: collections.deque[tuple[State, float | None]] = collections.deque(maxlen=limits.window)
        self._listed: str | None = None
        self._listener: object = None
        self.num_checks = self.restarts = 0
        self.counts: collections.Counter[str] = collections.Counter()
        self.breached: collections.Counter[str] = collections.Counter()
        self.check: Check | None = None

    def _model_name(self, timeout_s: float) -> str | None:
        if self._model is not None:
            return self._model
        if self._listed is None:
            try:
                names = list_models(self.server_url, timeout_s=timeout_s, api_key=self._api_key)
            except ServerError as error:
                if error.failure in ("unreachable", "timeout"):
                    raise
                return None  # transformers serve fails here on a machine without a cache of the Hub
            self._listed = names[0] if len(names) == 1 else None
        return self._listed

    def _ask(self, question: Question) -> tuple[State, float | None, str]:
        """Return the state, the seconds to the end of an answer or None without one, and what it says."""
        start = time.perf_counter()
        timeout_s = self.limits.timeout_s
        try:
            model = self._model_name(timeout_s)
            reply = ask(
                self.server_url,
                question,
                model=model,
                max_new_tokens=self._max_new_tokens,
                timeout_s=max(timeout_s - (time.perf_counter() - start), 0.001),
                api_key=self._api_key,
            )
        except ServerError as error:
            self._listed = None  # another model may be served when it is back
            state = _STATE_OF_FAILURE[error.failure]
            return state, time.perf_counter() - start if state == "lying" else None, str(error)
        try:
            button = parse_answer(reply.text).button
        except AnswerError as error:
            cut = "" if reply.complete else f" (cut off after {self._max_new_tokens} tokens)"
            return "lying", reply.seconds, f"{error}{cut}"
        limit = self.limits.max_latency_p95_s
        return "slow" if limit is not None and reply.seconds > limit else "healthy", reply.seconds, button

    def _count_restart(self, usage: Usage) -> None:
        # Not by the time when it began: that is told by the clock, which may be set.
        if usage.listener is not None and self._listener not in (None, usage.listener):
            self.restarts += 1
        self._listener = usage.listener or self._listener

    def window(self) -> Window:
        """Return the last checks in figures."""
        states = [state for state, _ in self._last]
        seconds = [latency for _, latency in self._last if latency is not None]
        p50, p95, p99 = (float(value) for value in np.percentile(seconds, (50, 95, 99))) if seconds else (None,) * 3
        bad = collections.Counter(state for state in reversed(states) if state not in ("healthy", "slow"))
        return Window(
            num_checks=len(states),
            latency_p50_s=p50,
            latency_p95_s=p95,
            latency_p99_s=p99,
            valid_rate=sum(state in ("healthy", "slow") for state in states) / max(len(states), 1),
            worst_state=bad.most_common(1)[0][0] if bad else "healthy",
        )

    def _breaches(self, usage: Usage) -> tuple[str, ...]:
        limits, window = self.limits, self.window()
        found: dict[str, None] = {}
        recent = [state for state, _ in self._last][-limits.max_consecutive_failures :]
        if window.num_checks >= limits.max_consecutive_failures:
            if all(state not in ("healthy", "slow") for state in recent):
                found[recent[-1]] = None
            num_bad = sum(state not in ("healthy", "slow") for state, _ in self._last)
            if (limits.window - num_bad) / limits.window < limits.min_valid_rate:
                found[window.worst_state] = None
            p95, limit = window.latency_p95_s, limits.max_latency_p95_s
            if p95 is not None and limit is not None and p95 > limit:
                num_late = sum(seconds is not None and seconds > limit for _, seconds in self._last)
                if 20 * num_late > limits.window:  # else 95 % are in time when the window is full
                    found["slow"] = None
        for name, used, most in (
            ("memory", usage.memory_bytes, limits.max_memory_gib),
            ("gpu_memory", usage.gpu_memory_bytes, limits.max_gpu_memory_gib),
        ):
            if used is not None and most is not None and used > most * _GIB:
                found[name] = None
        if limits.max_restarts is not None and self.restarts > limits.max_restarts:
            found["restarts"] = None
        return tuple(found)

    def run_check(self) -> Check:
        """Ask the next question and return what came of it."""
        question = self._questions[self.num_checks % len(self._questions)]
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        state, latency_s, detail = self._ask(question)
        usage = self._usage()
        self._count_restart(usage)
        self.num_checks += 1
        self._last.append((state, latency_s))
        breaches = self._breaches(usage)
        self.counts[state] += 1
        self.breached.update(breaches)
        self.check = Check(
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
        return self.check

    def summary(self) -> dict[str, Any]:
        """Return the end of it for JSON: figures of the last window, counts of all checks."""
        return {
            "server": self.server_url,
            "passed": not self.breached,
            "num_checks": self.num_checks,
            "states": {state: self.counts[state] for state in STATES},
            "breaches": dict(self.breached),
            "last_check": asdict(self.check) if self.check else None,
            "window": asdict(self.window()),
        }


def watch(
    monitor: Monitor,
    *,
    interval_s: float,
    num_checks: int | None = None,
    duration_s: float | None = None,
) -> Iterator[Check]:
    """Yield a check every `interval_s` seconds, from the start of one to that of the next; without limits for ever."""
    start = time.monotonic()
    while num_checks is None or monitor.num_checks < num_checks:
        due = time.monotonic() + interval_s
        yield monitor.run_check()
        if duration_s is not None and max(due, time.monotonic()) - start >= duration_s:
            return
        if num_checks is None or monitor.num_checks < num_checks:
            time.sleep(max(due - time.monotonic(), 0))


def format_summary(summary: dict[str, Any]) -> str:
    """Return a summary as lines for people."""

    def seconds(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f} s"

    def size(value: int | None) -> str:
        return "unknown" if value is None else f"{value / _GIB:.2f} GiB"

    window, last = summary["window"], summary["last_check"] or {}
    states = ", ".join(f"{count} {state}" for state, count in summary["states"].items() if count)
    rows = {
        "server": summary["server"],
        "checks": f"{summary['num_checks']} ({states or 'none'})",
        "latency": f"p50 {seconds(window['latency_p50_s'])}, p95 {seconds(window['latency_p95_s'])}, "
        f"p99 {seconds(window['latency_p99_s'])} (last {window['num_checks']} checks)",
        "valid answers": f"{100 * window['valid_rate']:.1f} % (last {window['num_checks']} checks)",
        "memory": f"{size(last.get('memory_bytes'))}, GPUs {size(last.get('gpu_memory_bytes'))}",
        "restarts": last.get("restarts", 0),
        "breaches": ", ".join(f"{name} ({count} checks)" for name, count in summary["breaches"].items()) or "none",
    }
    return "\n".join(f"{name:15}{value}" for name, value in rows.items())
