"""Read recorded sessions for the inspection page, as the converter would convert them."""

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path

from pokegemma.data.convert import SessionConverter, WindowOptions
from pokegemma.data.copies import Play, find_copies
from pokegemma.data.corpus import session_ids
from pokegemma.data.decisions import DECISION
from pokegemma.data.eevee_v1.named_pictures import NamedPictures
from pokegemma.data.inspection.frame_strips import FrameStrips
from pokegemma.data.inspection.views import SessionView, TurnView
from pokegemma.data.recordings.readers import Recording, find_recordings
from pokegemma.data.recordings.session import SessionError
from pokegemma.data.samples import evenly_spread
from pokegemma.data.shown_turns import ShownTurn, has_no_effect, is_repeat_of
from pokegemma.parallel.workers import map_items


@dataclass(frozen=True)
class _Task:
    recording: Recording
    session_id: str
    window: WindowOptions


def inspect_recordings(
    data_dir: Path, *, window: WindowOptions, max_sessions: int, num_workers: int
) -> tuple[list[SessionView], list[str], int]:
    """Return the sessions at and below a folder, what cannot be read, and how many sessions were found.

    Of more than `max_sessions`, as many are read, evenly spread.

    Raises:
        PokegemmaError: there is no session.
    """
    found = find_recordings(data_dir, flag="--data_path")
    ids = session_ids([recording.named_path for recording in found])
    tasks = [_Task(recording, name, window) for recording, name in zip(found, ids, strict=True)]
    outcomes = map_items(
        _inspect,
        evenly_spread(tasks, max_sessions),
        num_workers=num_workers,
        initialize=functools.partial(NamedPictures, data_dir),
        size=lambda task: task.recording.num_bytes,
        label="reading",
        unit="session",
    )
    sessions, plays, problems = [], [], []
    for outcome in outcomes:
        if isinstance(outcome, SessionError):
            problems.append(str(outcome))
        else:
            sessions.append(outcome[0])
            plays.append(outcome[1])
    for copy, original in find_copies(plays).items():
        note = f"a copy of {sessions[original].id}, which the converter leaves out"
        sessions[copy] = dataclasses.replace(sessions[copy], note=note)
    return sessions, problems, len(found)


def _inspect(task: _Task, pictures: NamedPictures) -> tuple[SessionView, Play] | SessionError:
    try:
        session = task.recording.read(pictures=pictures)
    except SessionError as error:
        return error
    converter = SessionConverter(session, task.session_id, output=Path(), options=task.window)
    strips, turns, before, decision_before = FrameStrips(), [], None, None
    for shown in converter.read_turns():
        if before is not None and before.status == DECISION and has_no_effect(before, shown):
            turns[-1] = dataclasses.replace(turns[-1], no_effect=True)
        is_repeat = decision_before is not None and shown.status == DECISION and is_repeat_of(shown, decision_before)
        turns.append(_view(shown, converter, strips, is_repeat=is_repeat))
        before, decision_before = shown, shown if shown.status == DECISION else decision_before
        converter.result.pictures.append(shown.frame and shown.frame.hash)
    view = SessionView(
        id=task.session_id,
        goal=session.goal,
        turns=tuple(turns),
        digests=strips.digests,
        strips=strips.encode(),
        problems=tuple(converter.result.problems),
    )
    return view, Play(session.fingerprint, sum(turn.is_sample for turn in turns), converter.result.pictures)


def _view(shown: ShownTurn, converter: SessionConverter, strips: FrameStrips, *, is_repeat: bool) -> TurnView:
    decision, is_sample = shown.turn.decision, shown.status == DECISION
    return TurnView(
        number=shown.turn.number,
        status=shown.status,
        button=decision.label if is_sample else next(iter(decision.pressed), None),
        pressed=decision.pressed,
        situation=decision.situation,
        reasoning=decision.reasoning,
        time=shown.turn.time,
        label_by=decision.label_by,
        is_corrected=decision.is_corrected,
        frame=None if shown.frame is None else strips.add(shown.frame.tile),
        window=tuple(strips.add(frame.tile) for frame in shown.window) if is_sample else (),
        is_repeat=is_repeat,
        sample=converter.build_sample(shown) if is_sample else None,
    )
