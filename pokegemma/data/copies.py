"""Find sessions that are copies of another one, under another name, id, start or goal, whole or cut short."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_HASH_BYTES = 8  # compared within one corpus only


@dataclass(frozen=True)
class Fingerprint:
    """What distinguishes one recording from another.

    `record` is a digest of the session's id, start and turns as recorded. `turns` has a hash for each turn, of
    this turn and all before: the time, the answer and the buttons. What may differ in a copy or be missing there, such
    as paths, is left out. `dated` is whether any turn has a time.
    """

    record: str
    goal: str
    turns: tuple[str, ...]
    dated: bool


@dataclass(frozen=True)
class FrameHash:
    """A turn's frame as a hash; a raw one and a screenshot, with v1's overlay, differ in any recording."""

    raw: bool
    digest: str

    @classmethod
    def of(cls, png: bytes, *, raw: bool) -> "FrameHash":
        """Hash a picture."""
        return cls(raw, hashlib.blake2b(png, digest_size=_HASH_BYTES).hexdigest())


@dataclass(frozen=True)
class Play:
    """One converted session, as `find_copies` compares it. `pictures`: each turn's frame, None without one."""

    fingerprint: Fingerprint
    num_samples: int
    pictures: Sequence[FrameHash | None]
    num_corrected: int = 0


def take_fingerprint(
    *, session_id: object, start: object, goal: str, raw_turns: Sequence[Any], dated: bool
) -> Fingerprint:
    """Return the fingerprint of a session's record; `raw_turns` as in session_data.json.

    Raises:
        RecursionError: a turn is nested too deeply.
    """
    record = json.dumps([session_id, start, raw_turns], sort_keys=True)
    played, hashes = hashlib.blake2b(digest_size=_HASH_BYTES), []
    for raw in raw_turns:
        known = (
            [raw.get(key) for key in ("timestamp", "button_presses", "ai_analysis")] if isinstance(raw, dict) else raw
        )
        played.update(json.dumps(known, sort_keys=True).encode() + b"\n")
        hashes.append(played.hexdigest())
    return Fingerprint(hashlib.sha256(record.encode()).hexdigest(), goal, tuple(hashes), dated)


def find_copies(plays: Sequence[Play]) -> dict[int, int]:
    """Return, for the index of each play that is a copy, the index of the one that is kept.

    The play with the most samples is kept, then the one with the most turns: the longer one, unless its pictures are
    missing; then the one with the most raw frames, then the one with the most corrections. Plays that are still equal
    are ordered by their content, and identical ones by their place in `plays`.
    """
    order = sorted(
        (index for index, play in enumerate(plays) if play.fingerprint.turns),
        key=lambda index: (
            -plays[index].num_samples,
            -len(plays[index].fingerprint.turns),
            -sum(picture is not None and picture.raw for picture in plays[index].pictures),
            -plays[index].num_corrected,
            plays[index].fingerprint.record,
            plays[index].fingerprint.goal,
            index,
        ),
    )
    copies: dict[int, int] = {}
    kept_of_record: dict[str, int] = {}
    kept_by_first_turn: dict[str, list[int]] = {}
    for index in order:
        play, mark = plays[index], plays[index].fingerprint
        alike = kept_by_first_turn.setdefault(mark.turns[0], []) if mark.dated else []
        original = kept_of_record.get(mark.record)
        if original is None:
            original = next((kept for kept in alike if _is_same_play(plays[kept], play)), index)
            kept_of_record[mark.record] = original
        if original == index:
            alike.append(index)
        else:
            copies[index] = original
    return copies


def _is_same_play(play: Play, other: Play) -> bool:
    """Return whether the shorter of two plays is the beginning of the longer: the same turns at the same times.

    Times may have been made up, from one start for all sessions, and a player who stands still gives the same answers:
    a turn that shows another picture makes it another play. A copy may lack pictures, or only the raw ones: v1 wrote a
    turn first and its raw frame afterwards.
    """
    num_shared = min(len(play.fingerprint.turns), len(other.fingerprint.turns))
    if play.fingerprint.turns[num_shared - 1] != other.fingerprint.turns[num_shared - 1]:
        return False
    pictures = zip(play.pictures, other.pictures, strict=False)
    return all(
        first is None or second is None or first.raw != second.raw or first.digest == second.digest
        for first, second in pictures
    )
