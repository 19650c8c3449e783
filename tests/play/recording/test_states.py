import pytest

from pokegemma.errors import PokegemmaError
from pokegemma.play.recording.states import EmulatorState, read_game_state, write_game_state

STATE = EmulatorState(100, "stable-retro 1.0.1 mGBA", bytes(range(256)) + b"\n\n")


def test_a_state_is_read_as_it_was_written(tmp_path):
    write_game_state(tmp_path / "emulator_state.bin", STATE)
    assert read_game_state(tmp_path / "emulator_state.bin") == STATE
    assert [path.name for path in tmp_path.iterdir()] == ["emulator_state.bin"]


def test_every_cut_and_every_changed_byte_of_a_state_is_found(tmp_path):
    path = tmp_path / "emulator_state.bin"
    write_game_state(path, STATE)
    content = path.read_bytes()
    start = content.index(b"\n") + 1
    for changed in (
        *(content[:size] for size in range(0, len(content), 5)),
        *(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :] for at in range(start, len(content), 7)),
        content + b"x",
    ):
        path.write_bytes(changed)
        with pytest.raises(PokegemmaError, match=r"emulator_state\.bin is (damaged|not a state)"):
            read_game_state(path)


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n", b"[]\nx", b'{"turn": 1}\nx', b"[" * 100_000])
def test_a_file_of_another_program_is_refused(tmp_path, content):
    (tmp_path / "other").write_bytes(content)
    with pytest.raises(PokegemmaError, match="other is not a state that play saved"):
        read_game_state(tmp_path / "other")
    with pytest.raises(PokegemmaError, match="missing cannot be read: No such file"):
        read_game_state(tmp_path / "missing")
