"""The limits that a monitored server must keep, and which of them do not hold."""

import collections
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

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

    Rates and latencies are judged over a full window of `window` checks; checks that have not run yet count as good.
    They are not judged before `max_consecutive_failures` checks. `timeout_s` is for a whole answer.
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
class WindowFigures:
    """The last checks: latencies of those with an answer in seconds, None without any, and the share of valid answers.

    `worst_state` is the most frequent failure, or "ok" without any; it has this name in the summary's JSON.
    """

    num_checks: int
    latency_p50_s: float | None
    latency_p95_s: float | None
    latency_p99_s: float | None
    valid_rate: float
    worst_state: ServerState


CheckResults = Sequence[tuple[ServerState, float | None]]
"""State and latency of checks, the oldest first."""


def summarize_window(results: CheckResults) -> WindowFigures:
    """Return the figures of some checks."""
    seconds = [latency for _, latency in results if latency is not None]
    p50, p95, p99 = np.percentile(seconds, (50, 95, 99)).tolist() if seconds else (None,) * 3
    failures = collections.Counter(state for state, _ in reversed(results) if state not in _VALID)
    return WindowFigures(
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
            breaches.append(summarize_window(results).worst_state)
        limit_s = limits.max_latency_p95_s
        if limit_s is not None:
            num_late = sum(latency is not None and latency > limit_s for _, latency in results)
            # A breach if more than 5 % of a full window are late: not the same as `latency_p95_s` above the limit.
            if 20 * num_late > limits.window:
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
