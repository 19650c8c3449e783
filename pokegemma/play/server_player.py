"""Play with a model on an OpenAI-compatible server: llama.cpp, MLX, vLLM."""

import contextlib
import logging
import math
import random
import time as clock
from pathlib import Path

import numpy as np
from PIL import Image

from pokegemma.data.prompts import ANSWER_PREFIX, BUTTONS, AnswerError, build_output, parse_answer
from pokegemma.data.samples import Sample, find_control_token
from pokegemma.data.trajectories import Trajectory
from pokegemma.engines.questions import Question
from pokegemma.errors import PokegemmaError
from pokegemma.play.history import History, PlayView
from pokegemma.play.plain_player import require_scores
from pokegemma.play.players import ButtonChoice, Decide, draw_button
from pokegemma.serving.client import Reply, ServerError, Token, ask, list_models

logger = logging.getLogger(__name__)

_NUM_LIKELIEST = 10
"""All eight buttons, and the most that mlx-lm's server returns."""

_BUTTON_TOKENS = 24
"""Enough to write the answer up to its button, with any tokenizer."""

_NUM_TRIES, _PAUSE_S = 3, 1.0


class ServerPlayer:
    """Ask a server for each button; see `ButtonPlayer`. The server caches what prompts have in common, if it can.

    Args:
        server_url: without /v1.
        image_size_px: side of the model's input; the pictures are sent in this size.
        decide: scored: the answer is cut off after the button, whose probabilities are used where the server returns
            them; generate: it writes its whole answer. In a trajectory it always does, since later prompts contain it.
        model: None: the only one that the server lists.

    Raises:
        PokegemmaError: a temperature is given to a written answer.
    """

    def __init__(
        self,
        server_url: str,
        view: PlayView,
        *,
        image_size_px: int,
        decide: Decide = "scored",
        temperature: float = 0.0,
        rng: random.Random | None = None,
        model: str | None = None,
        max_new_tokens: int = 256,
        timeout_s: float = 60.0,
        api_key: str | None = None,
    ) -> None:
        require_scores(decide, temperature)
        self.name, self.history, self._size = server_url, History(view), (image_size_px, image_size_px)
        self._url, self._model, self._timeout_s, self._api_key = server_url, model, timeout_s, api_key
        self._writes_all = decide == "generate" or view.layout == "trajectory"
        self._max_new_tokens = max_new_tokens if self._writes_all else _BUTTON_TOKENS
        self._num_likeliest = 0 if decide == "generate" else _NUM_LIKELIEST
        self._temperature, self._rng = temperature, rng or random.Random(0)
        self._pictures: dict[str, Image.Image] = {}
        self._answer: tuple[str, str] | None = None  # the button of the last decision and its whole answer

    def start(self, goal: str | None) -> None:
        self.history.start(goal)
        self._pictures, self._answer = {}, None
        if self._model is None:
            self._model = self._find_model()

    def decide(self, frame: Image.Image | str | Path, *, time: float | None = None) -> ButtonChoice:
        reply = self._ask(self._question(self.history.see(frame, time=time)))
        written, probabilities = written_button(reply.text), button_probabilities(reply.tokens)
        button, answer = written, None
        if probabilities is not None and (self._temperature > 0 or written is None):
            button = draw_button(probabilities, temperature=self._temperature, rng=self._rng)
        if self._writes_all and button == written and not find_control_token(reply.text):
            with contextlib.suppress(AnswerError):
                answer = parse_answer(reply.text)
        self._answer = (answer.button, reply.text) if answer else None
        reasoning, situation = (answer.reasoning, answer.context) if answer else ("", "")
        return ButtonChoice(button, probabilities, reasoning, situation, f"model:{self.name}")

    def pressed(self, *buttons: str) -> None:
        answer = None
        if buttons and self._answer is not None and self._answer[0] == buttons[0]:
            parsed = parse_answer(self._answer[1])
            answer = build_output(button=parsed.button, reasoning=parsed.reasoning, context=parsed.context)
        self.history.pressed(*buttons, answer=answer)

    def prepare(self) -> None:
        """Do nothing: the server keeps its cache."""

    def _find_model(self) -> str | None:
        try:
            names = list_models(self._url, timeout_s=self._timeout_s, api_key=self._api_key)
        except ServerError as error:
            if error.status is None:
                raise
            return None  # transformers serve fails here on a machine without a cache of the Hub
        return names[0] if len(names) == 1 else None

    def _question(self, example: Sample | Trajectory) -> Question:
        names = self.history.picture_names(example)
        self._pictures = {name: self._pictures.get(name) or self._resized(name) for name in names}
        messages = self.history.messages(example)[:-1]
        sample = example.samples[-1] if isinstance(example, Trajectory) else example
        return Question(sample.id, tuple(messages), tuple(self._pictures[name] for name in names))

    def _resized(self, name: str) -> Image.Image:
        return self.history.picture(name).resize(self._size, Image.Resampling.BILINEAR)

    def _ask(self, question: Question) -> Reply:
        for number in range(1, _NUM_TRIES + 1):
            try:
                return ask(
                    self._url,
                    question,
                    model=self._model,
                    max_new_tokens=self._max_new_tokens,
                    timeout_s=self._timeout_s,
                    api_key=self._api_key,
                    num_likeliest=self._num_likeliest,
                )
            except ServerError as error:
                if error.status is not None and self._num_likeliest:
                    logger.info("%s; asking without probabilities", error)
                    self._num_likeliest = 0  # llama-cpp-python's server reports none unless started so
                elif number == _NUM_TRIES or error.failure == "invalid":
                    raise
                else:
                    logger.warning("%s; trying again", error)
                    clock.sleep(_PAUSE_S)
        raise PokegemmaError(f"{self._url}: no answer in {_NUM_TRIES} tries")


def written_button(text: str) -> str | None:
    """Return the button of an answer that may be cut off after it; None where there is none."""
    name, quote, _ = text.strip().removeprefix(ANSWER_PREFIX).partition('"')
    return name if quote and text.strip().startswith(ANSWER_PREFIX) and name in BUTTONS else None


def button_probabilities(tokens: tuple[Token, ...]) -> np.ndarray | None:
    """Return the probabilities (8,) of the buttons from the likeliest tokens where the answer names one.

    Buttons that the server does not list have 0; the others are normalised. A token that several buttons begin with
    counts for the one that was written.

    Returns:
        None where the tokens do not show it.
    """
    written, final = "", written_button("".join(token.text for token in tokens))
    for token in tokens:
        if len(written) < len(ANSWER_PREFIX) < len(written + token.text) or written == ANSWER_PREFIX:
            masses = dict.fromkeys(BUTTONS, 0.0)
            for text, log_probability in token.likeliest:
                button = _named(written + text, final)
                if button is not None and not math.isnan(log_probability):
                    masses[button] += math.exp(log_probability)
            total = sum(masses.values())
            return np.array([masses[button] / total for button in BUTTONS]) if total > 0 else None
        written += token.text
    return None


def _named(beginning: str, final: str | None) -> str | None:
    """Return the only button that an answer with this beginning can name; `final` where several can, and it is one."""
    if not beginning.startswith(ANSWER_PREFIX) or beginning == ANSWER_PREFIX:
        return None
    rest = beginning[len(ANSWER_PREFIX) :]
    possible = [name for name in BUTTONS if f'{name}"'.startswith(rest) or rest.startswith(f'{name}"')]
    return possible[0] if len(possible) == 1 else final if final in possible else None
