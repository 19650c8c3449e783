"""What the real tokenizer makes of the prompts, the answers and the buttons of recorded sessions."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from benchmarks.decision_latency import estimate_tokens
from benchmarks.gpu_parts.plan import Run
from pokegemma.data import prompts
from pokegemma.data.samples import Sample, dataset_files, read_samples
from pokegemma.data.trajectories import cut_trajectories
from pokegemma.gemma.button_scores import place_branches
from pokegemma.gemma.button_tokens import ButtonTokens
from pokegemma.gemma.loading import open_checkpoint
from pokegemma.play.server_player import button_probabilities
from pokegemma.serving.client import Token
from pokegemma.tables import format_markdown_table
from pokegemma.training.options import DataOptions

TEXTS = ("context", "question", "output")


def measure_counts(run: Run) -> dict[str, Any]:
    """Return the tokens of all conversations by layout, and those of each text next to their estimate."""
    checkpoint = open_checkpoint(run.checkpoint)
    samples = [sample for path in dataset_files(run.dataset) if path for sample in read_samples(path)]
    data = DataOptions("")
    cut = list(cut_trajectories(samples, max_decisions=data.max_decisions, overlap=data.overlap_decisions))
    lengths = {}
    for layout in prompts.LAYOUTS:
        collator = checkpoint.collator(layout=layout, dataset_folder=run.dataset)
        lengths[layout] = [collator.count_tokens(example) for example in (cut if layout == "trajectory" else samples)]
    return {
        "samples": len(samples),
        "conversations": {layout: spread(numbers) for layout, numbers in lengths.items()},
        "texts": compare_estimates(checkpoint.processor.tokenizer, samples),
        "picture_tokens": checkpoint.config.mm_tokens_per_image,
        "prompt_limit": prompts.MAX_PROMPT_TOKENS,
    }


def spread(numbers: Sequence[float]) -> dict[str, float]:
    return {"number": len(numbers), "mean": float(np.mean(numbers)), "most": max(numbers)}


def compare_estimates(tokenizer: PreTrainedTokenizerBase, samples: Sequence[Sample]) -> dict[str, dict[str, Any]]:
    """Return, for each kind of text, the tokens of the distinct texts of samples and how their estimates compare."""
    found = {}
    kinds = {name: {getattr(sample, name) for sample in samples} for name in TEXTS}
    kinds["prompt"] = {sample.context + sample.question for sample in samples}
    for name, distinct in kinds.items():
        texts = sorted(distinct)
        counts = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
        estimates = [estimate_tokens(text) for text in texts]
        too_low = [text for text, count, estimate in zip(texts, counts, estimates, strict=True) if estimate < count]
        found[name] = {
            **spread(counts),
            "estimate": spread(estimates),
            "least_margin": min(estimate - count for estimate, count in zip(estimates, counts, strict=True)),
            "too_low": too_low,
        }
    return found


def counts_table(record: dict[str, Any]) -> str:
    layouts = [
        (layout, f"{found['number']:,}", f"{found['mean']:,.0f}", f"{found['most']:,}")
        for layout, found in record["conversations"].items()
    ]
    texts = [
        (
            name,
            f"{found['number']:,}",
            f"{found['mean']:.0f}",
            str(found["most"]),
            f"{found['estimate']['mean']:.0f}",
            str(found["estimate"]["most"]),
            str(found["least_margin"]),
            str(len(found["too_low"])),
        )
        for name, found in record["texts"].items()
    ]
    columns = ("", "distinct texts", "tokens, mean", "most", "estimate, mean", "most", "least margin", "too low")
    return (
        f"Conversations of {record['samples']} samples, with the answer and {record['picture_tokens']} tokens a "
        "picture:\n\n"
        + format_markdown_table(("layout", "conversations", "tokens, mean", "most"), layouts)
        + "\n\nTexts without the chat template. The margin is the estimate minus the tokens; an estimate below the "
        "tokens is too low. `prompt` is context and question together, whose limit is "
        f"{record['prompt_limit']}:\n\n" + format_markdown_table(columns, texts)
    )


def measure_buttons(run: Run) -> dict[str, Any]:
    """Return the tokens by which the buttons are told apart, and what a server's tokens say about them."""
    tokenizer = open_checkpoint(run.checkpoint).processor.tokenizer
    tokens = ButtonTokens.of(tokenizer)
    return {
        "prefix": list(tokens.prefix),
        "prefix_texts": tokenizer.convert_ids_to_tokens(list(tokens.prefix)),
        "branches": dict(zip(prompts.BUTTONS, map(list, tokens.branches), strict=True)),
        "branch_texts": {
            button: tokenizer.convert_ids_to_tokens(list(branch))
            for button, branch in zip(prompts.BUTTONS, tokens.branches, strict=True)
        },
        "added_tokens": len(place_branches(tokens)[0]),
        "read_from_a_server": [read_back(tokenizer, tokens, button) for button in prompts.BUTTONS],
    }


def read_back(tokenizer: PreTrainedTokenizerBase, tokens: ButtonTokens, button: str) -> str | None:
    """Return the button that is read from what a server reports about an answer with `button`.

    At each place of the answer the server lists the token that was written and the first token of each button.
    """
    answer = tokenizer(prompts.build_output(button=button, reasoning="", context=""), add_special_tokens=False)
    likeliest = {branch[0] for branch in tokens.branches}
    reported = [
        Token(
            text=tokenizer.decode([token]),
            log_probability=0.0,
            likeliest=tuple((tokenizer.decode([other]), 0.0 if other == token else -9.0) for other in likeliest),
        )
        for token in answer["input_ids"]
    ]
    probabilities = button_probabilities(tuple(reported))
    return None if probabilities is None else prompts.BUTTONS[int(probabilities.argmax())]


def buttons_table(record: dict[str, Any]) -> str:
    rows = [
        (button, " ".join(f"`{text}`" for text in record["branch_texts"][button]), " ".join(map(str, ids)), read or "-")
        for (button, ids), read in zip(record["branches"].items(), record["read_from_a_server"], strict=True)
    ]
    prefix = " ".join(f"`{text}`" for text in record["prefix_texts"])
    return (
        f"All answers begin with the tokens {prefix} ({', '.join(map(str, record['prefix']))}). "
        f"One pass scores the eight buttons with {record['added_tokens']} tokens after the prompt.\n\n"
        + format_markdown_table(("button", "tokens", "ids", "read from a server's likeliest tokens"), rows)
    )
