import pytest

from pokegemma.errors import PokegemmaError
from pokegemma.play.emulators.state_file import GameState, read_state

STATE = GameState("mGBA", "the ROM's SHA-256", bytes(range(256)) + b"\n\n", b"a picture")


def test_a_state_is_read_as_it_was_written():
    assert read_state(STATE.to_bytes(), core=STATE.core, game=STATE.game) == STATE


def test_every_cut_and_every_changed_byte_of_a_state_is_found():
    content = STATE.to_bytes()
    for changed in (
        *(content[:size] for size in range(len(content))),
        *(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :] for at in range(len(content))),
        content + b"x",
    ):
        with pytest.raises(PokegemmaError, match=r"damaged|not a saved state"):
            read_state(changed, core=STATE.core, game=STATE.game)
