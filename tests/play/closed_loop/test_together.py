"""Several games whose decisions share a forward pass get the decisions of games that are played alone."""

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pokegemma.data.convert import WindowOptions
from pokegemma.errors import PokegemmaError
from pokegemma.evaluation.predict import Predictor, load_predictor
from pokegemma.play.cached_player import CachedPlayer
from pokegemma.play.closed_loop.rooms import play_room, play_rooms
from pokegemma.play.closed_loop.rules import RoomRules
from pokegemma.play.closed_loop.together import play_together, score_together
from pokegemma.play.history import History, PlayView
from pokegemma.play.players import ButtonPlayer
from pokegemma.play.toy.world import ToyWorld

RULES = RoomRules(level=5, noise=0.2, stuck=2, turns_per_expert_turn=0.1)


@pytest.fixture(scope="module")
def predictor(tiny_model: Path) -> Predictor:
    return load_predictor(tiny_model, layout="grid", device="cpu")


def view_of(num_frames: int) -> PlayView:
    return PlayView("grid", WindowOptions(num_frames=num_frames, min_frames=num_frames))


def test_scores_of_several_games_are_those_of_each_alone(predictor: Predictor) -> None:
    samples, pictures, alone = [], [], []
    for seed, num_turns in ((0, 1), (1, 4)):  # prompts of different length
        world, history = ToyWorld(seed, level=5), History(view_of(2))
        history.start(world.goal)
        player = CachedPlayer(predictor, view_of(2))
        player.start(world.goal)
        for _ in range(num_turns):
            sample, choice = history.see(world.render()), player.decide(world.render())
            shown = [history.picture(name) for name in history.picture_names(sample)]
            history.pressed("up")
            player.pressed("up")
            world.press("up")
        samples.append(sample)
        pictures.append(shown)
        alone.append(choice.probabilities)
    np.testing.assert_allclose(score_together(predictor, samples, pictures), alone, atol=1e-5)


def test_a_screen_with_the_same_goal_is_decided_once(predictor: Predictor) -> None:
    num_decided: list[int] = []
    handle = predictor.model.model.vision_tower.register_forward_hook(
        lambda module, inputs, output: num_decided.append(len(output.last_hidden_state))
    )
    world, other = ToyWorld(0, level=5), ToyWorld(1, level=5)
    inputs = [("leave", world), ("read the sign", world), ("leave", other), ("leave", world)]
    samples, pictures, known = [], [], {}
    for goal, shown in inputs:
        history = History(view_of(1))
        history.start(goal)
        samples.append(history.see(shown.render()))
        pictures.append([shown.render()])
    try:
        first = score_together(predictor, samples, pictures, known)
        again = score_together(predictor, samples[::-1], pictures[::-1], known)
    finally:
        handle.remove()
    assert (num_decided, len(known)) == ([3], 3)
    assert (again[::-1] == first).all()
    assert (first[0] == first[3]).all()
    assert len({tuple(row) for row in first}) == 3


@pytest.mark.parametrize("batch_size", [1, 3])
def test_rooms_played_together_end_as_rooms_played_alone(predictor: Predictor, batch_size: int) -> None:
    seeds = range(4)
    together = play_rooms(predictor, view_of(1), seeds, RULES, batch_size=batch_size)
    player = CachedPlayer(predictor, view_of(1))
    assert together == [play_room(player, seed=seed, rules=RULES) for seed in seeds]
    assert [len(episode.turns) for episode in together] == [episode.max_turns for episode in together]


def test_an_error_in_one_game_ends_all_and_is_raised(predictor: Predictor) -> None:
    def game(number: int) -> Callable[[ButtonPlayer], None]:
        def play(player: ButtonPlayer) -> None:
            player.start("leave")
            for turn in range(5):
                if (number, turn) == (1, 2):
                    raise PokegemmaError("the emulator is gone")
                player.decide(ToyWorld(number).render())
                player.pressed("a")

        return play

    num_threads = threading.active_count()
    with pytest.raises(PokegemmaError, match="the emulator is gone"):
        play_together(predictor, view_of(1), [game(number) for number in range(3)])
    assert threading.active_count() == num_threads
