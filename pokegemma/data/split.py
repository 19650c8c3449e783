"""Which sessions are held out for evaluation."""

import hashlib
from collections.abc import Mapping

_MAX_OVERSHOOT = 1.25
"""A session is not held out if eval.jsonl would exceed its target size by more than a quarter."""


def choose_eval_sessions(num_samples: Mapping[str, int], *, eval_fraction: float) -> set[str]:
    """Return the sessions to hold out: together about `eval_fraction` of all samples.

    Sessions are taken in the order of a hash of their id until the target is reached, without those that would exceed
    it by more than a quarter. So the order of the list has no influence, and a new session moves few others. With two
    sessions or more and a fraction above 0, neither side is empty.
    """
    sessions = sorted(
        (session for session, count in num_samples.items() if count),
        key=lambda session: hashlib.sha256(session.encode()).digest(),
    )
    if eval_fraction <= 0 or len(sessions) < 2:
        return set()
    target = eval_fraction * sum(num_samples.values())
    chosen: list[str] = []
    total = 0
    for session in sessions:
        if total < target and total + num_samples[session] <= _MAX_OVERSHOOT * target:
            chosen.append(session)
            total += num_samples[session]
    if not chosen:
        chosen = [min(sessions, key=num_samples.__getitem__)]
    return set(chosen[: len(sessions) - 1])
