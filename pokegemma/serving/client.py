"""Ask an OpenAI-compatible server for a decision."""

import asyncio
import functools
import json
import ssl
import time
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import SplitResult, urlsplit

import httpx2

from pokegemma.engines.questions import Question
from pokegemma.errors import PokegemmaError, one_line

Failure = Literal["refused", "timeout", "invalid"]
"""refused: no connection, a broken one, or an error status; timeout: no whole answer in time; invalid: an answer of
another kind than the one asked for."""


class ServerError(PokegemmaError):
    """A server did not answer a request; `status` is its HTTP status where it answered with an error."""

    def __init__(self, failure: Failure, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.failure, self.status = failure, status


@dataclass(frozen=True)
class Token:
    """A token of an answer: its text, its log-probability, and the likeliest tokens at its place, best first."""

    text: str
    log_probability: float
    likeliest: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Reply:
    """An answer of a server.

    `complete` is false where a limit of tokens cut it off. `tokens` is empty where the server returns no
    log-probabilities. `seconds`: from sending the question to the last byte of the answer.
    """

    text: str
    complete: bool
    seconds: float
    tokens: tuple[Token, ...] = ()


def split_url(url: str, *, shown: str) -> SplitResult:
    """Return the parts of an http or https URL.

    Args:
        shown: stands for the URL in the message of an error, since a URL may contain a secret.

    Raises:
        PokegemmaError: it is another kind of text.
    """
    try:
        url.encode()  # a byte of the command line that is not UTF-8 became half of a surrogate pair
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # also for the port
        valid = False
    if not valid:
        raise PokegemmaError(f"{shown}: not an http or https URL, such as http://127.0.0.1:8000")
    return parts


@functools.cache
def _ssl_context() -> ssl.SSLContext:
    return ssl.create_default_context()


async def _exchange(method: str, url: str, *, timeout_s: float, **parts: Any) -> httpx2.Response:
    """Send a request and read the answer to its end, all within `timeout_s`.

    httpx limits each read, which a server that sends a byte now and then never exceeds; asyncio limits the whole.
    """
    async with (
        asyncio.timeout(timeout_s),
        # No proxy and no password of the environment: a server is asked directly.
        httpx2.AsyncClient(verify=_ssl_context(), trust_env=False, timeout=None) as client,
    ):
        return await client.request(method, url, **parts)


def request(method: str, url: str, *, timeout_s: float, api_key: str | None = None, body: Any = None) -> bytes:
    """Return a server's answer, of status 200 to 299, to a JSON `body` or None. Redirections are not followed.

    Raises:
        ServerError: the server cannot be reached, takes longer than `timeout_s` in all, or answers with another status.
        PokegemmaError: `url` is not an http or https URL, or the key contains characters that no header can hold.
        RuntimeError: an event loop runs in this thread, as in a notebook; call it in another thread.
    """
    split_url(url, shown=url)
    if api_key and not (api_key.isascii() and api_key.isprintable()):  # httpx would show the key in its error
        raise PokegemmaError("the API key contains a character that no HTTP header can hold, such as a line break")
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    content = None
    if body is not None:
        headers["Content-Type"] = "application/json"
        content = json.dumps(body).encode()  # httpx's own `json` fails for half of a surrogate pair
    try:
        response = asyncio.run(_exchange(method, url, timeout_s=timeout_s, headers=headers, content=content))
    except TimeoutError as error:
        raise ServerError("timeout", f"{url}: no whole answer within {timeout_s:g} s") from error
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        reason = one_line(error) or type(error).__name__
        raise ServerError("refused", f"{url}: {reason}") from error
    if not response.is_success:
        text = " ".join(response.content.decode(errors="replace").split())[:200]
        raise ServerError("refused", f"{url}: status {response.status_code}: {text}", status=response.status_code)
    return response.content


def _request_json(method: str, url: str, *, timeout_s: float, api_key: str | None, body: Any = None) -> Any:
    answer = request(method, url, timeout_s=timeout_s, api_key=api_key, body=body)
    try:
        return json.loads(answer)
    except (ValueError, RecursionError) as error:
        raise ServerError("invalid", f"{url}: not JSON: {answer[:80].decode(errors='replace')!r}") from error


def list_models(server_url: str, *, timeout_s: float, api_key: str | None = None) -> tuple[str, ...]:
    """Return the names of the models that a server serves.

    Args:
        server_url: without /v1, such as http://127.0.0.1:8000.

    Raises:
        ServerError: it returns no list of models.
    """
    url = f"{server_url.rstrip('/')}/v1/models"
    answer = _request_json("GET", url, timeout_s=timeout_s, api_key=api_key)
    try:
        # mlx-vlm also lists what it could load from the cache of the Hub.
        return tuple(str(model["id"]) for model in answer["data"] if model.get("loaded", True))
    except (KeyError, TypeError, AttributeError) as error:
        raise ServerError("invalid", f"{url}: no list of models: {str(answer)[:80]}") from error


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
        ServerError: it cannot be reached, takes longer than `timeout_s`, answers with an error status, or with
            something else than a chat completion.
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
        tokens = tuple(map(_read_token, (choice.get("logprobs") or {}).get("content") or ()))
        complete = choice.get("finish_reason") == "stop"
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ServerError("invalid", f"{url}: not a chat completion: {str(answer)[:80]}") from error
    if not isinstance(text, str):
        raise ServerError("invalid", f"{url}: an answer without text: {str(choice)[:80]}")
    return Reply(text=text, complete=complete, seconds=seconds, tokens=tokens)


def _read_token(place: dict[str, Any]) -> Token:
    likeliest = tuple((top["token"], float(top["logprob"])) for top in place.get("top_logprobs") or ())
    return Token(text=place["token"], log_probability=float(place["logprob"]), likeliest=likeliest)
