"""The toy ROM in mGBA shows what the Python game shows, and is played like it."""

import random

import numpy as np
import pytest

from pokegemma.data.prompts import BUTTONS
from pokegemma.errors import CheckFailedError, PokegemmaError
from pokegemma.play.emulators.emulator import PressTiming
from pokegemma.play.rom.game import ToyRomEmulator
from pokegemma.play.toy.rooms import LEVELS

pytest.importorskip("stable_retro", reason="needs stable-retro (./init.sh --with play)")


def looks_as_in_python(game: ToyRomEmulator) -> bool:
    return bool((np.asarray(game.screen()) == np.asarray(game.world.render())).all())


def check_room(seed: int, *, level: int, num_turns: int, noise: float) -> int:
    """Play a room beside the Python game and compare each screen; return the number of turns."""
    game, rng = ToyRomEmulator(seed, level=level), random.Random(f"parity {seed}")
    assert looks_as_in_python(game)
    number = 0
    while number < num_turns and not game.world.is_done:
        button = rng.choice(BUTTONS) if rng.random() < noise else game.world.expert_button()
        game.press(button)
        number += 1
        assert looks_as_in_python(game), f"turn {number}: {button}, {game.world.situation}"
    assert game.state().is_done == game.world.is_done
    game.close()
    return number


@pytest.mark.parametrize("level", LEVELS)
def test_a_room_looks_as_in_python(level: int) -> None:
    assert check_room(level, level=level, num_turns=40, noise=0.3) > 20


@pytest.mark.slow
def test_a_thousand_turns_in_twenty_rooms_look_as_in_python() -> None:
    noises = (0.0, 0.3, 0.6, 1.0)
    turns = [
        check_room(seed, level=1 + seed % len(LEVELS), num_turns=100, noise=noises[seed // 5 % 4])
        for seed in range(100, 120)
    ]
    assert sum(turns) >= 1000


def test_the_expert_leaves_the_room() -> None:
    game = ToyRomEmulator(5, level=1)
    while not game.world.is_done:
        game.press(game.world.expert_button())
    assert (game.state().is_done, game.state().situation) == (True, "done")
    game.close()


def test_a_loaded_state_plays_on_in_both_rooms() -> None:
    game = ToyRomEmulator(3, level=5)
    for _ in range(8):
        game.press(game.world.expert_button())
    state, screen = game.save(), game.screen().tobytes()
    for button in ("down", "up", "start", "left"):
        game.press(button)
    assert game.screen().tobytes() != screen
    game.load(state)
    assert game.screen().tobytes() == screen
    game.press(game.world.expert_button())
    assert looks_as_in_python(game)
    game.close()


def test_a_state_of_another_room_is_refused() -> None:
    game = ToyRomEmulator(3)
    state = game.save()
    game.close()
    other = ToyRomEmulator(4)
    with pytest.raises(PokegemmaError, match="another game"):
        other.load(state)
    other.close()


def test_a_press_that_only_turns_the_player_is_reported() -> None:
    game = ToyRomEmulator(5, timing=PressTiming(hold_frames=4))
    with pytest.raises(CheckFailedError, match="room 5"):
        for _ in range(60):
            game.press(game.world.expert_button())
    game.close()
