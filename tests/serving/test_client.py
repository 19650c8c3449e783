"""Asking a server: a request is limited as a whole, whatever the server sends meanwhile."""

import time
from collections.abc import Callable

import pytest
from PIL import Image

from pokegemma.engines.questions import Question
from pokegemma.errors import PokegemmaError
from pokegemma.serving.client import ServerError, ask, list_models

QUESTION = Question(
    id="q",
    messages=({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]},),
    pictures=(Image.new("RGB", (8, 8)),),
)


def failure_of(url: str, timeout_s: float) -> str:
    with pytest.raises(ServerError) as caught:
        ask(url, QUESTION, model="model", max_new_tokens=8, timeout_s=timeout_s)
    return caught.value.failure


def test_a_right_answer_is_returned_whole(adversary: Callable[[str], str]) -> None:
    url = adversary("right")
    assert list_models(url, timeout_s=100) == ("model",)
    reply = ask(url + "/", QUESTION, model=None, max_new_tokens=8, timeout_s=100)
    assert reply.text == '{"button": "up", "reasoning": "", "context": ""}'
    assert reply.complete
    assert 0 < reply.seconds < 100


@pytest.mark.parametrize("kind", ["hanging", "trickling", "trickling_headers"])
def test_a_server_that_never_ends_its_answer_is_left_in_time(kind: str, adversary: Callable[[str], str]) -> None:
    url, start = adversary(kind), time.monotonic()
    assert failure_of(url, timeout_s=0.5) == "timeout"
    assert time.monotonic() - start < 100  # it would take ten minutes, or for ever


@pytest.mark.parametrize(("kind", "failure"), [("refusing", "refused"), ("nonsense", "malformed")])
def test_what_is_no_answer_is_told_apart(kind: str, failure: str, adversary: Callable[[str], str]) -> None:
    assert failure_of(adversary(kind), timeout_s=100) == failure


@pytest.mark.parametrize("key", ["hidden\r", "hidden\n", "hidd€n"])
def test_a_key_that_no_header_can_hold_is_refused_without_telling_it(key: str, closed_url: str) -> None:
    with pytest.raises(PokegemmaError, match="the API key holds") as caught:
        list_models(closed_url, timeout_s=1, api_key=key)
    assert not isinstance(caught.value, ServerError)
    assert "hid" not in str(caught.value)


def test_nobody_there_is_unreachable(closed_url: str) -> None:
    assert failure_of(closed_url, timeout_s=100) == "unreachable"


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://127.0.0.1", "http://127.0.0.1:port", "http://"])
def test_what_is_no_url_is_the_users_mistake(url: str) -> None:
    with pytest.raises(PokegemmaError, match=r"not the URL of a server|port") as caught:
        list_models(url, timeout_s=1)
    assert not isinstance(caught.value, ServerError)
