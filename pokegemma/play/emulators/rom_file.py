"""Read and check a ROM before an emulator sees it: the cores report only that it could not be loaded."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pokegemma.errors import PokegemmaError

System = Literal["GBA", "GB", "GBC"]

_SUFFIXES: dict[str, System] = {".gba": "GBA", ".gb": "GB", ".gbc": "GBC"}
_MEBIBYTE = 2**20
_MAX_BYTES = {"GBA": 32 * _MEBIBYTE, "GB": 8 * _MEBIBYTE, "GBC": 8 * _MEBIBYTE}
"""The largest cartridges of the consoles."""

_ARCHIVES = {b"PK\x03\x04": "ZIP", b"7z\xbc\xaf": "7z", b"\x1f\x8b": "gzip", b"Rar!": "RAR"}

_GBA_FIXED = 0xB2
"""Where the header of every GBA game contains 0x96. mGBA accepts any logo, also none."""

_GBA_HEADER_BYTES, _GB_HEADER_BYTES = 0xC0, 0x150
_GB_CHECKED, _GB_CHECKSUM = slice(0x134, 0x14D), 0x14D


@dataclass(frozen=True)
class RomFile:
    """A ROM that was checked; `sha256` identifies the game in saved states."""

    path: Path
    system: System
    sha256: str


def read_rom(path: str | Path) -> RomFile:
    """Check the ROM of a Game Boy Advance, Game Boy or Game Boy Color game.

    Raises:
        PokegemmaError: the file does not exist or cannot be read, or it is not such a ROM.
    """
    path = Path(path)
    system = _SUFFIXES.get(path.suffix.lower())
    if not path.exists():
        raise PokegemmaError(f"{path}: no such file; --game takes toy, a ROM ({', '.join(_SUFFIXES)}) or SkyEmu's URL")
    if not path.is_file():
        raise PokegemmaError(f"{path}: not a file; give the path of a ROM ({', '.join(_SUFFIXES)})")
    try:
        with path.open("rb") as file:
            content = file.read(max(_MAX_BYTES.values()) + 1)
    except OSError as error:
        raise PokegemmaError(f"{path}: cannot be read ({error.strerror})") from None
    for magic, kind in _ARCHIVES.items():
        if content.startswith(magic):
            raise PokegemmaError(f"{path}: a {kind} archive; unpack it and give the path of the ROM in it")
    if system is None:
        raise PokegemmaError(f"{path}: not a ROM by its name; the name must end in {', '.join(_SUFFIXES)}")
    if len(content) > _MAX_BYTES[system]:
        largest = _MAX_BYTES[system] // _MEBIBYTE
        raise PokegemmaError(f"{path}: larger than {largest} MiB, the largest {system} cartridge; not a {system} ROM")
    fault = _find_gba_fault(content) if system == "GBA" else _find_gb_fault(content)
    if fault:
        raise PokegemmaError(f"{path}: not a {system} ROM ({fault}, {len(content)} bytes)")
    return RomFile(path=path, system=system, sha256=hashlib.sha256(content).hexdigest())


def _find_gba_fault(content: bytes) -> str | None:
    if len(content) < _GBA_HEADER_BYTES:
        return "shorter than the header"
    if content[_GBA_FIXED] != 0x96:
        return f"byte 0xB2 is 0x{content[_GBA_FIXED]:02X} instead of 0x96"
    return None


def _find_gb_fault(content: bytes) -> str | None:
    """Check the header's checksum as the console does, which starts no game where it is wrong."""
    if len(content) < _GB_HEADER_BYTES:
        return "shorter than the header"
    checksum = -sum(byte + 1 for byte in content[_GB_CHECKED]) % 256
    if content[_GB_CHECKSUM] != checksum:
        return f"the header's checksum is 0x{content[_GB_CHECKSUM]:02X} instead of 0x{checksum:02X}"
    return None
