"""Unpack llama.cpp's converter from the source package of llama-cpp-python: no wheel has it.

python -m pokegemma.export.llama_cpp_converter SOURCE_PACKAGE FOLDER

./init.sh --with gguf calls it, with FOLDER = `CONVERTER_FOLDER` of the environment.
"""

import json
import sys
import tarfile
from pathlib import Path, PurePosixPath

from pokegemma.errors import PokegemmaError
from pokegemma.outputs import RUN_FILE, atomic_folder

CONVERTER_FOLDER = Path(sys.prefix) / "share" / "llama.cpp"
CONVERTER = "convert_hf_to_gguf.py"

_PARTS = (CONVERTER, "conversion", "gguf-py/gguf", "LICENSE")
_STAGE = "llama.cpp"


def find_converter(llama_cpp_dir: Path | None) -> Path:
    """Return the folder of llama.cpp's converter: a checkout that the user names, or what ./init.sh fetched.

    Raises:
        PokegemmaError: it does not exist.
    """
    folder = CONVERTER_FOLDER if llama_cpp_dir is None else llama_cpp_dir
    missing = [part for part in _PARTS[:3] if not (folder / part).exists()]
    if not missing:
        return folder.resolve()
    if llama_cpp_dir is None:
        raise PokegemmaError(f"llama.cpp's converter is not in {folder}; fetch it: ./init.sh --with gguf")
    raise PokegemmaError(f"--llama_cpp_dir {folder}: not a checkout of llama.cpp ({', '.join(missing)} not found)")


def _wanted(name: str) -> PurePosixPath | None:
    """Return where a member of the package goes, relative to the folder; None: it is not needed."""
    path = PurePosixPath(name)
    if path.parts[1:3] != ("vendor", "llama.cpp") or ".." in path.parts or path.is_absolute():
        return None
    inside = PurePosixPath(*path.parts[3:])
    return inside if any(inside.is_relative_to(part) for part in _PARTS) else None


def unpack_converter(package: Path, folder: Path) -> None:
    """Write what converting takes to `folder`, replacing an earlier version; its run.json has the version.

    Only regular files are written (about 2 MB of the 76 MB), so that nothing in the package reaches outside `folder`.

    Raises:
        PokegemmaError: the package is damaged, or no converter is in it.
    """
    version = package.name.removesuffix(".tar.gz").rpartition("-")[2]
    try:
        with tarfile.open(package) as archive, atomic_folder(folder, stage=_STAGE, overwrite=True) as output:
            for member in archive:
                place = _wanted(member.name)
                if place is None or not member.isfile():
                    continue
                (output / place).parent.mkdir(parents=True, exist_ok=True)
                (output / place).write_bytes(archive.extractfile(member).read())
            if missing := [part for part in _PARTS if not (output / part).exists()]:
                raise PokegemmaError(f"{package}: no {', '.join(missing)} of llama.cpp found")
            (output / RUN_FILE).write_text(json.dumps({"stage": _STAGE, "version": version}) + "\n", encoding="utf-8")
    except (tarfile.TarError, EOFError) as error:
        raise PokegemmaError(f"{package}: not a whole source package: {error}") from error


if __name__ == "__main__":
    try:
        unpack_converter(Path(sys.argv[1]), Path(sys.argv[2]))
    except PokegemmaError as error:
        sys.exit(f"error: {error}")
