"""Compare a policy in a GGUF file, as llama.cpp plays it, with its checkpoint: tokens, next words, actions."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pokegemma.battles.policy.checkpoint import open_policy
from pokegemma.battles.policy.prompts import read_texts
from pokegemma.battles.trajectories.packed import PackedTrajectories
from pokegemma.data.samples import evenly_spread
from pokegemma.engines.engine import Engine
from pokegemma.engines.questions import Question
from pokegemma.engines.transformers_engine import TransformersEngine
from pokegemma.errors import CheckFailedError, PokegemmaError
from pokegemma.gemma.button_tokens import ButtonTokens
from pokegemma.parity.compare import button_distances
from pokegemma.parity.task import Reading
from pokegemma.parity.worker import ask_engine

NUM_NEXT_TOKENS = 8
"""Tokens of the greedy continuation that are compared."""

_SPARE_TOKENS = 64


@dataclass(frozen=True)
class PolicyParity:
    """How an export agrees with its checkpoint.

    Attributes:
        same_tokens, same_words, same_actions: shares of the prompts with the same tokens, with the same greedy
            continuation, and with the same likeliest of the 13 actions.
        mean_difference, max_difference: of the 13 actions' log-probabilities, in nats.
        texts: of the prompts whose continuation differs, the checkpoint's and the export's.
    """

    num_prompts: int
    same_tokens: float
    same_words: float
    same_actions: float
    mean_difference: float
    max_difference: float
    texts: tuple[tuple[str, str], ...]


def choose_prompts(policy: Path, battles: Path, *, count: int) -> list[str]:
    """Return the prompts of `count` states of packed trajectories, evenly spread over the battles.

    Raises:
        PokegemmaError: there are no battles, or the policy cannot be opened.
    """
    packed, text = PackedTrajectories(battles), open_policy(policy).text
    if not len(packed):
        raise PokegemmaError(f"{battles}: no battles in it")
    places = evenly_spread([(index, place) for index in range(len(packed)) for place in (0.2, 0.5, 0.8)], count)
    prompts = []
    for index, place in places:
        texts = read_texts(packed, index, text)
        prompts.append(texts[int(place * len(texts))])
    return prompts


def compare_export(policy: Path, gguf: Path, prompts: Sequence[str]) -> PolicyParity:
    """Ask transformers (float32) and llama.cpp the same prompts, by the chat template in the files of each.

    Raises:
        PokegemmaError: a file cannot be loaded.
    """
    from pokegemma.engines.llama_cpp_engine import LlamaCppEngine

    checkpoint = open_policy(policy)
    tokens = checkpoint.action_tokens
    expected = _ask_all(TransformersEngine(policy, dtype="float32", device="cpu"), prompts, tokens)
    longest = max(len(reading.prompt or ()) for reading in expected)
    with LlamaCppEngine(gguf, None, num_context=longest + _SPARE_TOKENS) as engine:
        actual = _ask_all(engine, prompts, tokens)
    plain = checkpoint.encode(prompts)  # what training reads: the template must write the same
    pairs = list(zip(expected, actual, strict=True))
    distances = np.concatenate([button_distances(*pair) for pair in pairs])
    return PolicyParity(
        num_prompts=len(prompts),
        same_tokens=_share([list(a.prompt) == list(b.prompt) == ids for (a, b), ids in zip(pairs, plain, strict=True)]),
        same_words=_share([a.tokens == b.tokens for a, b in pairs]),
        same_actions=_share([a.buttons.argmax() == b.buttons.argmax() for a, b in pairs]),
        mean_difference=float(distances.mean()),
        max_difference=float(distances.max()),
        texts=tuple((a.text, b.text) for a, b in pairs if a.tokens != b.tokens),
    )


def check_parity(parity: PolicyParity, *, min_agreement: float) -> None:
    """Judge a comparison.

    Raises:
        CheckFailedError: the tokens of a prompt differ, or too few of the likeliest actions are the same.
    """
    if parity.same_tokens < 1:
        raise CheckFailedError(f"{1 - parity.same_tokens:.1%} of {parity.num_prompts} prompts have other tokens")
    if parity.same_actions < min_agreement:
        raise CheckFailedError(
            f"{parity.same_actions:.1%} of {parity.num_prompts} prompts have the same action, not {min_agreement:.1%}"
        )


def _ask_all(engine: Engine, prompts: Sequence[str], tokens: ButtonTokens) -> list[Reading]:
    return [
        ask_engine(
            engine,
            Question(prompt[:40], ({"role": "user", "content": [{"type": "text", "text": prompt}]},), ()),
            prefix=tokens.prefix,
            branches=tokens.branches,
            max_new_tokens=NUM_NEXT_TOKENS,
        )
        for prompt in prompts
    ]


def _share(values: Sequence[bool]) -> float:
    return float(np.mean(values))
