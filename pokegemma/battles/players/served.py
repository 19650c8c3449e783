"""A policy behind an OpenAI-compatible server, asked for the action of each state."""

import concurrent.futures
from collections.abc import Sequence

import numpy as np

from pokegemma.battles.players.player import BattleDecision
from pokegemma.battles.policy.prompts import ANSWERS, write_prompt
from pokegemma.battles.policy.text_kind import DEFAULT_TEXT, TextKind
from pokegemma.battles.trajectories.actions import NUM_ACTIONS
from pokegemma.battles.trajectories.from_battle import state_from_battle
from pokegemma.engines.questions import Question
from pokegemma.errors import PokegemmaError
from pokegemma.serving.client import Reply, Token, ask, list_models

_TOKENS_OF_AN_ANSWER = 8
_NUM_LIKELIEST = 20
_REQUESTS_AT_ONCE = 8


class ServedPlayer:
    """Asks a server for the next words after the prompt of training, as a chat of one message.

    The server's chat template must pass the message on as it is, behind one BOS token. Actions are scored by the
    log-probabilities of the likeliest tokens where the server returns them, else by its answer alone.
    """

    def __init__(
        self,
        name: str,
        server_url: str,
        *,
        text: TextKind = DEFAULT_TEXT,
        timeout_s: float = 60.0,
        model: str | None = None,
    ) -> None:
        """Find the server's model.

        Args:
            text: that the policy was trained on.
            model: its name, where the server has several.

        Raises:
            ServerError: the server cannot be reached.
            PokegemmaError: it serves several models, or none of this name.
        """
        self.name, self._url, self._text, self._timeout_s = name, server_url, text, timeout_s
        models = list_models(server_url, timeout_s=timeout_s)
        if model is None and len(models) != 1:
            raise PokegemmaError(f"{server_url} serves {', '.join(models) or 'no model'}: must be one")
        self._model = model or models[0]
        self._pool = concurrent.futures.ThreadPoolExecutor(_REQUESTS_AT_ONCE)

    def score(self, decisions: Sequence[BattleDecision]) -> np.ndarray:
        """Return (len(decisions), 13): log-probabilities, minus infinity for actions that the server did not name.

        Raises:
            ServerError: the server does not answer.
        """
        prompts = [write_prompt(state_from_battle(decision.battle), self._text) for decision in decisions]
        return np.stack([score_reply(reply) for reply in self._pool.map(self._ask, prompts)])

    def _ask(self, prompt: str) -> Reply:
        message = {"role": "user", "content": [{"type": "text", "text": prompt}]}
        return ask(
            self._url,
            Question("", (message,), ()),
            model=self._model,
            max_new_tokens=_TOKENS_OF_AN_ANSWER,
            timeout_s=self._timeout_s,
            num_likeliest=_NUM_LIKELIEST,
        )


def score_reply(reply: Reply) -> np.ndarray:
    """Return the score of each action, (13,); minus infinity for those that an answer says nothing of."""
    scores = np.full(NUM_ACTIONS, -np.inf)
    answers = [answer.strip() for answer in ANSWERS]
    if reply.tokens:
        return _score_tokens(reply.tokens, answers, scores)
    words = reply.text.split()
    if words and words[0] in answers:
        scores[answers.index(words[0])] = 0.0
    return scores


def _score_tokens(tokens: Sequence[Token], answers: Sequence[str], scores: np.ndarray) -> np.ndarray:
    """Score each answer by the likeliest tokens at the place where it leaves what the server wrote.

    A token that all answers begin with names none of them.
    """
    written, total = "", 0.0
    for token in tokens:
        for action, answer in enumerate(answers):
            if not answer.startswith(written) or answer == written:
                continue
            fits = [
                value
                for text, value in (*token.likeliest, (token.text, token.log_probability))
                if (word := (written + text).strip()) and (answer.startswith(word) or word.startswith(answer))
                if not all(other.startswith(word) for other in answers)
            ]
            scores[action] = total + max(fits, default=-np.inf)
        written, total = (written + token.text).strip(), total + token.log_probability
        if not any(answer.startswith(written) for answer in answers):
            break
    return scores
