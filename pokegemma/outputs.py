"""Write under a temporary name, then rename: what has its final name is whole."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from safetensors import SafetensorError

from pokegemma.errors import PokegemmaError, is_disk_full

RUN_FILE = "run.json"


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it replaces `path` when the block ends, and is removed when it fails.

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


def write_if_changed(path: Path, text: str) -> None:
    """Write a file, whole or not at all, unless it holds this text already."""
    if path.is_file() and path.read_bytes() == text.encode():
        return
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def require_space(path: Path, num_bytes: int, *, remedy: str) -> None:
    """Refuse to begin what the disk has no room for; `path` need not exist yet.

    Raises:
        PokegemmaError: fewer than `num_bytes` are free; `remedy` says what to do.
    """
    folder = path.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise PokegemmaError(
            f"{path}: {num_bytes / 2**30:.1f} GiB needed, {free / 2**30:.1f} GiB free on this disk; {remedy}"
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


@contextlib.contextmanager
def file_lock(path: Path, *, wait: bool = True) -> Iterator[IO[str]]:
    """Hold an exclusive lock on a file, which is created, while a block runs; yield the open file.

    A process that inherits the file's descriptor holds the lock, too.

    Raises:
        BlockingIOError: another process holds the lock, and `wait` is false.
        OSError: the file cannot be opened, or its file system has no locks.
    """
    with open(path, "a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield file


def _stage_of(folder: Path) -> str | None:
    try:
        return json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))["stage"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def atomic_folder(path: Path, *, stage: str, overwrite: bool = False) -> Iterator[Path]:
    """Yield a new folder beside `path` that takes its name when the block ends, and is removed when it fails.

    `overwrite` replaces an earlier result of the same `stage`, as its run.json says, and nothing else.

    Raises:
        PokegemmaError: `path` exists, is not an empty folder, and may not be replaced; or the disk is full or not
            writable.
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        if not overwrite:
            raise PokegemmaError(f"{path} exists; choose another path or pass --overwrite")
        if _stage_of(path) != stage:
            raise PokegemmaError(f"{path} holds something else than a result of this script; choose another path")
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
        temporary.chmod(0o755)
        yield temporary
        if path.exists():
            # Keep the old folder until the new one has its name, so that no moment is without either.
            old = temporary.with_suffix(".old")
            path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
        else:
            temporary.rename(path)
    except (OSError, RuntimeError, SafetensorError) as error:
        if is_disk_full(error):
            raise PokegemmaError(f"{path} could not be written: the disk is full") from error
        if isinstance(error, OSError):
            raise PokegemmaError(f"{path} could not be written: {error}") from error
        raise
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
