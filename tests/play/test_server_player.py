"""A player that asks a server."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from pokegemma.errors import PokegemmaError
from pokegemma.play import server_player
from pokegemma.play.emulators.toy import ToyEmulator
from pokegemma.play.history import PlayView
from pokegemma.play.loop import play
from pokegemma.play.server_player import ServerPlayer, button_probabilities, written_button
from pokegemma.serving.client import Token


def token(text: str, **likeliest: float) -> Token:
    """Return a token with the likeliest at its place by probability."""
    return Token(text, 0.0, tuple((name, math.log(value)) for name, value in likeliest.items()))


@pytest.mark.parametrize(
    ("text", "button"),
    [
        ('{"button": "up", "reasoning": "the', "up"),
        (' {"button": "select"', "select"),
        ('{"button": "sel', None),
        ('{"button": "jump", ', None),
        ("I press up!", None),
        ('"up"', None),
    ],
)
def test_the_button_of_an_answer_that_may_be_cut_off_is_read(text: str, button: str | None) -> None:
    assert written_button(text) == button


def test_the_probabilities_of_the_buttons_are_those_where_the_answer_names_one() -> None:
    tokens = (token('{"button"'), token(': "'), token("up", up=0.6, left=0.2, x=0.2), token('"'))
    assert button_probabilities(tokens) == pytest.approx([0.75, 0, 0.25, 0, 0, 0, 0, 0])


def test_a_token_may_reach_over_the_beginning_and_be_shared_by_two_buttons() -> None:
    crossing = Token('"s', 0.0, (('"s', math.log(0.5)), ('"a', math.log(0.25)), ('"', math.log(0.25))))
    tokens = (token('{"button": '), crossing, token("tart"), token('"'))
    assert button_probabilities(tokens) == pytest.approx([0, 0, 0, 0, 1 / 3, 0, 2 / 3, 0])
    assert button_probabilities((token("I"), token(" press"))) is None
    assert button_probabilities(()) is None


@pytest.mark.parametrize("layout", ["grid", "frames", "trajectory"])
def test_a_game_is_played_with_a_server(layout: str, adversary: Callable[[str], str]) -> None:
    player = ServerPlayer(adversary("valid"), PlayView(layout), image_size_px=56)
    result = play(ToyEmulator(5), player, goal="leave", max_turns=3)
    assert result.buttons == ["up", "up", "up"]
    assert {turn.decided_by for turn in result.turns} == {f"model:{player.name}"}


def test_an_answer_without_a_button_is_one_turn_and_a_dead_server_ends_the_play(
    adversary: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, closed_url: str
) -> None:
    monkeypatch.setattr(server_player, "_PAUSE_S", 0.0)
    result = play(ToyEmulator(5), ServerPlayer(adversary("prose"), PlayView(), image_size_px=56), max_turns=2)
    assert [turn.decided_by for turn in result.turns] == ["random", "random"]
    player = ServerPlayer(adversary("failing"), PlayView(), image_size_px=56)
    with pytest.raises(PokegemmaError, match="status 500"):
        play(ToyEmulator(5), player, max_turns=2)
    with pytest.raises(PokegemmaError):
        ServerPlayer(closed_url, PlayView(), image_size_px=56).start(None)


def test_pictures_have_the_size_of_the_model_and_are_resized_once() -> None:
    player = ServerPlayer("http://127.0.0.1:1", PlayView("frames"), image_size_px=56, model="m")
    screens = [Image.fromarray(np.full((160, 240, 3), value, np.uint8)) for value in (0, 200)]
    questions = [player._question(player.history.see(screen)) for screen in screens]
    assert [picture.size for picture in questions[1].pictures] == [(56, 56)] * 4
    assert questions[1].pictures[0] is questions[0].pictures[0]
