"""The builder of the toy ROM: header, size, and the same bytes for the same room."""

import numpy as np
import pytest

from pokegemma.errors import PokegemmaError
from pokegemma.play.rom.build import build_rom
from pokegemma.play.rom.state import parse_state
from pokegemma.play.toy.rooms import LEVELS


def test_the_header_is_valid_and_has_no_logo() -> None:
    rom = build_rom(1, 1)
    assert rom[0x03] == 0xEA  # a branch
    assert rom[0x04:0xA0] == bytes(156)
    assert rom[0xA0:0xB0] == b"POKEGEMMATOYPTOY"
    assert rom[0xB2] == 0x96
    assert rom[0xBD] == -(sum(rom[0xA0:0xBD]) + 0x19) % 256


@pytest.mark.parametrize("level", LEVELS)
def test_a_rom_is_below_two_mebibytes_and_the_same_each_time(level: int) -> None:
    rom = build_rom(7, level)
    assert len(rom) < 2 * 2**20
    assert build_rom(7, level) == rom
    assert build_rom(8, level) != rom


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(PokegemmaError, match="level 99"):
        build_rom(1, 99)


def test_memory_of_another_game_is_refused() -> None:
    with pytest.raises(ValueError, match="no toy ROM"):
        parse_state(np.zeros(16, np.uint8).tobytes())
