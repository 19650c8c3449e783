"""Checks of a dataset's pictures: each distinct one is decoded once, and only a hash of it is kept."""

import hashlib
import multiprocessing
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from pokegemma.data.checks.records import NO_SAMPLES, Check, Split, percent, skipped
from pokegemma.data.frame_pictures import FRAME_SIZE_PX, UNREADABLE, fit_tile, to_rgb
from pokegemma.data.grids import GRID_SIZE_PX, LABEL_SIZE_PX, NUM_TILES, compose_grid
from pokegemma.data.samples import Sample

MIN_SIDE_PX, MAX_SIDE_PX, MAX_ASPECT = 64, 4096, 4
"""Pictures outside these bounds are not screens: a GBA frame is 240x160, its 2x2 picture 480x320."""

ONE_COLOUR_TOLERANCE = 8
"""A channel that spans no more than this many of 256 levels is one colour (JPEG noise)."""

MAX_ONE_COLOUR_SHARE = 0.05
"""Games fade to black, so a few frames of one colour are normal; more mean a broken recording."""

MAX_SHARED_WINDOW_SHARE = 0.05
"""Title screens and menus repeat between sessions, so a few eval windows may be in train."""

MAX_GRIDS_COMPARED = 400
"""Grid pictures, drawn at random, that are compared with their frames. If 1 % are wrong, one is found in 98 % of
datasets."""

_HASH_BYTES = 16
_CHUNK = 64
_MIN_PICTURES_FOR_WORKERS = 400
_MIN_GRIDS_FOR_WORKERS = 100

Progress = Callable[[Iterable, int], Iterable]


@dataclass(frozen=True)
class PictureFacts:
    """The facts about a picture: a hash of its pixels, its size, whether it has one colour; or its problem."""

    digest: bytes = b""
    size_px: tuple[int, int] = (0, 0)
    one_colour: bool = False
    problem: str | None = None


@dataclass
class PictureScan:
    """Results of `scan_pictures`, by full path. `digests` has the pictures without a problem."""

    digests: dict[str, bytes] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    one_colour: set[str] = field(default_factory=set)
    sizes_px: Counter[tuple[int, int]] = field(default_factory=Counter)


def inspect_picture(path: str, folder: str) -> PictureFacts:
    """Decode a picture in full; `folder` is the dataset folder, which it must not leave by a symbolic link."""
    try:
        if not Path(path).is_file():
            return PictureFacts(problem="not found (paths are relative to the JSONL file)")
    except OSError as error:  # a name that is not possible for a file
        return PictureFacts(problem=error.strerror)
    resolved, root = os.path.realpath(path), os.path.realpath(folder)
    if os.path.commonpath([resolved, root]) != root:
        return PictureFacts(problem="a symbolic link leads out of the dataset folder")
    try:
        with Image.open(path) as image:
            width, height = image.size
            if min(image.size) < MIN_SIDE_PX or max(image.size) > MAX_SIDE_PX:
                return PictureFacts(
                    problem=f"{width}x{height} px is not a screen ({MIN_SIDE_PX} to {MAX_SIDE_PX} px a side)"
                )
            if max(image.size) > MAX_ASPECT * min(image.size):
                return PictureFacts(problem=f"{width}x{height} px is not a screen (longer than {MAX_ASPECT}:1)")
            pixels = to_rgb(image)
    except UNREADABLE as error:
        return PictureFacts(problem=f"does not decode: {error}")
    digest = hashlib.blake2b(pixels.tobytes(), digest_size=_HASH_BYTES, salt=f"{width}x{height}".encode()).digest()
    one_colour = all(high - low <= ONE_COLOUR_TOLERANCE for low, high in pixels.getextrema())
    return PictureFacts(digest=digest, size_px=pixels.size, one_colour=one_colour)


def _inspect(job: tuple[str, str]) -> tuple[str, PictureFacts]:
    return job[0], inspect_picture(*job)


def _full_paths(split: Split, names: Iterable[str]) -> Iterator[str]:
    return (f"{split.folder}/{name}" for name in names)


