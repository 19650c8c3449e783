"""SHA-256 of files and folders: to recognise a model or an export, and to notice that it changed."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pokegemma.errors import CheckFailedError, PokegemmaError
from pokegemma.outputs import RUN_FILE

CARD_FILE = "README.md"
_ABOUT = (RUN_FILE, CARD_FILE)
"""Files that describe a model and are not part of it; they contain the time of day."""


class FileHashes:
    """SHA-256 of files, each read once as long as its size, time of change and inode stay the same.

    As in make, a file that was changed in place and given its old time again is taken for unchanged.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[list[int], str]] = {}  # {path: ([size, mtime in ns, inode], sha256)}

    def of(self, path: Path) -> str:
        """Return the SHA-256 of one file.

        Raises:
            PokegemmaError: it cannot be read.
        """
        key = str(path.absolute())
        try:
            facts = path.stat()
            state = [facts.st_size, facts.st_mtime_ns, facts.st_ino]
            if key not in self._known or self._known[key][0] != state:
                with open(path, "rb") as file:
                    self._known[key] = (state, hashlib.file_digest(file, "sha256").hexdigest())
        except OSError as error:
            raise PokegemmaError(f"{path} cannot be read: {error.strerror}") from error
        return self._known[key][1]


def content_files(folder: Path) -> list[Path]:
    """Return the files that make up a model or an export, sorted; not hidden ones, nor run.json and the model card.

    Raises:
        PokegemmaError: `folder` does not exist, or has no such file.
    """
    if not folder.is_dir():
        raise PokegemmaError(f"{folder}: no such folder")
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and str(path.relative_to(folder)) not in _ABOUT
    ]
    if not files:
        raise PokegemmaError(f"{folder} is empty")
    return files


def hash_folder(folder: Path, hashes: FileHashes) -> dict[str, dict[str, Any]]:
    """Return {path within the folder: {"sha256", "size"}} of a folder's `content_files`."""
    return {
        path.relative_to(folder).as_posix(): {"sha256": hashes.of(path), "size": path.stat().st_size}
        for path in content_files(folder)
    }


def hash_of(value: Any) -> str:
    """Return the SHA-256 of a JSON value; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def content_hash(files: Mapping[str, Mapping[str, Any]]) -> str:
    """Return one hash for the names and contents of `hash_folder`'s files."""
    return hash_of({name: file["sha256"] for name, file in files.items()})


def require_unchanged(
    folder: Path, expected: Mapping[str, Mapping[str, Any]], hashes: FileHashes, *, called: Path
) -> None:
    """Compare a folder with what `hash_folder` returned for it earlier. New files do not matter.

    `called` is what an error calls the folder: the place that its files were copied from.

    Raises:
        CheckFailedError: files are missing or changed; the message names them.
    """
    missing = [name for name in expected if not (folder / name).is_file()]
    changed = [
        name for name, file in expected.items() if name not in missing and hashes.of(folder / name) != file["sha256"]
    ]
    parts = [f"{what}: {_few(names)}" for what, names in (("missing", missing), ("changed", changed)) if names]
    if parts:
        raise CheckFailedError(f"{called} is not what was registered ({'; '.join(parts)})")


def _few(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
