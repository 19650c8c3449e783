"""Put the questions of a comparison to an OpenAI-compatible server."""

from collections.abc import Callable, Sequence

import numpy as np

from pokegemma.errors import PokegemmaError
from pokegemma.parity.worker import EngineFailedError, Measured, Reading, Task
from pokegemma.serving.client import Reply, ServerError, Token, ask, list_models

_NUM_LIKELIEST = 5


def choose_model(server_url: str, *, model: str | None, timeout_s: float, api_key: str | None) -> str:
    """Return the name of the model to ask: `model`, or the first that the server lists.

    Raises:
        EngineFailedError: it lists none.
    """
    if model is not None:
        return model
    try:
        models = list_models(server_url, timeout_s=timeout_s, api_key=api_key)
    except PokegemmaError as error:
        raise EngineFailedError(str(error)) from error
    if not models:
        raise EngineFailedError(f"{server_url}: it serves no model")
    return models[0]


def ask_server(
    server_url: str,
    task: Task,
    *,
    model: str,
    texts: Sequence[Sequence[str]],
    timeout_s: float,
    api_key: str | None = None,
    on_reading: Callable[[], None] = lambda: None,
) -> Measured:
    """Ask a server all questions; it tells no prompts, no scores of buttons and no memory.

    Args:
        texts: for each of `task.answers` the text of its first token, of its first two, and so on.

    Raises:
        EngineFailedError: it failed to answer one.
    """
    readings, num_likeliest = [], _NUM_LIKELIEST

    def put(number: int) -> Reply:
        return ask(
            server_url,
            task.question(number),
            model=model,
            max_new_tokens=task.max_new_tokens,
            timeout_s=timeout_s,
            api_key=api_key,
            num_likeliest=num_likeliest,
        )

    for number, (answer, beginnings) in enumerate(zip(task.answers or (), texts, strict=True)):
        try:
            try:
                reply = put(number)
            except ServerError as error:
                if error.status is None or number:
                    raise
                num_likeliest = 0  # llama-cpp-python's server, unless it was started to tell them
                reply = put(number)
        except PokegemmaError as error:
            raise EngineFailedError(str(error)) from error
        readings.append(read_reply(reply, answer, beginnings))
        on_reading()
    return Measured(tuple(readings))


def read_reply(reply: Reply, answer: Sequence[int], beginnings: Sequence[str]) -> Reading:
    """Compare token by token as long as the server has written what the reference wrote.

    Raises:
        EngineFailedError: a log-probability is no number.
    """
    if not reply.tokens:
        return Reading(text=reply.text, seconds=reply.seconds)
    likeliest, told, written = [], [], ""
    for token, said, beginning in zip(answer, reply.tokens, beginnings, strict=False):
        same = written + said.text == beginning
        likeliest.append(token if same else -1)
        value = said.log_probability if same else _find(said, beginning.removeprefix(written))
        if value is not None:
            told.append(value)
        if not same:  # what follows, follows from something else
            break
        written = beginning
    if not np.isfinite(told).all():  # NaN would pass every gate
        raise EngineFailedError("it gives NaN or infinity instead of log-probabilities")
    return Reading(
        text=reply.text, seconds=reply.seconds, likeliest=np.array(likeliest), log_probabilities=np.array(told)
    )


def _find(token: Token, text: str) -> float | None:
    return next((value for name, value in token.likeliest if name == text), None)
