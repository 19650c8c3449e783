"""Files that are no ROMs are refused before an emulator sees them."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pokegemma.errors import PokegemmaError
from pokegemma.play.emulators.rom_file import read_rom
from tests.play.homebrew import build_gb_rom, build_gba_rom, write_roms


def test_roms_of_all_systems_are_told_apart(tmp_path: Path) -> None:
    roms = write_roms(tmp_path)
    assert {system: read_rom(path).system for system, path in roms.items()} == {"GBA": "GBA", "GB": "GB", "GBC": "GBC"}
    assert len({read_rom(path).sha256 for path in roms.values()}) == 3


def test_the_end_of_the_name_may_be_in_capitals(tmp_path: Path) -> None:
    path = tmp_path / "GAME.GBA"
    path.write_bytes(build_gba_rom())
    assert read_rom(path).system == "GBA"


def put(name: str, content: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


def make_folder(folder: Path) -> Path:
    (folder / "game.gba").mkdir()
    return folder / "game.gba"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder / "none.gba", "no such file"),
        (make_folder, "not a file"),
        (put("game.gba", b""), "shorter than the header, 0 bytes"),
        (put("game.gba", b"Lorem ipsum\n" * 50), "byte 0xB2 is 0x"),
        (put("game.gba", build_gb_rom()), "byte 0xB2 is 0x00 instead of 0x96"),
        (put("game.gba", build_gba_rom()[:100]), "shorter than the header"),
        (put("game.gba", build_gba_rom().ljust(32 * 2**20 + 1)), "larger than 32 MiB"),
        (put("game.gb", build_gb_rom().ljust(8 * 2**20 + 1)), "larger than 8 MiB"),
        (put("game.gb", build_gba_rom()), "the header's checksum|shorter"),
        (put("game.gb", build_gb_rom()[:0x14D] + b"\0" + build_gb_rom()[0x14E:]), "the header's checksum is 0x00"),
        (put("game.gbc", b"Lorem ipsum\n" * 50), "the header's checksum"),
        (put("game.zip", b"PK\x03\x04" + bytes(99)), "a ZIP archive; unpack it"),
        (put("game.gba", b"PK\x03\x04" + bytes(99)), "a ZIP archive; unpack it"),
        (put("game.7z", b"7z\xbc\xaf\x27\x1c"), "a 7z archive"),
        (put("game.nds", build_gba_rom()), "must end in .gba, .gb, .gbc"),
    ],
)
def test_what_is_no_rom_is_refused_in_one_line(make: Callable[[Path], Path], words: str, tmp_path: Path) -> None:
    path = make(tmp_path)
    with pytest.raises(PokegemmaError, match=words) as refused:
        read_rom(path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_rom_that_may_not_be_read_is_refused(tmp_path: Path) -> None:
    path = put("game.gba", build_gba_rom())(tmp_path)
    path.chmod(0)
    with pytest.raises(PokegemmaError, match="cannot be read"):
        read_rom(path)
