"""Time the scoring of the 13 actions in one pass against one pass an action, by turns in one run: the same scores.

    python benchmarks/battles_scoring.py

The states are made-up ones. `words`: the tiny Gemma 3 with a tokenizer of whole words, where an action is one token.
`pieces`: the same model with a SentencePiece tokenizer as Gemma's, where an action is several tokens; it has learned
other words, so that a prompt is several hundred tokens long. Rates are states a CPU second, medians of the repeats.
Both ways read batches of one size and run the LM head on the places of the answers only. Their probabilities are
compared first.
"""

import json
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

if __name__ == "__main__":  # a script has only its own folder on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.battles_reading import make_battle
from pokegemma.battles.policy.checkpoint import PolicyCheckpoint, open_policy
from pokegemma.battles.policy.prompts import join_prompt
from pokegemma.battles.policy.scoring import DEFAULT_BATCH_SIZE, score_actions
from pokegemma.battles.policy.tiny import make_tiny_policy
from pokegemma.battles.trajectories.short_text import list_short_words
from pokegemma.cli import parse_options, run
from pokegemma.errors import CheckFailedError, check_ranges
from pokegemma.gemma.button_tokens import ButtonTokens
from pokegemma.gemma.tiny.tokenizer import train_tokenizer
from pokegemma.options import option
from pokegemma.provenance import git_commit
from pokegemma.tables import format_table

MAX_DIFFERENCE = 1e-5


@dataclass(frozen=True)
class ScoringOptions:
    num_states: int = option(32, "Made-up states.")
    repeats: int = option(3, "Runs of each way; medians are printed.")
    json: bool = option(False, "Print JSON instead of a table.")

    def __post_init__(self) -> None:
        check_ranges(self, "num_states", "repeats", at_least=1)


def make_texts(num_states: int) -> list[list[str]]:
    """Return the words of made-up states."""
    draw = random.Random(0)
    return [list_short_words(make_battle(draw, 2).states[0]) for _ in range(num_states)]


def make_policies(folder: Path, texts: Sequence[Sequence[str]]) -> dict[str, PolicyCheckpoint]:
    """Return the tiny model with both tokenizers."""
    for name in ("words", "pieces"):
        (folder / name).mkdir()
    make_tiny_policy(folder / "words", {word for words in texts for word in words})
    tokenizer = train_tokenizer(folder / "pieces", seed=0)
    settings = open_policy(folder / "words").config.to_dict() | {"vocab_size": len(tokenizer)}
    Gemma3ForCausalLM(Gemma3TextConfig.from_dict(settings)).save_pretrained(folder / "pieces")
    return {name: open_policy(folder / name) for name in ("words", "pieces")}


@torch.inference_mode()
def score_one_by_one(
    model: Gemma3ForCausalLM, prompts: Sequence[Sequence[int]], tokens: ButtonTokens, *, batch_size: int
) -> torch.Tensor:
    """Return what `score_actions` returns, in one plain pass an action: prompt and answer as rows of their own.

    Rows are padded at their beginnings, so that all answers are at the ends, and the LM head runs there only: of all
    places of a batch its logits would take hundreds of megabytes, and more time than the layers.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    scores = torch.empty(len(prompts), len(tokens.branches))
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        for action, branch in enumerate(tokens.branches):
            rows = [[*prompts[index], *tokens.prefix, *branch] for index in part]
            length = max(map(len, rows))
            ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
            mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
            logits = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                logits_to_keep=len(branch) + 1,
                use_cache=False,
            ).logits
            log_probabilities = logits[:, :-1].log_softmax(-1)
            scores[part, action] = log_probabilities[:, torch.arange(len(branch)), list(branch)].sum(-1)
    return scores


def rate(score: Callable[[], Any], number: int) -> float:
    """Return states a CPU second of this process."""
    start = time.process_time()
    score()
    return number / (time.process_time() - start)


def measure(policy: PolicyCheckpoint, texts: Sequence[Sequence[str]], *, repeats: int) -> dict[str, list[float]]:
    """Return the rates of both ways in each repeat.

    Raises:
        CheckFailedError: the probabilities differ.
    """
    model, tokens = policy.load_model(), policy.action_tokens
    prompts = policy.encode([join_prompt(words) for words in texts])
    ways = {
        "one pass an action": lambda: score_one_by_one(model, prompts, tokens, batch_size=DEFAULT_BATCH_SIZE),
        "one pass": lambda: score_actions(model, prompts, tokens),
    }
    plain, fast = (score().softmax(-1) for score in ways.values())
    difference = (plain - fast).abs().max().item()
    if not difference <= MAX_DIFFERENCE:
        raise CheckFailedError(f"the probabilities differ by {difference:.1e}, more than {MAX_DIFFERENCE:.0e}")
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, score in ways.items():
            rates[name].append(rate(score, len(prompts)))
    return rates


def main() -> None:
    (options,) = parse_options(ScoringOptions, description=__doc__)
    torch.set_num_threads(1)
    texts = make_texts(options.num_states)
    with tempfile.TemporaryDirectory() as folder:
        policies = make_policies(Path(folder), texts)
        rates = {name: measure(policy, texts, repeats=options.repeats) for name, policy in policies.items()}
    medians = {name: {way: statistics.median(values) for way, values in ways.items()} for name, ways in rates.items()}
    record = {"machine": platform.platform(), "commit": git_commit(), "states_per_cpu_s": medians, "all": rates}
    if options.json:
        print(json.dumps(record, indent=2))
        return
    rows = [("tokenizer", "one pass an action", "one pass", "times")]
    for name, ways in medians.items():
        slow, fast = ways.values()
        rows.append((name, f"{slow:,.0f}", f"{fast:,.0f}", f"{fast / slow:.1f}"))
    print(format_table(rows))
    print(f"{record['machine']}, commit {record['commit']}")


if __name__ == "__main__":
    run(main)
