"""Find the pictures of recorded turns by their recorded paths, which are often paths of another machine."""

import collections
import functools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pokegemma.data.recordings.session import PICTURES
from pokegemma.outputs import is_unfinished

SESSION_FILE = "session_data.json"
CONVERSION_REPORT = "conversion_report.json"  # every converted dataset has it


class NamedPictures:
    """Find the file of a `screenshot_path`, in a session's folder or elsewhere below `data_dir`.

    `data_dir` is listed once, when the first path needs it. Folders of sessions are left out, since their pictures
    belong to these sessions.
    """

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = Path(data_dir)

    def find(self, raw_turns: Sequence[Any], folder: Path, *, wanted: Sequence[bool]) -> list[Path | None]:
        """Return the file of each turn's `screenshot_path`, None where it is not certain.

        The name is searched in sshots/ and in the session's folder. Then the path itself is tried, if it is inside
        `data_dir`. Then the session's folder and `data_dir` are searched for the one file whose path has the longest
        end in common with the recorded path. A file that two turns name belongs to neither.

        Args:
            folder: of the session.
            wanted: whether a turn still lacks a picture; for others the folders are not listed.
        """
        paths = [
            raw["screenshot_path"] if isinstance(raw, dict) and isinstance(raw.get("screenshot_path"), str) else ""
            for raw in raw_turns
        ]
        times_named = collections.Counter(paths)
        own = functools.cache(lambda: _list_pictures(folder, others=folder))
        found = [
            self._find_one(path, folder, own if is_wanted else None) if path and times_named[path] == 1 else None
            for path, is_wanted in zip(paths, wanted, strict=True)
        ]
        times_found = collections.Counter(found)
        return [path if times_found[path] == 1 else None for path in found]

    def _find_one(self, path: str, folder: Path, own: Any) -> Path | None:
        parts = split_path(path)
        try:
            if not parts or parts[-1] in (".", ".."):
                return None
            for candidate in (folder / "sshots" / parts[-1], folder / parts[-1]):
                if candidate.is_file():
                    return candidate
            absolute, data_dir = Path(path), self.data_dir.resolve()
            if absolute.is_absolute() and absolute.resolve().is_relative_to(data_dir):
                inside = self.data_dir / absolute.resolve().relative_to(data_dir)
                return inside if inside.is_file() else None
        except (OSError, ValueError):  # too long a file name, a NUL byte, a lone surrogate
            return None
        if own is None or len(parts) == 1:  # v1 never wrote its "screenshot_3.png": a file of this name is another
            return None
        return _longest_match(own(), parts) or _longest_match(self._shared, parts)

    @functools.cached_property
    def _shared(self) -> dict[str, list[Path]]:
        return _list_pictures(self.data_dir, others=None)


def split_path(path: str) -> list[str]:
    """Return the parts of a path of Linux, macOS or Windows."""
    return [part for part in re.split(r"[\\/]", path) if part]


def _list_pictures(root: Path, *, others: Path | None) -> dict[str, list[Path]]:
    """Return the pictures below a folder by name, those of sessions other than `others` and of datasets left out."""
    pictures: dict[str, list[Path]] = {}
    for folder, names in _walk(root, others):
        for name in names:
            if name.lower().endswith(PICTURES):
                pictures.setdefault(name, []).append(folder / name)
    return pictures


def _walk(root: Path, others: Path | None) -> Iterator[tuple[Path, list[str]]]:
    for path, folders, files in os.walk(root):  # folders that cannot be read are left out
        folder = Path(path)
        if SESSION_FILE in files and folder != others:
            folders.clear()
            continue
        generated = ("frames", "grid_images") if CONVERSION_REPORT in files else ()
        folders[:] = sorted(name for name in folders if name not in generated and not is_unfinished(name))
        yield folder, files


def _longest_match(pictures: dict[str, list[Path]], parts: Sequence[str]) -> Path | None:
    """Return the picture whose path has the longest end in common with a recorded one, None if several have."""
    candidates = pictures.get(parts[-1], [])
    for length in range(2, len(parts) + 1):
        if len(candidates) < 2:
            break
        end = tuple(parts[-length:])
        longer = [path for path in candidates if path.parts[-length:] == end]
        candidates = longer or candidates
        if not longer:
            break
    return candidates[0] if len(candidates) == 1 else None
