"""Write under a temporary name, then rename: what has its final name is whole."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from safetensors import SafetensorError

from pokegemma.environment import GIB
from pokegemma.errors import PokegemmaError, is_disk_full

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`; it replaces `path` when the block ends, and is removed when it fails.

    Raises:
        OSError: as the system does; where the disk is full, it has the name of the file, whichever library wrote it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        temporary.replace(path)
    except (OSError, RuntimeError, SafetensorError) as error:
        if is_disk_full(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_synced(path: Path, content: bytes) -> None:
    """Write a file; an earlier one stays until the new one is whole and on the disk."""
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_if_changed(path: Path, text: str) -> None:
    """Write a file, whole or not at all, unless it already contains this text."""
    if path.is_file() and path.read_bytes() == text.encode():
        return
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def require_space(path: Path, num_bytes: int, *, remedy: str) -> None:
    """Check that the disk has room for a result; `path` need not exist yet.

    Raises:
        PokegemmaError: fewer than `num_bytes` are free; the message ends with `remedy`.
    """
    folder = path.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise PokegemmaError(
            f"{path}: {num_bytes / GIB:.1f} GiB needed, {free / GIB:.1f} GiB free on this disk; {remedy}"
        )


def refuse_to_replace(output: Path, *inputs: str | Path, flag: str = "--output_dir") -> None:
    """Refuse an output folder that contains one of the inputs, which writing it would replace.

    A string that is not a path on this machine may be the name of a model on the Hub, and is accepted. A Path counts
    even if it does not exist yet.

    Raises:
        PokegemmaError: an input is `output` itself or inside it.
    """
    for source in inputs:
        is_path = isinstance(source, Path) or Path(source).exists()
        if is_path and Path(source).resolve().is_relative_to(output.resolve()):
            raise PokegemmaError(f"{flag} {output} contains the input {source}; choose another folder")


def require_folder(path: Path, *, flag: str = "--output_dir") -> None:
    """Refuse an output folder that is a file, or would be within one; it need not exist yet.

    Raises:
        PokegemmaError: it is.
    """
    with contextlib.suppress(PermissionError):  # writing will report it
        place = next(place for place in (path, *path.parents) if place.exists())
        if not place.is_dir():
            raise PokegemmaError(f"{flag} {path}: {place} is not a folder; choose another")


@contextlib.contextmanager
def file_lock(path: Path, *, wait: bool = True, shared: bool = False) -> Iterator[IO[str]]:
    """Hold a lock on a file, which is created, while a block runs; yield the open file.

    A process that inherits the file's descriptor holds the lock, too.

    Args:
        shared: others may hold it at the same time, if theirs is shared, too. By default nobody else may.

    Raises:
        BlockingIOError: another process holds the lock, and `wait` is false.
        OSError: the file cannot be opened, or its file system has no locks.
    """
    with open(path, "a+", encoding="utf-8") as file:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        yield file


def is_unfinished(name: str) -> bool:
    """Return whether a file or folder has a temporary name of `atomic_file` or `atomic_folder`."""
    return name.startswith(".") and name.endswith(".part")


@contextlib.contextmanager
def atomic_folder(path: Path, *, stage: str, overwrite: bool = False, entries: Sequence[str] = ()) -> Iterator[Path]:
    """Yield a new folder that becomes `path` when the block ends, and is removed when it fails.

    Until then it is in a hidden folder, and an earlier result stays at `path`. A process that is killed leaves the
    hidden folder, which the next call for the same path removes, unless it contains files of the earlier result.

    Args:
        path: the result. May be an empty folder.
        stage: the `stage` in the result's run.json.
        overwrite: replace an earlier result of the same stage, and nothing else.
        entries: names of what the stage writes, where `path` may contain other files: these stay. By default all of
            `path` is the result.

    Raises:
        PokegemmaError: there is something at `path` that may not be replaced, or the disk is full or not writable.
    """
    path, work = Path(path), None
    if path.name in ("", ".."):
        path = path.resolve()  # for its name
    try:
        root, _ = _find_place(path, entries, stage=stage, overwrite=overwrite)
        _remove_stale_work(_find_work(path, entries, stage=stage))
        work = _make_work_folder(root, prefix=f".{path.name}.")
        new = work / "new" / path.name
        new.mkdir(parents=True)
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # not every network file system has locks
                stack.enter_context(file_lock(work / _LOCK, wait=False))
            yield new
            root, names = _find_place(path, entries, stage=stage, overwrite=overwrite)  # another process may have ended
            _replace(names, root, new=new if root == path else new.parent, old=work / _OLD)
    except (OSError, RuntimeError, SafetensorError) as error:
        if is_disk_full(error):
            raise PokegemmaError(f"{path} could not be written: the disk is full") from error
        if isinstance(error, OSError):
            raise PokegemmaError(f"{path} could not be written: {error}") from error
        raise
    finally:
        if work is not None and _has_earlier_files(work):
            logger.error("%s: these earlier files could not be moved back to %s", work / _OLD, root)
        elif work is not None:
            with contextlib.suppress(OSError):  # workers on other machines cannot write under a new name
                work = work.rename(work.with_name(f"{work.stem}.gone.part"))
            shutil.rmtree(work, ignore_errors=True)


_LOCK, _OLD = "lock", "old"
"""In the hidden folder of `atomic_folder`: the file that a running process locks, and what is being replaced."""


def _find_place(path: Path, entries: Sequence[str], *, stage: str, overwrite: bool) -> tuple[Path, Sequence[str]]:
    """Return a folder and the names in it that a result shall have, where these are free or may be replaced."""
    is_shared = bool(entries) and path.is_dir()
    root, names = (path, entries) if is_shared else (path.parent, [path.name])
    existing = [root / name for name in names if os.path.lexists(root / name)]
    if not existing or (existing == [path] and path.is_dir() and not any(path.iterdir())):
        return root, names
    if not overwrite:
        raise PokegemmaError(f"{existing[0]} exists; choose another path or pass --overwrite")
    try:
        found = json.loads((path / RUN_FILE).read_text(encoding="utf-8"))["stage"]
    except (OSError, ValueError, KeyError, TypeError):
        found = None
    if found != stage:
        message = f"{path} was not created by this script, so it is not overwritten; choose another path"
        left = [str(work / _OLD) for work in _find_work(path, entries, stage=stage) if _has_earlier_files(work)]
        if left:
            message += f" (a process was killed while it replaced these earlier files: {', '.join(left)})"
        raise PokegemmaError(message)
    return root, names


def _find_work(path: Path, entries: Sequence[str], *, stage: str) -> list[Path]:
    """Return the hidden folders for a path, of this process and others: next to it or, with `entries`, inside it."""
    places = [(path.parent, (f".{path.name}.",))]
    if entries:
        places.append((path, (f".{path.name}.", f".{stage}.")))  # .convert.*.part: of earlier versions
    found = []
    for folder, prefixes in places:
        with contextlib.suppress(OSError, ValueError):
            found += [
                work
                for work in sorted(folder.iterdir())
                if work.name.startswith(prefixes) and is_unfinished(work.name) and (work / _LOCK).is_file()
            ]
    return found


def _has_earlier_files(work: Path) -> bool:
    """Return whether a hidden folder contains what was being replaced; true if that cannot be read."""
    try:
        return any((work / _OLD).iterdir())
    except FileNotFoundError:
        return False
    except OSError:
        return True


def _remove_stale_work(folders: Sequence[Path]) -> None:
    """Remove the hidden folders of killed processes: nobody holds their locks."""
    for work in folders:
        with contextlib.suppress(OSError), file_lock(work / _LOCK, wait=False):
            if _has_earlier_files(work):
                logger.warning("%s: a process was killed while it replaced these earlier files", work / _OLD)
            else:
                shutil.rmtree(work, ignore_errors=True)


def _make_work_folder(root: Path, *, prefix: str) -> Path:
    try:
        root.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=prefix, suffix=".part", dir=root))
    except ValueError as error:  # a NUL byte
        raise OSError(str(error)) from error


def _replace(names: Sequence[str], root: Path, *, new: Path, old: Path) -> None:
    """Move what has one of the names from `root` to `old`, then from `new` to `root`; move all back if that fails."""
    old.mkdir()
    moved: list[tuple[Path, Path]] = []
    try:
        for source, target in ((root, old), (new, root)):
            for name in names:
                if os.path.lexists(source / name):
                    (source / name).rename(target / name)
                    moved.append((source / name, target / name))
    except BaseException:
        for before, after in reversed(moved):
            with contextlib.suppress(OSError):
                after.rename(before)
        raise
    old.rename(old.with_name("replaced"))
