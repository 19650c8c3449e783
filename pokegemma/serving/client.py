"""Ask an OpenAI-compatible server for a decision."""

import contextlib
import http.client
import json
import socket
import threading
import time
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import SplitResult, urlsplit

from pokegemma.engines.questions import Question
from pokegemma.errors import PokegemmaError

Failure = Literal["unreachable", "timeout", "refused", "malformed"]


class ServerError(PokegemmaError):
    """A server did not answer as it should; `failure` says how."""

    def __init__(self, failure: Failure, message: str) -> None:
        super().__init__(message)
        self.failure = failure


@dataclass(frozen=True)
class Token:
    """A token of an answer: its text, its log-probability, and the likeliest tokens at its place, best first."""

    text: str
    log_probability: float
    likeliest: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Reply:
    """An answer as a server gave it.

    `complete` is false where a limit of tokens cut it off. `tokens` is empty where the server tells no
    log-probabilities. `seconds`: from sending the question to the last byte of the answer.
    """

    text: str
    complete: bool
    seconds: float
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True)
class _Response:
    status: int
    body: bytes


def _connect(url: SplitResult, timeout_s: float) -> http.client.HTTPConnection:
    if url.scheme not in ("http", "https") or not url.hostname:
        raise PokegemmaError(f"{url.geturl()}: not the URL of a server, such as http://127.0.0.1:8000")
    kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    try:
        connection = kind(url.hostname, url.port, timeout=timeout_s)
    except ValueError as error:
        raise PokegemmaError(f"{url.geturl()}: {error}") from error
    connection.connect()
    return connection


def _exchange(method: str, url: str, *, timeout_s: float, headers: dict[str, str], body: bytes | None) -> _Response:
    """Send a request and read the answer to its end, all within `timeout_s`.

    The timeout of a socket is that of one read: a server that sends a byte now and then never exceeds it. So a timer
    cuts the connection, whatever is being read then.

    Raises:
        ServerError: timeout.
        OSError, http.client.HTTPException: the connection failed.
    """
    parts = urlsplit(url)
    end = time.monotonic() + timeout_s
    try:
        connection = _connect(parts, timeout_s)
    except TimeoutError as error:
        raise ServerError("timeout", f"{url}: no connection within {timeout_s:g} s") from error
    expired = threading.Event()

    def cut(link: socket.socket = connection.sock) -> None:
        expired.set()
        with contextlib.suppress(OSError):  # closed by the other side
            socket.socket.shutdown(link, socket.SHUT_RDWR)

    timer = threading.Timer(max(end - time.monotonic(), 0), cut)
    timer.daemon = True
    timer.start()
    try:
        path = parts.path + (f"?{parts.query}" if parts.query else "")
        connection.request(method, path, body=body, headers=headers)
        response = connection.getresponse()
        answer = _Response(status=response.status, body=response.read())
    except (OSError, http.client.HTTPException, ValueError) as error:
        if not expired.is_set() and not isinstance(error, TimeoutError):
            raise
        raise ServerError("timeout", f"{url}: no whole answer within {timeout_s:g} s") from error
    finally:
        timer.cancel()
        connection.close()
    if expired.is_set():  # an answer without a length ends where the connection does
        raise ServerError("timeout", f"{url}: no whole answer within {timeout_s:g} s")
    return answer


def request(method: str, url: str, *, timeout_s: float, api_key: str | None = None, body: Any = None) -> bytes:
    """Return what a server answers, with a status of 200 to 299, to a JSON `body` or None.

    Raises:
        ServerError: it cannot be reached, takes longer than `timeout_s` in all, or refuses.
        PokegemmaError: `url` is none of a server, or the key none that a header can hold.
    """
    if api_key and not (api_key.isascii() and api_key.isprintable()):  # http.client would tell it in its error
        raise PokegemmaError("the API key holds what no HTTP header can, such as a line break at its end")
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    data = None
    if body is not None:
        headers["Content-Type"] = "application/json"
        data = json.dumps(body).encode()
    try:
        response = _exchange(method, url, timeout_s=timeout_s, headers=headers, body=data)
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ServerError("unreachable", f"{url}: {reason}") from error
    if not 200 <= response.status < 300:
        text = " ".join(response.body.decode(errors="replace").split())[:200]
        raise ServerError("refused", f"{url}: status {response.status}: {text}")
    return response.body


def _request_json(method: str, url: str, *, timeout_s: float, api_key: str | None, body: Any = None) -> Any:
    answer = request(method, url, timeout_s=timeout_s, api_key=api_key, body=body)
    try:
        return json.loads(answer)
    except (ValueError, RecursionError) as error:
        raise ServerError("malformed", f"{url}: not JSON: {answer[:80].decode(errors='replace')!r}") from error


def list_models(server_url: str, *, timeout_s: float, api_key: str | None = None) -> tuple[str, ...]:
    """Return the names of the models that a server serves.

    Args:
        server_url: without /v1, such as http://127.0.0.1:8000.

    Raises:
        ServerError: it does not say.
    """
    url = f"{server_url.rstrip('/')}/v1/models"
    answer = _request_json("GET", url, timeout_s=timeout_s, api_key=api_key)
    try:
        # mlx-vlm also lists what it could load from the cache of the Hub.
        return tuple(str(model["id"]) for model in answer["data"] if model.get("loaded", True))
    except (KeyError, TypeError, AttributeError) as error:
        raise ServerError("malformed", f"{url}: no list of models: {str(answer)[:80]}") from error


def ask(
    server_url: str,
    question: Question,
    *,
    model: str | None,
    max_new_tokens: int,
    timeout_s: float,
    api_key: str | None = None,
    num_likeliest: int = 0,
) -> Reply:
    """Ask a server one question, greedily.

    Args:
        model: None: not named, for servers of one model that do not list it (transformers serve).
        num_likeliest: how many of the likeliest tokens to ask for at each place; 0: no log-probabilities.

    Raises:
        ServerError: it cannot be reached, takes longer than `timeout_s`, refuses, or answers something else.
    """
    url = f"{server_url.rstrip('/')}/v1/chat/completions"
    body: dict[str, Any] = {
        "messages": question.openai_messages(),
        "max_tokens": max_new_tokens,
        "temperature": 0.0,
    }
    if model is not None:
        body["model"] = model
    if num_likeliest:
        body |= {"logprobs": True, "top_logprobs": num_likeliest}
    start = time.perf_counter()
    answer = _request_json("POST", url, timeout_s=timeout_s, api_key=api_key, body=body)
    seconds = time.perf_counter() - start
    try:
        choice = answer["choices"][0]
        text = choice["message"]["content"]
        tokens = tuple(
            Token(
                text=place["token"],
                log_probability=float(place["logprob"]),
                likeliest=tuple((top["token"], float(top["logprob"])) for top in place.get("top_logprobs") or ()),
            )
            for place in (choice.get("logprobs") or {}).get("content") or ()
        )
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ServerError("malformed", f"{url}: not a chat completion: {str(answer)[:80]}") from error
    if not isinstance(text, str):
        raise ServerError("malformed", f"{url}: an answer without text: {str(choice)[:80]}")
    return Reply(text=text, complete=choice.get("finish_reason") == "stop", seconds=seconds, tokens=tokens)