def _map(work: Callable, jobs: Sequence, *, num_workers: int, at_least: int, chunk_size: int) -> Iterator:
    """Yield the results of `work` in order, from `num_workers` processes if there are `at_least` so many jobs."""
    if num_workers < 2 or len(jobs) < at_least:
        yield from map(work, jobs)
        return
    # Spawned, not forked: the caller may have loaded libraries with threads of their own.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, mp_context=context) as pool:
        yield from pool.map(work, jobs, chunksize=chunk_size)


def scan_pictures(splits: Iterable[Split], *, num_workers: int, progress: Progress | None = None) -> PictureScan:
    """Decode every distinct picture of the splits once, in `num_workers` processes.

    Args:
        progress: wraps the results given their number, for a progress bar.
    """
    jobs: dict[str, str] = {}
    for split in splits:
        for sample in split.samples():
            names = sample.frames if sample.image is None else (*sample.frames, sample.image)
            jobs.update((path, str(split.folder)) for path in _full_paths(split, names))
    scan = PictureScan()
    results = _map(
        _inspect, list(jobs.items()), num_workers=num_workers, at_least=_MIN_PICTURES_FOR_WORKERS, chunk_size=_CHUNK
    )
    for path, picture in progress(results, len(jobs)) if progress else results:
        if picture.problem:
            scan.problems[path] = picture.problem
            continue
        scan.digests[path] = picture.digest
        scan.sizes_px[picture.size_px] += 1
        if picture.one_colour:
            scan.one_colour.add(path)
    return scan


def check_pictures(splits: Iterable[Split], scan: PictureScan) -> Check:
    """Fail if a picture is missing, damaged or not a screen, or if all pictures of a sample have one colour only.

    The original trained on black pictures. Games do fade to black, so single frames of one colour are a warning
    up to `MAX_ONE_COLOUR_SHARE` of the pictures; a sample with no other frame is a failure.
    """
    details, num_blind = [], 0
    for split in splits:
        for where, sample in split.located():
            names = dict.fromkeys(sample.frames if sample.image is None else (*sample.frames, sample.image))
            paths = dict(zip(names, _full_paths(split, names), strict=True))
            details += [
                f"{where} ({sample.id}): {name}: {scan.problems[path]}"
                for name, path in paths.items()
                if path in scan.problems
            ]
            if all(paths[name] in scan.one_colour for name in sample.frames):
                num_blind += 1
                details.append(f"{where} ({sample.id}): every frame has one colour only")
            elif sample.image is not None and paths[sample.image] in scan.one_colour:
                num_blind += 1
                details.append(f"{where} ({sample.id}): {sample.image} has one colour only")
    if not scan.digests and not scan.problems:
        return skipped("pictures", NO_SAMPLES)
    num_pictures, num_plain = len(scan.digests) + len(scan.problems), len(scan.one_colour)
    sizes = ", ".join(f"{width}x{height}" for (width, height), _ in scan.sizes_px.most_common(4))
    summary = f"{num_pictures} distinct pictures ({sizes or 'none readable'})"
    if scan.problems or num_blind or num_plain > MAX_ONE_COLOUR_SHARE * num_pictures:
        found = f"{len(scan.problems)} unusable, {num_plain} of one colour, {num_blind} samples show one colour only"
        details += [f"{Path(path).name}: one colour only" for path in sorted(scan.one_colour)]
        return Check("pictures", "FAIL", f"{summary}: {found}", tuple(details))
    if num_plain:
        details += [f"{Path(path).name}: one colour only" for path in sorted(scan.one_colour)]
        return Check("pictures", "WARN", f"{summary} decode; {num_plain} of one colour", tuple(details))
    return Check("pictures", "PASS", f"{summary} decode, none of one colour")


def _pixels(path: str) -> Image.Image:
    with Image.open(path) as image:
        return to_rgb(image)


