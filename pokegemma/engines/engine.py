"""The interface of all engines, so that they can be compared with each other."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from pokegemma.engines.questions import Question

SOFT_TOKEN = -1
"""Number of a picture's token in a prompt: engines number these differently, or not at all."""


class Engine(Protocol):
    """A model loaded from its files by one of the programs that can run it.

    Chat template and tokenizer come from these files, too, and not from the checkpoint that they were made from.
    """

    name: str
    weights: str
    """Type of most weights as loaded: "f32", "bf16", "4 bits", or llama.cpp's name, such as "Q4_K_M"."""

    def prompt_tokens(self, question: Question) -> list[int]:
        """Return the prompt's tokens, with `SOFT_TOKEN` for each token of a picture (not for the marks around it)."""
        ...

    def read(self, question: Question, continuations: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Return, for each continuation of the prompt, log-probabilities (its length, vocabulary), float32.

        Row i is the distribution of the token at place i of the continuation, given what comes before it; the prompt
        with its pictures is processed once.
        """
        ...

    def write(self, question: Question, *, max_new_tokens: int) -> list[int]:
        """Return the tokens of the greedy answer, without the end-of-turn token."""
        ...

    def text(self, tokens: Sequence[int]) -> str:
        """Return tokens of an answer as text, by the engine's own tokenizer."""
        ...
