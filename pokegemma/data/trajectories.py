"""Stretches of a session: consecutive decisions that are shown to the model as one conversation."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

from pokegemma.data.samples import Sample

DEFAULT_MAX_DECISIONS, DEFAULT_OVERLAP = 16, 2
"""Decisions of a conversation, and how many of the previous one it begins with."""


@dataclass(frozen=True)
class Trajectory:
    """Decisions of one session in order. The first `num_context` are shown with their answers and not counted.

    They are the end of the stretch before, which counts them.
    """

    samples: tuple[Sample, ...]
    num_context: int = 0

    @property
    def id(self) -> str:
        """The first decision's."""
        return self.samples[0].id

    @property
    def counted(self) -> tuple[Sample, ...]:
        """The decisions that this stretch trains or judges: every one of a session is in exactly one stretch."""
        return self.samples[self.num_context :]


def cut_trajectories(samples: Iterable[Sample], *, max_decisions: int, overlap: int) -> Iterator[Trajectory]:
    """Yield the stretches of samples in file order; memory for one session at a time.

    A session is what follows without interruption in the file. Where it is longer than `max_decisions`, the next
    stretch begins with the last `overlap` decisions of the one before, as context.

    Raises:
        ValueError: `overlap` is not between 0 and `max_decisions` - 1.
    """
    if not 0 <= overlap < max_decisions:
        raise ValueError(f"an overlap of {overlap} leaves nothing of {max_decisions} decisions")
    for _, group in groupby(samples, key=lambda sample: sample.session):
        session, start = tuple(group), 0
        yield Trajectory(session[:max_decisions])
        while (end := start + max_decisions) < len(session):
            start = end - overlap
            yield Trajectory(session[start : start + max_decisions], num_context=overlap)
