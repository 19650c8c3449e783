"""Asking a server: a request is limited as a whole, whatever the server sends meanwhile."""

import time
from collections.abc import Callable

import pytest
from PIL import Image

from pokegemma.engines.questions import Question
from pokegemma.errors import PokegemmaError
from pokegemma.serving.client import ServerError, ask, list_models
from tests.serving.adversary import run_adversary

QUESTION = Question(
    id="q",
    messages=({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]},),
    pictures=(Image.new("RGB", (8, 8)),),
)


def error_of(url: str, timeout_s: float = 100) -> ServerError:
    with pytest.raises(ServerError) as caught:
        ask(url, QUESTION, model="model", max_new_tokens=8, timeout_s=timeout_s, api_key="hidden")
    assert "hidden" not in str(caught.value)
    return caught.value


def test_a_valid_answer_is_returned_whole(adversary: Callable[[str], str]) -> None:
    url = adversary("valid")
    assert list_models(url, timeout_s=100) == ("model",)
    reply = ask(url + "/", QUESTION, model=None, max_new_tokens=8, timeout_s=100)
    assert reply.text == '{"button": "up", "reasoning": "", "context": ""}'
    assert reply.complete
    assert 0 < reply.seconds < 100


@pytest.mark.parametrize("kind", ["silent", "trickling", "trickling_headers"])
def test_a_server_that_never_ends_its_answer_is_left_in_time(kind: str, adversary: Callable[[str], str]) -> None:
    url, start = adversary(kind), time.monotonic()
    assert error_of(url, timeout_s=0.2).failure == "timeout"
    assert time.monotonic() - start < 100  # without a limit it would take for ever


@pytest.mark.parametrize(
    ("kind", "failure", "status"),
    [("failing", "refused", 500), ("redirecting", "refused", 307), ("html", "invalid", None)],
)
def test_failures_are_told_apart(kind: str, failure: str, status: int | None, adversary: Callable[[str], str]) -> None:
    error = error_of(adversary(kind))
    assert (error.failure, error.status) == (failure, status)


def test_a_redirection_is_not_followed_with_the_key() -> None:
    with run_adversary("redirecting") as server:
        error_of(server.url)
        assert server.paths == ["/v1/chat/completions"]


def test_a_server_is_asked_without_the_proxy_of_the_environment(
    adversary: Callable[[str], str], closed_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "all_proxy"):
        monkeypatch.setenv(name, closed_url)
    assert list_models(adversary("valid"), timeout_s=100) == ("model",)


@pytest.mark.parametrize("key", ["hidden\r", "hidden\n", "hidd€n"])
def test_a_key_that_no_header_can_hold_is_refused_without_printing_it(key: str, closed_url: str) -> None:
    with pytest.raises(PokegemmaError, match="API key") as caught:
        list_models(closed_url, timeout_s=1, api_key=key)
    assert not isinstance(caught.value, ServerError)
    assert "hid" not in str(caught.value)


def test_a_closed_port_is_refused(closed_url: str) -> None:
    error = error_of(closed_url)
    assert (error.failure, error.status) == ("refused", None)


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8000",
        "ftp://127.0.0.1",
        "http://127.0.0.1:port",
        "http://127.0.0.1:99999",
        "http://[::1",
        "http:///x",
        "http://127.0.0.1:8000/?q=\udc80",  # from a byte of the command line that is not UTF-8
    ],
)
def test_another_kind_of_url_is_the_users_mistake(url: str) -> None:
    with pytest.raises(PokegemmaError) as caught:
        list_models(url, timeout_s=1)
    assert str(caught.value).startswith(url)
    assert not isinstance(caught.value, ServerError)
