"""Ask an OpenAI-compatible server for a decision."""

import time
from dataclasses import dataclass
from typing import Any, Literal

import requests

from pokegemma.deploy.questions import Question
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


def _request(method: str, url: str, *, timeout_s: float, api_key: str | None, body: Any = None) -> Any:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        response = requests.request(method, url, json=body, headers=headers, timeout=timeout_s)
    except requests.Timeout as error:
        raise ServerError("timeout", f"{url}: no answer within {timeout_s:g} s") from error
    except requests.RequestException as error:
        raise ServerError("unreachable", f"{url}: {' '.join(str(error).split())[:200]}") from error
    if not response.ok:
        text = " ".join(response.text.split())[:200]
        raise ServerError("refused", f"{url}: status {response.status_code}: {text}")
    try:
        return response.json()
    except ValueError as error:
        raise ServerError("malformed", f"{url}: not JSON: {response.text[:80]!r}") from error


def list_models(server_url: str, *, timeout_s: float, api_key: str | None = None) -> tuple[str, ...]:
    """Return the names of the models that a server serves.

    Args:
        server_url: without /v1, such as http://127.0.0.1:8000.

    Raises:
        ServerError: it does not say.
    """
    url = f"{server_url.rstrip('/')}/v1/models"
    answer = _request("GET", url, timeout_s=timeout_s, api_key=api_key)
    try:
        return tuple(str(model["id"]) for model in answer["data"])
    except (KeyError, TypeError) as error:
        raise ServerError("malformed", f"{url}: no list of models: {str(answer)[:80]}") from error


def ask(
    server_url: str, question: Question, *, model: str, max_new_tokens: int, timeout_s: float,
    api_key: str | None = None, num_likeliest: int = 0,
) -> Reply:  # fmt: skip
    """Ask a server one question, greedily.

    Args:
        num_likeliest: how many of the likeliest tokens to ask for at each place; 0: no log-probabilities.

    Raises:
        ServerError: it cannot be reached, takes longer than `timeout_s`, refuses, or answers something else.
    """
    url = f"{server_url.rstrip('/')}/v1/chat/completions"
    body: dict[str, Any] = {
        "model": model, "messages": question.openai_messages(), "max_tokens": max_new_tokens, "temperature": 0.0,
    }  # fmt: skip
    if num_likeliest:
        body |= {"logprobs": True, "top_logprobs": num_likeliest}
    start = time.perf_counter()
    answer = _request("POST", url, timeout_s=timeout_s, api_key=api_key, body=body)
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
