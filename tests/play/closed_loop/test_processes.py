"""ROMs played in several processes."""

from functools import partial
from pathlib import Path

import pytest

from pokegemma.errors import PokegemmaError
from pokegemma.evaluation.predict import load_predictor
from pokegemma.play.closed_loop.measure import play_view
from pokegemma.play.closed_loop.options import ClosedLoopOptions
from pokegemma.play.closed_loop.rooms import play_rooms
from pokegemma.play.closed_loop.rules import RoomRules


@pytest.mark.slow(5)
def test_two_processes_play_the_episodes_of_one(tiny_model: Path) -> None:
    pytest.importorskip("stable_retro", reason="needs stable-retro (./init.sh --with play)")
    load = partial(load_predictor, tiny_model, layout="grid", device="cpu")
    predictor, view = load(), play_view(str(tiny_model))
    rules = RoomRules(game="rom", noise=0.5, turns_per_expert_turn=0.2)
    apart = play_rooms(predictor, view, range(3), rules, num_workers=2, load=load)
    assert apart == play_rooms(predictor, view, range(3), rules)
    assert [len(episode.turns) for episode in apart] == [episode.max_turns for episode in apart]


def test_processes_are_for_roms() -> None:
    with pytest.raises(PokegemmaError, match=r"^--play_workers 2: "):
        ClosedLoopOptions(closed_loop=3, play_workers=2)
