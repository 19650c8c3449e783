"""One room is the same game in Python, in mGBA and behind SkyEmu's protocol."""

from pathlib import Path

import pytest
from PIL import Image

from benchmarks.same_buttons import GAMES, play_everywhere
from pokegemma.play.emulators.retro_console import has_stable_retro
from pokegemma.play.players import ButtonChoice
from pokegemma.play.toy.world import ToyWorld


class PlayerWithAMap:
    """Press what the expert would press in a room of its own, where the same buttons are pressed."""

    name = "map"

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self.screens: list[list[bytes]] = []

    def start(self, goal: str | None) -> None:
        self._world = ToyWorld(self._seed)
        self.screens.append([])

    def decide(self, frame: Image.Image | str | Path, *, time: float | None = None) -> ButtonChoice:
        assert isinstance(frame, Image.Image)
        self.screens[-1].append(frame.tobytes())
        return ButtonChoice(self._world.expert_button())

    def pressed(self, *buttons: str) -> None:
        self._world.press(buttons[0])

    def prepare(self) -> None:
        pass


@pytest.mark.skipif(not has_stable_retro(), reason="needs stable-retro (./init.sh --with play)")
def test_the_three_games_are_played_with_the_same_buttons_and_screens() -> None:
    player = PlayerWithAMap(1003)
    results = play_everywhere(player, seed=1003, level=1, stuck=0)
    assert tuple(results) == GAMES
    assert [result.solved for result in results.values()] == [True, True, True]
    assert len({result.buttons for result in results.values()}) == 1
    assert player.screens[0] == player.screens[1] == player.screens[2]