def grid_problem(job: tuple[str, list[str]]) -> str | None:
    """Return which tiles of a grid picture are not its frames (oldest first) outside the labels, or None."""
    path, frames = job
    grid = _pixels(path)
    if grid.size != GRID_SIZE_PX:
        return f"{grid.width}x{grid.height} px, not {GRID_SIZE_PX[0]}x{GRID_SIZE_PX[1]}"
    expected = compose_grid([np.asarray(fit_tile(_pixels(frame))) for frame in frames[-NUM_TILES:]])
    different = (expected != np.asarray(grid)).any(axis=2)
    wrong = []
    for index in range(NUM_TILES):
        top, left = index // 2 * FRAME_SIZE_PX[1], index % 2 * FRAME_SIZE_PX[0]
        tile = different[top : top + FRAME_SIZE_PX[1], left : left + FRAME_SIZE_PX[0]]
        tile[: LABEL_SIZE_PX[1], : LABEL_SIZE_PX[0]] = False
        if tile.any():
            wrong.append(f"t={index}")
    return f"{', '.join(wrong)} not as in the frames" if wrong else None


def _with_grids(splits: Iterable[Split], scan: PictureScan) -> Iterator[tuple[str, Split, Sample]]:
    """Yield (where, split, sample) for each sample with a grid picture, if that and all frames decode."""
    for split in splits:
        for where, sample in split.located():
            if sample.image is None:
                continue
            if all(path in scan.digests for path in _full_paths(split, (sample.image, *sample.frames))):
                yield where, split, sample


def check_grids(splits: Sequence[Split], scan: PictureScan, *, num_workers: int) -> Check:
    """Fail if a grid picture does not show its sample's frames: black, stale or another sample's.

    Compares all grids, or `MAX_GRIDS_COMPARED` of them drawn at random, pixel by pixel outside the time labels.
    """
    total = sum(1 for _ in _with_grids(splits, scan))
    if not total:
        return skipped("grids", "no sample has a grid picture and frames that decode")
    drawn = set(random.Random(0).sample(range(total), min(total, MAX_GRIDS_COMPARED)))
    names, jobs = [], []
    for number, (where, split, sample) in enumerate(_with_grids(splits, scan)):
        if number in drawn:
            names.append(f"{where} ({sample.id}): {sample.image}")
            jobs.append((f"{split.folder}/{sample.image}", list(_full_paths(split, sample.frames))))
    problems = _map(grid_problem, jobs, num_workers=num_workers, at_least=_MIN_GRIDS_FOR_WORKERS, chunk_size=16)
    details = tuple(f"{name}: {problem}" for name, problem in zip(names, problems, strict=True) if problem)
    summary = f"{len(details)} of {len(jobs)} grid pictures compared (of {total}) differ from their frames"
    return Check("grids", "FAIL" if details else "PASS", summary, details)


def _windows(split: Split, scan: PictureScan) -> Iterator[tuple[str, bytes]]:
    """Yield (where, hash of the window's frames in order) for each sample whose frames all decode."""
    for where, sample in split.located():
        digests = [scan.digests.get(path) for path in _full_paths(split, sample.frames)]
        if None not in digests:
            yield f"{where} ({sample.id})", hashlib.blake2b(b"".join(digests), digest_size=_HASH_BYTES).digest()


def check_windows(train: Split, held_out: Split, scan: PictureScan) -> Check:
    """Compare windows by their pixels; fail if more than `MAX_SHARED_WINDOW_SHARE` of eval is in train."""
    seen = {window for _, window in _windows(train, scan)}
    windows = list(_windows(held_out, scan))
    if not windows or not seen:
        return skipped("identical windows", "no window whose frames all decode")
    shared = tuple(f"{where}: the same frames are in train" for where, window in windows if window in seen)
    summary = f"{len(shared)} of {len(windows)} eval windows are in train ({percent(len(shared), len(windows))})"
    if len(shared) > MAX_SHARED_WINDOW_SHARE * len(windows):
        return Check("identical windows", "FAIL", f"{summary}; at most 5 % may be", shared)
    return Check("identical windows", "WARN" if shared else "PASS", summary, shared)
