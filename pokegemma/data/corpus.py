"""Convert a folder of recorded sessions into a dataset: the sessions in parallel, the files in a fixed order."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pokegemma.data.conversion_report import CONVERSION_REPORT, build_report, explain_nothing, list_problems
from pokegemma.data.convert import SessionResult, WindowOptions, convert_session
from pokegemma.data.copies import Play, find_copies
from pokegemma.data.decisions import clean_text
from pokegemma.data.eevee_v1.named_pictures import NamedPictures
from pokegemma.data.recordings.corrections import Correction, read_corrections
from pokegemma.data.recordings.readers import Recording, find_recordings
from pokegemma.data.recordings.session import SessionError, correct_session
from pokegemma.data.samples import EVAL_FILE, TRAIN_FILE, dataset_hash
from pokegemma.data.split import choose_eval_sessions
from pokegemma.errors import CheckFailedError, PokegemmaError
from pokegemma.outputs import RUN_FILE, atomic_folder, refuse_to_replace
from pokegemma.parallel.workers import is_cancelled, map_items
from pokegemma.provenance import write_run_record

OUTPUTS = (TRAIN_FILE, EVAL_FILE, "frames", "grid_images", CONVERSION_REPORT, RUN_FILE)
"""What a conversion writes. Other files in the output folder stay."""


@dataclasses.dataclass(frozen=True)
class _Task:
    recording: Recording
    session_id: str
    shard: Path
    output: Path
    options: WindowOptions
    data_dir: Path
    corrections: dict[int, Correction]


def convert_corpus(
    data_dir: Path,
    output_dir: Path,
    *,
    window: WindowOptions,
    eval_fraction: float,
    num_workers: int,
    ray_address: str | None = None,
    overwrite: bool = False,
    corrections: Path | None = None,
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Convert every session at `data_dir` and return the report; the files are the same for any number of workers.

    Args:
        num_workers: processes; with `ray_address`, workers of that cluster, where 0 means one for each CPU.
        corrections: a file of corrections (`recordings.corrections.read_corrections`).
        options: what run.json records as the resolved options.

    Raises:
        PokegemmaError: there are no sessions, `output_dir` contains an earlier conversion and `overwrite` is false, or
            the disk is full.
        CheckFailedError: there are sessions, and none of them gives a sample.
    """
    data_dir, output_dir = Path(data_dir), Path(output_dir)
    recordings = find_recordings(data_dir)
    with atomic_folder(output_dir, stage="convert", overwrite=overwrite, entries=OUTPUTS) as output:
        for name in ("frames", "grid_images"):
            refuse_to_replace(output_dir / name, *(recording.path for recording in recordings))
        tasks = _list_tasks(recordings, output, window=window, data_dir=data_dir, corrections=corrections)
        outcomes = _without_copies(tasks, _convert_sessions(tasks, data_dir, output, num_workers, ray_address))
        problems = list_problems(outcomes, data_dir)
        # Decisions that an option leaves out count here: the same sessions are held out with it and without it.
        num_decisions = {
            outcome.session: outcome.num_samples + outcome.num_left_out
            for outcome in outcomes
            if isinstance(outcome, SessionResult) and outcome.num_samples
        }
        if not num_decisions:
            raise CheckFailedError(explain_nothing(data_dir, outcomes))
        held_out = choose_eval_sessions(num_decisions, eval_fraction=eval_fraction)
        _join_shards(tasks, held_out, output)
        report = build_report(outcomes, held_out=held_out, problems=problems)
        _write_records(output, report, options or {}, window)
    return report


def _list_tasks(
    recordings: Sequence[Recording], output: Path, *, window: WindowOptions, data_dir: Path, corrections: Path | None
) -> list[_Task]:
    folders = [recording.named_path for recording in recordings]
    ids = session_ids(folders)
    corrected = _assign_corrections(corrections, folders, ids) if corrections else [{}] * len(folders)
    shards = output / "shards"
    shards.mkdir()
    return [
        _Task(recording, session_id, shards / f"{index:08d}.jsonl", output, window, data_dir, of_session)
        for index, (recording, session_id, of_session) in enumerate(zip(recordings, ids, corrected, strict=True))
    ]


def session_ids(folders: Sequence[Path]) -> list[str]:
    """Return each session's id: its folder's name without "session_", in characters that are safe in any path.

    Where that is not unique (upper and lower case count as one), the later ones get a hash of their path's last parts.
    """
    ids: list[str] = []
    taken: set[str] = set()
    for folder in folders:
        name = folder.resolve().name if folder.name in ("", "..") else folder.name
        plain = name.removeprefix("session_")
        session_id = re.sub(r"[^A-Za-z0-9._-]|^\.+", "_", plain)[:100] or "_"
        if session_id != plain or session_id.casefold() in taken:
            digest = hashlib.sha256(os.fsencode(f"{folder.parent.name}/{name}")).hexdigest()
            session_id = f"{session_id}-{digest[:8]}"
            while session_id.casefold() in taken:
                session_id += "x"
        taken.add(session_id.casefold())
        ids.append(session_id)
    return ids


