"""Which screenshot of a session belongs to which turn."""

from collections.abc import Sequence
from dataclasses import dataclass

_MISSING, _UNEXPLAINED, _CRASHED = 2, 2, 1


@dataclass(frozen=True)
class Numbering:
    """`steps[i]` is the step number of turn i's screenshot, None without one; `rule` is how it was found.

    rule: "turn" (step number = turn number), "ordinal" (step k is the k-th turn whose screen was captured),
    "ambiguous" (both are equally likely; turns for which they differ have no step) or "none" (no step files).
    """

    steps: tuple[int | None, ...]
    rule: str


def number_steps(
    turn_numbers: Sequence[int | None], captured: Sequence[bool | None], step_numbers: Sequence[int]
) -> Numbering:
    """Match step_%04d files to turns.

    v1's vision module had its own count of screenshots. `turn` also advances while the game is paused, and a turn whose
    capture failed is logged without a screenshot. After either, step numbers are lower than turn numbers. After a crash
    between capture and log there is one step more than turns. Each candidate gets penalties: for a turn without its
    file, for a file without its turn, and half of that for one last file (the crash). The lowest sum is taken.

    Args:
        turn_numbers: of all logged turns in order; None where the number is unusable.
        captured: whether the screen was captured; None where it is unknown (no visual analysis, and an error).
        step_numbers: of the existing files.
    """
    if not step_numbers:
        return Numbering((None,) * len(turn_numbers), "none")
    files = set(step_numbers)
    by_number = [None if seen is False else number for number, seen in zip(turn_numbers, captured, strict=True)]
    candidates = [
        ("turn", tuple(by_number)),
        ("ordinal", _count([seen is not False for seen in captured])),
        ("ordinal", _count([seen is True for seen in captured])),
    ]
    charges = [_charge([step for step in steps if step is not None], files) for _, steps in candidates]
    best = [candidate for candidate, charge in zip(candidates, charges, strict=True) if charge == min(charges)]
    agreed = tuple(
        steps[0] if steps[0] in files and len(set(steps)) == 1 else None
        for steps in zip(*(steps for _, steps in best), strict=True)
    )
    found = [tuple(step if step in files else None for step in steps) for _, steps in best]
    return Numbering(agreed, best[0][0] if len(set(found)) == 1 else "ambiguous")


def _count(captured: Sequence[bool]) -> tuple[int | None, ...]:
    count, steps = 0, []
    for seen in captured:
        count += seen
        steps.append(count if seen else None)
    return tuple(steps)


def _charge(needed: Sequence[int], files: set[int]) -> int:
    last = max(needed, default=0)
    beyond = sum(step > last for step in files)
    unexplained = len({step for step in files if step <= last} - set(needed)) + max(0, beyond - 1)
    return _MISSING * len(set(needed) - files) + _UNEXPLAINED * unexplained + _CRASHED * min(1, beyond)
