"""Ask an OpenAI-compatible server the questions of a comparison."""

from collections.abc import Callable, Sequence

import numpy as np

from pokegemma.errors import PokegemmaError
from pokegemma.parity.engine_spec import EngineFailedError
from pokegemma.parity.task import Measured, Reading, Task
from pokegemma.serving.client import Reply, ServerError, Token, ask, list_models

_NUM_LIKELIEST = 5


def choose_model(server_url: str, *, model: str | None, timeout_s: float, api_key: str | None) -> str:
    """Return the name of the model to ask: `model`, or the first that the server lists.

    Raises:
        EngineFailedError: the server lists no model or does not answer.
    """
    if model is not None:
        return model
    try:
        models = list_models(server_url, timeout_s=timeout_s, api_key=api_key)
    except PokegemmaError as error:
        raise EngineFailedError(str(error)) from error
    if not models:
        raise EngineFailedError(f"{server_url}: the server lists no model")
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
    """Ask a server all questions; it reports no prompts, no scores of buttons and no memory.

    Args:
        texts: for each of `task.answers`, the text of its first token, of its first two tokens, and so on.

    Raises:
        EngineFailedError: a question was not answered.
    """
    readings, num_likeliest = [], _NUM_LIKELIEST

    def ask_question(number: int) -> Reply:
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
                reply = ask_question(number)
            except ServerError as error:
                if error.status is None or number:
                    raise
                num_likeliest = 0  # llama-cpp-python's server reports none unless started so
                reply = ask_question(number)
        except PokegemmaError as error:
            raise EngineFailedError(str(error)) from error
        readings.append(read_reply(reply, answer, beginnings))
        on_reading()
    return Measured(tuple(readings))


def read_reply(reply: Reply, answer: Sequence[int], beginnings: Sequence[str]) -> Reading:
    """Return a server's reply, with log-probabilities as far as it wrote the same tokens as the reference.

    Raises:
        EngineFailedError: a log-probability is NaN or infinite.
    """
    if not reply.tokens:
        return Reading(text=reply.text, seconds=reply.seconds)
    likeliest, log_probabilities, written = [], [], ""
    for token, received, beginning in zip(answer, reply.tokens, beginnings, strict=False):
        same = written + received.text == beginning
        likeliest.append(token if same else -1)
        value = received.log_probability if same else _find(received, beginning.removeprefix(written))
        if value is not None:
            log_probabilities.append(value)
        if not same:  # the later tokens have another beginning
            break
        written = beginning
    if not np.isfinite(log_probabilities).all():  # NaN would pass every limit
        raise EngineFailedError("NaN or infinity instead of log-probabilities")
    return Reading(
        text=reply.text,
        seconds=reply.seconds,
        likeliest=np.array(likeliest),
        log_probabilities=np.array(log_probabilities),
    )


def _find(token: Token, text: str) -> float | None:
    return next((value for name, value in token.likeliest if name == text), None)
