"""Sessions as the inspection page shows them, whether they come from recordings or from a dataset."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from pokegemma.data.decisions import DECISION
from pokegemma.data.samples import Sample

LEFT_OUT_OF_DATASET = "left_out"
"""The status of a turn that a dataset shows in a window only, where its report does not tell the reason."""


@dataclass(frozen=True)
class TurnView:
    """One turn: `status` is DECISION or why it is not a sample, `frame` the place of its picture in the session's.

    `button` is the label of a decision, and what was pressed on another turn, None where that is unknown. `window` are
    the pictures that the sample shows. `no_effect`: the screen of the turn that follows is the same. `is_repeat`: the
    decision before has the same button and the same screen.
    """

    number: int | None
    status: str
    button: str | None
    pressed: tuple[str, ...] = ()
    situation: str = ""
    reasoning: str = ""
    time: datetime | None = None
    label_by: str | None = None
    is_corrected: bool = False
    frame: int | None = None
    window: tuple[int, ...] = ()
    no_effect: bool = False
    is_repeat: bool = False
    sample: Sample | None = None

    @property
    def is_sample(self) -> bool:
        return self.status == DECISION


@dataclass(frozen=True)
class SessionView:
    """One session: its turns in order, and its distinct pictures.

    `digests` identify the pictures by their pixels, `strips` contain them (`frame_strips`). `note` is what else is
    worth knowing, such as that the session is a copy. `unseen` counts turns without a sample that a dataset does not
    contain, by reason.
    """

    id: str
    goal: str
    turns: tuple[TurnView, ...]
    digests: tuple[str, ...]
    strips: tuple[bytes, ...]
    split: str | None = None
    note: str = ""
    problems: tuple[str, ...] = ()
    unseen: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Marks:
    """How turns of several sessions are related, by the place of the session and of the turn in it.

    `same_screen` has a number for each screen that several turns show. `is_duplicate`: some of them do not follow each
    other, or are in different sessions. `is_conflict`: decisions on this screen have different buttons.
    """

    same_screen: Mapping[tuple[int, int], int]
    is_duplicate: frozenset[int]
    is_conflict: frozenset[int]


def find_marks(sessions: Iterable[SessionView]) -> Marks:
    """Return which turns show the same screen."""
    turns_of: dict[str, list[tuple[int, int]]] = {}
    labels_of: dict[str, set[str | None]] = {}
    for place, session in enumerate(sessions):
        for index, turn in enumerate(session.turns):
            if turn.frame is not None:
                digest = session.digests[turn.frame]
                turns_of.setdefault(digest, []).append((place, index))
                if turn.is_sample:
                    labels_of.setdefault(digest, set()).add(turn.button)
    groups = [(digest, turns) for digest, turns in turns_of.items() if len(turns) > 1]
    return Marks(
        {turn: number for number, (_, turns) in enumerate(groups) for turn in turns},
        frozenset(number for number, (_, turns) in enumerate(groups) if not _follow_each_other(turns)),
        frozenset(number for number, (digest, _) in enumerate(groups) if len(labels_of.get(digest, ())) > 1),
    )


def _follow_each_other(turns: list[tuple[int, int]]) -> bool:
    first_session, first = turns[0]
    return turns == [(first_session, first + offset) for offset in range(len(turns))]


def summarise(sessions: list[SessionView], marks: Marks) -> dict[str, object]:
    """Return the counts of the page's head, also for `--json`."""
    turns = [(place, turn) for place, session in enumerate(sessions) for turn in session.turns]
    groups = Counter(marks.same_screen.values())
    reasons = Counter(turn.status for _, turn in turns if not turn.is_sample)
    for session in sessions:
        reasons.update(session.unseen)
    samples = [turn for _, turn in turns if turn.is_sample]
    return {
        "sessions": len(sessions),
        "turns": len(turns) + sum(sum(session.unseen.values()) for session in sessions),
        "samples": len(samples),
        "turns_without_sample": dict(reasons.most_common()),
        "buttons": dict(Counter(turn.button for turn in samples).most_common()),
        "distinct_screens": len({digest for session in sessions for digest in session.digests}),
        "samples_without_effect": sum(turn.no_effect for turn in samples),
        "repeated_samples": sum(turn.is_repeat for turn in samples),
        "turns_on_duplicate_screens": sum(groups[number] for number in marks.is_duplicate),
        "screens_with_different_buttons": len(marks.is_conflict),
        "picture_bytes": sum(len(strip) for session in sessions for strip in session.strips),
    }
