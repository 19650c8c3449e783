"""Ask a server real questions on a schedule, and judge its answers by the limits of the options."""

import collections
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal, get_args

import numpy as np

from pokegemma.data.prompts import AnswerError, parse_answer
from pokegemma.engines.questions import Question
from pokegemma.environment import GIB
from pokegemma.serving.client import ServerError, ask, list_models
from pokegemma.serving.monitor_options import MonitorOptions
from pokegemma.serving.processes import Usage

ServerState = Literal["ok", "slow", "invalid", "timeout", "refused"]
"""ok: a valid answer in time. slow: a valid answer, but later than the limit. The others are failures. invalid: an
answer that is not JSON, has no valid button, or is not a chat completion. timeout: no whole answer in time. refused: no
connection, a broken one, or an error status."""

STATES: tuple[ServerState, ...] = get_args(ServerState)


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
    breaches: tuple[str, ...] = ()

    @property
    def failed(self) -> bool:
        """Return whether there was no valid answer."""
        return self.state not in ("ok", "slow")


def summarize_window(checks: Sequence[ServerCheck]) -> dict[str, Any]:
    """Return figures of some checks for JSON; latencies are None where no check has an answer."""
    seconds = [check.latency_s for check in checks if check.latency_s is not None]
    p50, p95, p99 = np.percentile(seconds, (50, 95, 99)).tolist() if seconds else (None,) * 3
    failures = collections.Counter(check.state for check in reversed(checks) if check.failed)
    return {
        "num_checks": len(checks),
        "latency_p50_s": p50,
        "latency_p95_s": p95,
        "latency_p99_s": p99,
        "valid_rate": (len(checks) - failures.total()) / max(len(checks), 1),
        "worst_state": max(failures, key=failures.__getitem__, default="ok"),  # the latest where two are as frequent
    }


def find_breaches(limits: MonitorOptions, checks: Sequence[ServerCheck]) -> tuple[str, ...]:
    """Return the names of the limits that do not hold after the last of `checks`; see ServerCheck.breaches.

    Rates and latencies are judged over a full window: checks that have not run yet count as good.
    """
    last, num_good = checks[-1], limits.window - sum(check.failed for check in checks)
    exceeded: list[tuple[str, bool]] = []
    if len(checks) >= limits.max_consecutive_failures:
        # More than 5 % of a full window: not the same as `latency_p95_s` above the limit.
        most_s = limits.max_latency_p95_s or math.inf
        exceeded = [
            (last.state, all(check.failed for check in checks[-limits.max_consecutive_failures :])),
            (summarize_window(checks)["worst_state"], num_good / limits.window < limits.min_valid_rate),
            ("slow", 20 * sum((check.latency_s or 0) > most_s for check in checks) > limits.window),
        ]
    exceeded += [
        ("memory", (last.memory_bytes or 0) > (limits.max_memory_gib or math.inf) * GIB),
        ("gpu_memory", (last.gpu_memory_bytes or 0) > (limits.max_gpu_memory_gib or math.inf) * GIB),
        ("restarts", limits.max_restarts is not None and last.restarts > limits.max_restarts),
    ]
    return tuple(dict.fromkeys(name for name, is_exceeded in exceeded if is_exceeded))


@dataclass
class Monitor:
    """Checks of one server; `usage` returns what its processes use now, `checks` are those of the window."""

    options: MonitorOptions
    questions: Sequence[Question]
    usage: Callable[[], Usage]
    api_key: str | None = None

    def __post_init__(self) -> None:
        self.checks: collections.deque[ServerCheck] = collections.deque(maxlen=self.options.window)
        self._states: collections.Counter[str] = collections.Counter()
        self._breaches: collections.Counter[str] = collections.Counter()
        self._model, self._listener, self._restarts = None, None, 0

    def _find_model(self) -> str | None:
        """Return the only model that the server lists, if it lists any."""
        try:
            names = list_models(self.options.server_url, timeout_s=self.options.timeout_s, api_key=self.api_key)
        except ServerError as error:
            if error.failure == "timeout":
                raise
            return None  # transformers serve fails here on a machine without a cache of the Hub
        return names[0] if len(names) == 1 else None

    def _ask(self, question: Question) -> tuple[ServerState, float | None, str]:
        """Return the state, the seconds to the end of an answer or None without one, and the detail."""
        options, start = self.options, time.perf_counter()
        try:
            self._model = options.model or self._model or self._find_model()
            reply = ask(
                options.server_url,
                question,
                model=self._model,
                max_new_tokens=options.max_new_tokens,
                timeout_s=max(options.timeout_s - (time.perf_counter() - start), 0.001),
                api_key=self.api_key,
            )
        except ServerError as error:
            self._model = None  # after a failure the server may return with another one
            return error.failure, time.perf_counter() - start if error.failure == "invalid" else None, str(error)
        try:
            button = parse_answer(reply.text).button
        except AnswerError as error:
            cut = "" if reply.complete else f" (cut off after {options.max_new_tokens} tokens)"
            return "invalid", reply.seconds, f"{error}{cut}"
        in_time = reply.seconds <= (options.max_latency_p95_s or math.inf)
        return "ok" if in_time else "slow", reply.seconds, button

    def run_check(self) -> ServerCheck:
        """Ask the next question and return its result."""
        number = self._states.total() + 1
        question = self.questions[(number - 1) % len(self.questions)]
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        state, latency_s, detail = self._ask(question)
        usage = self.usage()
        # Processes are compared, not the times when they began: those follow a clock that may be set.
        if usage.listener is not None and self._listener not in (None, usage.listener):
            self._restarts += 1
        self._listener = usage.listener or self._listener
        memory = (usage.memory_bytes, usage.gpu_memory_bytes)
        check = ServerCheck(now, number, question.id, state, latency_s, detail, *memory, self._restarts)
        self.checks.append(check)
        self.checks[-1] = check = replace(check, breaches=find_breaches(self.options, list(self.checks)))
        self._states[state] += 1
        self._breaches.update(check.breaches)
        return check

    def watch(self) -> Iterator[ServerCheck]:
        """Yield a check every `interval_s` seconds, from the start of one to that of the next."""
        end = time.monotonic() + (self.options.duration_s or math.inf)
        while True:
            due = time.monotonic() + self.options.interval_s
            check = self.run_check()
            yield check
            if check.number == self.options.num_checks or max(due, time.monotonic()) >= end:
                return
            time.sleep(max(due - time.monotonic(), 0))

    def summary(self) -> dict[str, Any]:
        """Return figures of the last window and counts of all checks, for JSON."""
        return {
            "server": self.options.server_url,
            "passed": not self._breaches,
            "num_checks": self._states.total(),
            "states": {state: self._states[state] for state in STATES},
            "breaches": dict(self._breaches),
            "last_check": asdict(self.checks[-1]) if self.checks else None,
            "window": summarize_window(self.checks),
        }
