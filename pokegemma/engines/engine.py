"""What every engine can be asked, so that one can be compared with another."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from pokegemma.engines.questions import Question

SOFT_TOKEN = -1
"""Stands for a token of a picture in a prompt: engines number them differently, or not at all."""


class Engine(Protocol):
    """A loaded model under one of the programs that can run it; made from its files alone.

    Its prompts come from its own files as well: the chat template and the tokenizer in them, not those of the
    checkpoint that they were made from.
    """

    name: str
    weights: str
    """The type of most weights as they were loaded: "f32", "bf16", "4 bits", or as llama.cpp says, such as "Q4_K_M"."""

    def prompt_tokens(self, question: Question) -> list[int]:
        """Return the prompt's tokens, `SOFT_TOKEN` for each of a picture's (not for the marks around it)."""
        ...

    def read(self, question: Question, continuations: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Return, for each continuation of the prompt, log-probabilities (its length, vocabulary), float32.

        Row i is the distribution of the token at place i of the continuation, given what comes before it; the prompt
        with its pictures is processed once.
        """
        ...

    def write(self, question: Question, *, max_new_tokens: int) -> list[int]:
        """Return the tokens of the greedy answer, without the one that ends it."""
        ...

    def text(self, tokens: Sequence[int]) -> str:
        """Return tokens of an answer as text, by the engine's own tokenizer."""
        ...
