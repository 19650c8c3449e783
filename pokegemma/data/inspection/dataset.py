"""Read a converted dataset for the inspection page."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pokegemma.data.checks.records import Split, find_splits
from pokegemma.data.decisions import DECISION
from pokegemma.data.eevee_v1.named_pictures import CONVERSION_REPORT
from pokegemma.data.frame_pictures import FrameError, read_frame
from pokegemma.data.inspection.frame_strips import FrameStrips
from pokegemma.data.inspection.views import LEFT_OUT_OF_DATASET, SessionView, TurnView
from pokegemma.data.prompts import AnswerError, parse_answer
from pokegemma.data.recordings.session import read_time
from pokegemma.data.samples import Sample, evenly_spread, scan_samples
from pokegemma.errors import PokegemmaError
from pokegemma.parallel.workers import map_items


@dataclass(frozen=True)
class _Task:
    session: str
    split: Split
    samples: tuple[Sample, ...]
    left_out: Mapping[str, int]


def inspect_dataset(path: Path, *, max_sessions: int, num_workers: int) -> tuple[list[SessionView], list[str], int]:
    """Return a dataset's sessions, its lines that are not samples, and how many sessions it has.

    Of more than `max_sessions`, as many are read, evenly spread. Turns that are not samples are known where a window
    shows their frame.

    Raises:
        PokegemmaError: there is no dataset, or it contains no sample.
    """
    tasks, problems = [], []
    for split in filter(None, find_splits(path)):
        sessions: dict[str, list[Sample]] = {}
        for number, sample, found in scan_samples(split.path):
            if sample is None:
                problems.append(f"{split.path.name}:{number}: {found[0]}")
            else:
                sessions.setdefault(sample.session, []).append(sample)
        left_out = _read_reasons(split.folder / CONVERSION_REPORT)
        tasks += [_Task(name, split, tuple(found), left_out.get(name, {})) for name, found in sessions.items()]
    if not tasks:
        raise PokegemmaError(f"{path}: none of its lines is a sample; the first: {(problems or ['it is empty'])[0]}")
    chosen = evenly_spread(tasks, max_sessions)
    views = map_items(_inspect, chosen, num_workers=num_workers, label="reading", unit="session")
    return list(views), problems, len(tasks)


def _read_reasons(path: Path) -> dict[str, dict[str, int]]:
    """Return how many turns of each session are not samples, by reason; nothing where there is no report."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        return {session["session"]: session["turns_without_sample"] for session in report["per_session"]}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PokegemmaError(f"{path} is not a report of the converter: {error}") from error


def _inspect(task: _Task, _: None) -> SessionView:
    strips, problems = FrameStrips(), []
    places = {path: _read(task, path, strips, problems) for path in _paths(task.samples)}
    samples = {sample.metadata["turn"]: sample for sample in task.samples}
    shown = {turn: path for sample in task.samples for turn, path in sample.frame_turns}
    reason = next(iter(task.left_out)) if len(task.left_out) == 1 else LEFT_OUT_OF_DATASET
    turns = [
        _view(samples[number], places)
        if number in samples
        else TurnView(number, reason, None, frame=places[shown[number]])
        for number in sorted(samples.keys() | shown.keys())
    ]
    unseen = dict(task.left_out)
    if len(turns) > len(samples):
        unseen = _subtract(task.left_out, reason, len(turns) - len(samples))
    return SessionView(
        id=task.session,
        goal=str(task.samples[0].metadata.get("goal") or ""),
        turns=tuple(_add_effects(turns)),
        digests=strips.digests,
        strips=strips.encode(),
        split=task.split.name,
        problems=tuple(problems),
        unseen=unseen,
    )


def _subtract(left_out: Mapping[str, int], reason: str, num_shown: int) -> dict[str, int]:
    """Return the turns without a sample that no window shows, by reason as far as it is known."""
    if reason in left_out:
        return {reason: left_out[reason] - num_shown} if left_out[reason] > num_shown else {}
    num_unseen = sum(left_out.values()) - num_shown
    return {LEFT_OUT_OF_DATASET: num_unseen} if num_unseen > 0 else {}


def _paths(samples: Sequence[Sample]) -> dict[str, None]:
    return dict.fromkeys(path for sample in samples for path in sample.frames)


def _read(task: _Task, path: str, strips: FrameStrips, problems: list[str]) -> int | None:
    try:
        return strips.add(read_frame((task.split.folder / path).read_bytes()).tile)
    except (OSError, FrameError) as error:
        problems.append(f"{path}: {error}")
        return None


def _view(sample: Sample, places: Mapping[str, int | None]) -> TurnView:
    metadata = sample.metadata
    try:
        answer = parse_answer(sample.output)
        texts: dict[str, Any] = {
            "button": answer.button,
            "situation": answer.context,
            "reasoning": answer.reasoning,
        }
    except AnswerError as error:
        texts = {"button": None, "reasoning": str(error)}
    return TurnView(
        number=metadata["turn"],
        status=DECISION,
        pressed=tuple(metadata.get("buttons") or ()),
        time=_read_time(metadata.get("timestamp")),
        label_by=metadata.get("label_by"),
        is_corrected=metadata.get("corrected") is True,
        frame=places[sample.frames[-1]],
        window=tuple(place for path in sample.frames if (place := places[path]) is not None),
        sample=sample,
        **texts,
    )


def _read_time(timestamp: object) -> datetime | None:
    return read_time(timestamp) if isinstance(timestamp, str) else None


def _add_effects(turns: Sequence[TurnView]) -> list[TurnView]:
    """Mark samples without effect, as far as the turn that follows is known, and repeats of the sample before."""
    marked, before = [], None
    for place, turn in enumerate(turns):
        after = turns[place + 1] if place + 1 < len(turns) else None
        if turn.is_sample and turn.frame is not None:
            follows = after is not None and after.number == turn.number + 1 and not _is_new_start(after)
            was_pressed = turn.pressed[:1] in ((), (turn.button,))
            no_effect = follows and was_pressed and after.frame == turn.frame
            is_repeat = before is not None and (before.button, before.frame) == (turn.button, turn.frame)
            before = turn
            turn = dataclasses.replace(turn, no_effect=no_effect, is_repeat=is_repeat)
        marked.append(turn)
    return marked


def _is_new_start(turn: TurnView) -> bool:
    return turn.sample is not None and turn.sample.metadata.get("new_start") is True
