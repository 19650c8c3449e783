"""Check all trajectories of a folder, files or packed ones: every bad file by name, in one pass."""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pokegemma.battles.trajectories.checks.battles import KINDS, FileReport, check_file
from pokegemma.battles.trajectories.checks.known_words import KnownWords, load_known_words
from pokegemma.battles.trajectories.files import find_trajectory_files
from pokegemma.battles.trajectories.packed import PackedTrajectories
from pokegemma.battles.trajectories.packing import encode_battle
from pokegemma.battles.trajectories.records import TrajectoryError
from pokegemma.battles.trajectories.texts import MAX_BLANK
from pokegemma.data.checks.records import Check, percent
from pokegemma.parallel.workers import map_items

_BATCH = 64


def check_trajectories(folder: Path, *, num_workers: int = 1, ray_address: str | None = None) -> list[Check]:
    """Return a check for each of `KINDS`, whose details name every bad file.

    Raises:
        PokegemmaError: `folder` contains no trajectory files.
    """
    paths = find_trajectory_files(folder)
    check = functools.partial(_check_batch, folder=folder)
    return _summarize(_check_all(check, paths, folder, num_workers=num_workers, ray_address=ray_address))


def _check_all(
    check: Callable[[Any, KnownWords], list[FileReport]],
    items: Sequence[Any],
    folder: Path,
    *,
    num_workers: int,
    ray_address: str | None,
) -> list[FileReport]:
    """Return the reports of all items, which `check` gets in batches, in worker processes."""
    found = map_items(
        check,
        [items[start : start + _BATCH] for start in range(0, len(items), _BATCH)],
        num_workers=num_workers,
        ray_address=ray_address,
        folders=(folder,),
        initialize=load_known_words,
        label="checking",
        unit="batch",
    )
    return [report for reports in found for report in reports]


def _check_batch(paths: Sequence[Path], known: KnownWords, *, folder: Path) -> list[FileReport]:
    reports = []
    for path in paths:
        name = path.relative_to(folder).as_posix()
        try:
            reports.append(_without_trajectory(check_file(name, path.read_bytes(), known)))
        except OSError as error:
            reports.append(FileReport(name, problems=[("records", str(error))]))
    return reports


def check_packed(folder: Path, *, num_workers: int = 1, ray_address: str | None = None) -> list[Check]:
    """Return the checks of the files that were packed, and "columns": whether these are what the files give.

    Raises:
        PokegemmaError: `folder` was not packed to the end.
    """
    battles = PackedTrajectories(folder)
    check, numbers = functools.partial(_check_part, battles=battles), range(len(battles))
    reports = _check_all(check, numbers, folder, num_workers=num_workers, ray_address=ray_address)
    bad = _name_bad("columns", reports)
    summary = f"{len(battles)} battles, {len(bad)} columns are not what their files give"
    return [*_summarize(reports), Check("columns", "FAIL" if bad else "PASS", summary, bad)]


def _check_part(part: Iterable[int], known: KnownWords, *, battles: PackedTrajectories) -> list[FileReport]:
    reports = []
    for index in part:
        report = check_file(battles.name(index), battles.content(index), known)
        report.problems += [("columns", problem) for problem in _find_differences(battles, index, report)]
        reports.append(_without_trajectory(report))
    return reports


def _find_differences(battles: PackedTrajectories, index: int, report: FileReport) -> Iterator[str]:
    if report.trajectory is None:
        yield "its file contains no trajectory"
        return
    try:
        encoded = encode_battle(report.trajectory)
    except TrajectoryError as error:
        yield str(error)
        return
    packed = battles[index]
    if [[battles.words[number] for number in row] for row in packed.words] != encoded.words:
        yield "words"
    if battles.short_texts(index) != [" ".join(words) for words in encoded.short]:
        yield "short"
    for column in ("numbers", "actions", "legal", "rewards"):
        if not np.array_equal(getattr(packed, column), getattr(encoded, column)):
            yield column


def _without_trajectory(report: FileReport) -> FileReport:
    report.trajectory = None  # a worker sends the report, and keeps the battle
    return report


def _name_bad(kind: str, reports: Sequence[FileReport]) -> tuple[str, ...]:
    """Return what a kind of check found, each with its file."""
    return tuple(f"{each.path}: {problem}" for each in reports for found, problem in each.problems if found == kind)


def _summarize(reports: Sequence[FileReport]) -> list[Check]:
    num_states = sum(report.num_states for report in reports)
    unknown: Counter[str] = sum((report.unknown for report in reports), Counter())
    num_shown, num_words = (sum(getattr(report, key) for report in reports) for key in ("num_shown", "num_words"))
    num_blank = sum(report.num_blank for report in reports)
    facts = {
        "names": f"{len(reports)} files",
        "records": f"{num_states} states",
        "alignment": f"{num_states} states",
        "legality": f"{sum(report.num_revealed for report in reports)} revealed actions",
        "tera": f"{len(reports)} files",
        "values": f"{num_states} states",
        "words": f"{percent(unknown.total(), num_shown)} of {num_shown} words are unknown",
        "pads": f"{percent(num_blank, num_words)} of {num_words} words are pads",
    }
    checks = []
    for kind in KINDS:
        bad = _name_bad(kind, reports)
        num_bad = sum(any(found == kind for found, _ in report.problems) for report in reports)
        summary = f"{facts[kind]}, {num_bad} of {len(reports)} files are bad" if bad else facts[kind]
        checks.append(Check(kind, "FAIL" if bad else "PASS", summary, bad))
    if not num_words or num_blank > MAX_BLANK * num_words:
        summary = f"nothing to learn from: {facts['pads']} in all files together"
        checks[-1] = Check("pads", "FAIL", summary, checks[-1].details)
    return checks
