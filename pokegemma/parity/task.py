"""What every engine of a comparison is asked, and what it answers."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pokegemma.data.prompts import Layout
from pokegemma.data.samples import Sample
from pokegemma.data.trajectories import Trajectory
from pokegemma.engines.questions import Question, build_questions

_SPARE_TOKENS = 256


@dataclass(frozen=True)
class Task:
    """The decisions that every engine is asked for, and the buttons as continuations.

    `prefix` and `branches` are those of `ButtonTokens`. `answers`: tokens to read, one answer for each decision; None:
    the engine's own. `num_context`: the context length of llama.cpp in tokens, see `context_for`.
    """

    examples: tuple[Sample | Trajectory, ...]
    layout: Layout
    dataset_folder: Path
    size_px: int
    prefix: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...]
    max_new_tokens: int
    answers: tuple[tuple[int, ...], ...] | None = None
    num_context: int = 8192

    def question(self, number: int) -> Question:
        """Return a decision as a question; its pictures are read here, so that memory holds those of one question."""
        (question,) = build_questions(
            self.examples[number : number + 1],
            layout=self.layout,
            dataset_folder=self.dataset_folder,
            size_px=self.size_px,
        )
        return question


@dataclass(frozen=True)
class Reading:
    """An engine's answer to one question. What a server does not report is None.

    Attributes:
        text: the greedy answer, written in `seconds` from the pictures in memory to its last token.
        tokens: the tokens of this answer.
        prompt: the tokens of the prompt, `SOFT_TOKEN` for those of pictures.
        log_probabilities: (length,) of the tokens of the reference's answer.
        likeliest: (length,) the likeliest token at each place of the reference's answer.
        buttons: (8,) log-probability of each of `BUTTONS`, after the beginning that all answers share.
    """

    text: str
    seconds: float
    tokens: tuple[int, ...] | None = None
    prompt: tuple[int, ...] | None = None
    log_probabilities: np.ndarray | None = None
    likeliest: np.ndarray | None = None
    buttons: np.ndarray | None = None


@dataclass(frozen=True)
class Measured:
    """All readings of an engine, and the peak memory of its process and, under CUDA, of its GPU.

    `engine` and `weights` are what the loaded engine reports about itself; None for a server.
    """

    readings: tuple[Reading, ...]
    peak_memory_bytes: int | None = None
    peak_gpu_memory_bytes: int | None = None
    engine: str | None = None
    weights: str | None = None


def context_for(task: Task, reference: Measured) -> int:
    """Return the context length for the longest prompt and all that is read or written after it, in tokens.

    An export whose prompts are a little longer than the reference's is to fail by its prompts and not by its context:
    hence the spare tokens. The result is a multiple of 256, to which llama.cpp itself rounds up.
    """
    prompt = max(len(reading.prompt) for reading in reference.readings)
    buttons = max(len(task.prefix) + len(branch) for branch in task.branches)
    needed = prompt + max(task.max_new_tokens, buttons) + _SPARE_TOKENS
    return -(-needed // 256) * 256
