"""What the converter reads: one reader for each kind of recording, and the search for recordings in a folder."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pokegemma.data.eevee_v1.journals import JOURNAL_FILE
from pokegemma.data.eevee_v1.named_pictures import CONVERSION_REPORT, SESSION_FILE, NamedPictures
from pokegemma.data.eevee_v1.sessions import find_eevee_sessions, read_session
from pokegemma.data.recordings.plain_form import ACTION_FILES, find_plain_form, read_plain_form
from pokegemma.data.recordings.session import Session, SessionError
from pokegemma.data.recordings.trajectory_log import find_trajectory_logs, name_trajectory_log, read_trajectory_log
from pokegemma.errors import PokegemmaError
from pokegemma.outputs import is_unfinished

_MAX_NAMED = 8


@dataclass(frozen=True)
class Reader:
    """How one kind of recording is found and read; all functions are those of a module.

    Attributes:
        expects: what a folder of this kind contains, for the message about a folder without any.
        find: returns the recordings directly in a folder, given the names of its files.
        read: returns the session of a recording; it may search the pictures of all recordings.
        tables: names of the file with the turns, none where that is the recording itself.
        name: returns a path whose last part names the recording.
    """

    expects: str
    find: Callable[[Path, Iterable[str]], list[Path]]
    read: Callable[[Path, NamedPictures], Session]
    tables: tuple[str, ...] = ()
    name: Callable[[Path], Path] = Path


def _read_plain(path: Path, _: NamedPictures) -> Session:
    return read_plain_form(path)


def _read_log(path: Path, _: NamedPictures) -> Session:
    return read_trajectory_log(path)


def _read_eevee(path: Path, pictures: NamedPictures) -> Session:
    return read_session(path, pictures=pictures)


EEVEE_V1 = Reader(
    f"session_*/{SESSION_FILE} of Eevee v1 or pokegemma",
    find_eevee_sessions,
    _read_eevee,
    (SESSION_FILE, JOURNAL_FILE),
)
PLAIN_FORM = Reader("frames/ with actions.csv or actions.jsonl", find_plain_form, _read_plain, ACTION_FILES)
TRAJECTORY_LOG = Reader(
    "a *.jsonl whose lines have step, action and screenshot",
    find_trajectory_logs,
    _read_log,
    name=name_trajectory_log,
)
READERS = (EEVEE_V1, PLAIN_FORM, TRAJECTORY_LOG)
"""The first that finds something in a folder is the one for this folder."""


@dataclass(frozen=True)
class Recording:
    """One session that was found: its folder, or the file of a log, and who reads it."""

    path: Path
    reader: Reader

    @property
    def named_path(self) -> Path:
        """A path whose last part is the session's name."""
        return self.reader.name(self.path)

    @property
    def num_bytes(self) -> int:
        """Size of the file with the turns: about how long the session takes."""
        paths = (self.path, *(self.path / name for name in self.reader.tables))
        return next((path.stat().st_size for path in paths if path.is_file()), 0)

    def read(self, *, pictures: NamedPictures | None = None) -> Session:
        """Return the session, every turn with exactly one status.

        Args:
            pictures: finds the file of a `screenshot_path` (default: in the session's folder only).

        Raises:
            SessionError: it is damaged, or not what it looked like.
        """
        try:
            return self.reader.read(self.path, pictures or NamedPictures(self.path))
        except OSError as error:
            raise SessionError(f"{self.path.name} cannot be read: {error.strerror}") from error


def read_recordings(data_dir: Path) -> Iterator[Session]:
    """Yield every session at and below a folder, whoever recorded it.

    Raises:
        PokegemmaError: there is none (see `find_recordings`), or one is damaged.
    """
    pictures = NamedPictures(data_dir)
    for recording in find_recordings(data_dir):
        yield recording.read(pictures=pictures)


def find_recordings(data_dir: Path, *, flag: str = "--eevee_data_dir") -> list[Recording]:
    """Return the recordings at and below `data_dir` at any depth, the least deep first, then by name.

    A folder called session_* without a recording in or below it is returned, too, so that it can be reported, except in
    a converted dataset. Symbolic links are followed, and each folder is read once.

    Raises:
        PokegemmaError: there is no such folder, or no recording in it, or it cannot be read; the message lists what is
            read and what was found.
    """
    data_dir = Path(data_dir)
    try:
        if not data_dir.is_dir():
            raise PokegemmaError(f"{flag} {data_dir}: no such folder")
        found, suffixes = _walk(data_dir)
    except OSError as error:
        raise PokegemmaError(f"{flag} {data_dir} cannot be read: {error.strerror}") from error
    if not found:
        kinds = "; ".join(reader.expects for reader in READERS)
        files = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common(_MAX_NAMED)) or "no files"
        raise PokegemmaError(
            f"{flag} {data_dir}: no session found. Read are: {kinds} (docs/recordings.md). Found: {files}"
        )
    paths = sorted(found, key=lambda path: (len(path.parts), path.parts))
    return [Recording(path, found[path]) for path in paths]


def _walk(data_dir: Path) -> tuple[dict[Path, Reader], Counter[str]]:
    """Return the recordings with their readers, and how many files of each kind there are in other folders."""
    found: dict[Path, Reader] = {}
    without_file: list[Path] = []
    suffixes: Counter[str] = Counter()
    seen = {data_dir.resolve()}
    unread = [(data_dir, False)]
    while unread:
        folder, generated = unread.pop()
        named = folder.name.startswith("session_") and folder != data_dir and not generated
        try:
            entries = list(os.scandir(folder))
        except PermissionError:
            if not named:
                raise
            found[folder] = EEVEE_V1
            continue
        files = [entry.name for entry in entries if _is_file(entry)]
        is_dataset = CONVERSION_REPORT in files
        here = _find_here(folder, files, generated=generated or is_dataset)
        found |= here
        if not here:
            suffixes.update(Path(name).suffix.lower() or "without a suffix" for name in files)
            if named and not is_dataset:
                without_file.append(folder)
        # Sorted, so that it is always the same one of two links to a folder that is read.
        for child in sorted((folder / entry.name for entry in entries if _is_folder(entry)), reverse=True):
            real = child.resolve()
            is_circle = real in seen and folder.resolve().is_relative_to(real)
            if is_circle or is_unfinished(child.name):
                continue
            if real in seen:
                if (child / SESSION_FILE).is_file():
                    found[child] = EEVEE_V1
                continue
            seen.add(real)
            unread.append((child, generated or (is_dataset and child.name in ("frames", "grid_images"))))
    above = {parent for path in found for parent in path.parents}
    return found | dict.fromkeys((folder for folder in without_file if folder not in above), EEVEE_V1), suffixes


def _find_here(folder: Path, files: list[str], *, generated: bool) -> dict[Path, Reader]:
    """Return the recordings directly in a folder; in a converted dataset only sessions of Eevee v1 are."""
    for reader in (EEVEE_V1,) if generated else READERS:
        if paths := reader.find(folder, files):
            return dict.fromkeys(paths, reader)
    return {}


def _is_file(entry: os.DirEntry[str]) -> bool:
    return Path(entry).is_file() if entry.is_symlink() else entry.is_file()


def _is_folder(entry: os.DirEntry[str]) -> bool:
    # DirEntry.is_dir() raises for a link to itself.
    return Path(entry).is_dir() if entry.is_symlink() else entry.is_dir()
