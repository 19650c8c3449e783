"""The toy game behind the interface of all emulators."""

import pytest

from pokegemma.errors import PokegemmaError
from pokegemma.play.emulators.emulator import PressTiming
from pokegemma.play.emulators.open import open_emulator
from pokegemma.play.emulators.toy import ToyEmulator


def press_as_expert(game: ToyEmulator, times: int) -> list[bytes]:
    """Return the screens after each press."""
    screens = []
    for _ in range(times):
        game.press(game.world.expert_button())
        screens.append(game.screen().tobytes())
    return screens


def test_the_expert_leaves_the_room() -> None:
    game = open_emulator("toy", timing=PressTiming(), seed=5, level=1)
    while not game.world.is_done:
        game.press(game.world.expert_button())
    assert game.world.situation == "done"
    assert (game.screen().mode, game.screen().size) == ("RGB", game.frame_size)


def test_a_loaded_state_plays_on_as_before() -> None:
    game, other = ToyEmulator(5), ToyEmulator(5)
    press_as_expert(game, 9)
    state, screen = game.save(), game.screen().tobytes()
    after = press_as_expert(game, 12)
    game.load(state)
    assert game.screen().tobytes() == screen
    assert press_as_expert(game, 12) == after
    other.load(state)
    assert press_as_expert(other, 12) == after


def test_an_unknown_button_is_refused_and_not_saved() -> None:
    game = ToyEmulator(5)
    state = game.save()
    with pytest.raises(ValueError, match="jump"):
        game.press("jump")
    assert game.save() == state


@pytest.mark.parametrize(
    ("state", "word"),
    [
        (ToyEmulator(6).save(), "room 6"),
        (ToyEmulator(5, level=2).save(), "level 2"),
        (b"", "not a saved state"),
        (b"pokegemma state 2\n{}\n", "damaged"),
        (b"\x89PNG\r\n", "not a saved state"),
    ],
)
def test_a_state_of_another_game_is_refused(state: bytes, word: str) -> None:
    game = ToyEmulator(5)
    with pytest.raises(PokegemmaError, match=word):
        game.load(state)
    assert not game.world.is_done
