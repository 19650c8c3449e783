"""Stretches of a session: consecutive decisions that are shown to the model as one conversation."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

from pokegemma.data.samples import Sample

DEFAULT_MAX_DECISIONS, DEFAULT_OVERLAP = 16, 2
"""Number of decisions in a conversation, and how many of them are repeated from the one before."""


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
        """The decisions that are learned or evaluated here: each decision of a session in exactly one stretch."""
        return self.samples[self.num_context :]


def cut_trajectories(samples: Iterable[Sample], *, max_decisions: int, overlap: int) -> Iterator[Trajectory]:
    """Yield the stretches of samples in file order, with one session at a time in memory.

    Samples of a session that do not follow each other in the file count as several sessions, and so do those before and
    after a new start (`Sample.episode`). After `max_decisions` the next stretch begins with the last `overlap`
    decisions of the one before, as context.

    Raises:
        ValueError: `overlap` is not between 0 and `max_decisions` - 1.
    """
    if not 0 <= overlap < max_decisions:
        raise ValueError(f"an overlap of {overlap} leaves nothing of {max_decisions} decisions")
    for _, group in groupby(samples, key=lambda sample: sample.episode):
        session, start = tuple(group), 0
        yield Trajectory(session[:max_decisions])
        while (end := start + max_decisions) < len(session):
            start = end - overlap
            yield Trajectory(session[start : start + max_decisions], num_context=overlap)