def _assign_corrections(path: Path, folders: Sequence[Path], ids: Sequence[str]) -> list[dict[int, Correction]]:
    """Return each session's corrections of a file, which names a session by its folder or by its id.

    Raises:
        PokegemmaError: the file is not one of corrections, or names a session that does not exist or several have.
    """
    places: dict[str, set[int]] = {}
    for index, (folder, session_id) in enumerate(zip(folders, ids, strict=True)):
        for name in (folder.name, session_id):
            places.setdefault(name, set()).add(index)
    assigned: list[dict[int, Correction]] = [{} for _ in folders]
    for name, corrections in read_corrections(path).items():
        found = sorted(places.get(name, ()))
        if len(found) != 1:
            raise PokegemmaError(f"{path}: {len(found)} of {len(folders)} sessions are called {name!r}")
        assigned[found[0]].update(corrections)
    return assigned


def _convert_sessions(
    tasks: Sequence[_Task], data_dir: Path, output: Path, num_workers: int, ray_address: str | None
) -> list[SessionResult | SessionError]:
    """Convert in parallel and return the outcomes in the order of `tasks`."""
    # The largest first, so that no worker is left alone with one at the end.
    outcomes = map_items(
        _convert_one,
        tasks,
        num_workers=num_workers,
        ray_address=ray_address,
        folders=(data_dir, output),
        initialize=functools.partial(NamedPictures, data_dir),
        size=lambda task: task.recording.num_bytes,
        label="converting",
        unit="session",
    )
    return list(outcomes)


def _convert_one(task: _Task, pictures: NamedPictures) -> SessionResult | SessionError:
    try:
        session = correct_session(task.recording.read(pictures=pictures), task.corrections)
        return convert_session(
            session,
            task.session_id,
            shard=task.shard,
            output=task.output,
            options=task.options,
            cancelled=is_cancelled,
        )
    except SessionError as error:
        return error


def _without_copies(
    tasks: Sequence[_Task], outcomes: Sequence[SessionResult | SessionError]
) -> list[SessionResult | SessionError]:
    """Return `outcomes` with each copy of another session as an error, and what was written for it removed."""
    read_indices = [index for index, outcome in enumerate(outcomes) if isinstance(outcome, SessionResult)]
    plays = [
        Play(outcome.fingerprint, outcome.num_samples, outcome.pictures, outcome.num_corrected)
        for outcome in outcomes
        if isinstance(outcome, SessionResult)
    ]
    kept = list(outcomes)
    for place, original_place in find_copies(plays).items():
        index, original = read_indices[place], read_indices[original_place]
        _remove_session(tasks[index])
        folder, original_folder = (tasks[at].recording.path.relative_to(tasks[at].data_dir) for at in (index, original))
        num_turns, of_turns = outcomes[index].num_turns, outcomes[original].num_turns
        turns_note = "" if num_turns == of_turns else f" ({of_turns} turns)"
        kept[index] = SessionError(
            f"{folder} is a copy of {original_folder}{turns_note}: its {num_turns} turns are not converted"
        )
    return kept


def _remove_session(task: _Task) -> None:
    with open(task.shard, encoding="utf-8") as shard:
        for line in shard:
            if image := json.loads(line)["image"]:
                (task.output / image).unlink()
    task.shard.unlink()
    shutil.rmtree(task.output / "frames" / task.session_id)


def _join_shards(tasks: Sequence[_Task], held_out: set[str], output: Path) -> None:
    with contextlib.ExitStack() as stack:
        train = stack.enter_context(open(output / TRAIN_FILE, "wb"))
        evaluation = stack.enter_context(open(output / EVAL_FILE, "wb")) if held_out else None
        for task in tasks:
            if task.shard.exists():
                with open(task.shard, "rb") as shard:
                    shutil.copyfileobj(shard, evaluation if task.session_id in held_out else train)
    shutil.rmtree(output / "shards")


def _write_records(output: Path, report: dict[str, Any], options: dict[str, Any], window: WindowOptions) -> None:
    """Write the report and run.json next to the samples."""
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    (output / CONVERSION_REPORT).write_text(text, encoding="utf-8")
    hashes = {name: dataset_hash(output / name) for name in (TRAIN_FILE, EVAL_FILE) if (output / name).exists()}
    # run.json is UTF-8, and paths may contain bytes that are not.
    cleaned = {name: clean_text(value) if isinstance(value, str) else value for name, value in options.items()}
    write_run_record(output, stage="convert", options=cleaned, window=dataclasses.asdict(window), dataset_sha256=hashes)
