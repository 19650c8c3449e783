"""How many tokens samples have, against the longest that training takes."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pokegemma.data.checks.records import NO_SAMPLES, Check, Split, skipped
from pokegemma.data.prompts import MAX_PROMPT_TOKENS
from pokegemma.data.trajectories import Trajectory
from pokegemma.errors import PokegemmaError
from pokegemma.gemma.batches.collator import Example
from pokegemma.gemma.batches.processor_collator import Collator

Progress = Callable[[Iterable, str], Iterable]


@dataclass(frozen=True)
class TokenLengths:
    """Lengths in tokens: of whole samples (soft tokens and answer included), of prompt texts, of answers."""

    longest: int
    longest_prompt_text: int
    longest_answer: int
    total: int
    num_samples: int


def check_token_lengths(
    splits: Iterable[Split],
    collators: dict[str, Collator],
    *,
    max_positions: int,
    max_length: int | None,
    rows: Callable[[Split], Iterable[tuple[str, Example]]] = Split.located,
    progress: Progress | None = None,
) -> tuple[Check, TokenLengths | None]:
    """Fail if a sample is longer than the model's positions or `max_length`; warn if a prompt is over its budget.

    A prompt over `MAX_PROMPT_TOKENS` trains, only slower; a tiny tokenizer needs more tokens than Gemma's own.

    Args:
        collators: by the name of the split.
        max_positions: `max_position_embeddings` of the text model.
        max_length: the limit of the training run, or None for `max_positions`.
        rows: gives what a row shows, and where it is: samples, or trajectories.
    """
    name = "token lengths"
    limit = min(max_positions, max_length or max_positions)
    longest = longest_text = longest_answer = total = num_samples = 0
    too_long, wordy = [], []
    for split in splits:
        collator = collators[split.name]
        tokenizer = collator.processor.tokenizer

        @functools.lru_cache(maxsize=10_000)  # contexts repeat
        def count(text: str, tokenizer=tokenizer) -> int:
            return len(tokenizer(text, add_special_tokens=False)["input_ids"])

        located = rows(split)
        for where, example in progress(located, f"tokens of {split.name}") if progress else located:
            num_samples += 1
            try:
                num_tokens = collator.count_tokens(example)
            except PokegemmaError as error:
                too_long.append(f"{where} ({example.id}): {error}")
                continue
            samples = example.samples if isinstance(example, Trajectory) else (example,)
            num_text = count(samples[0].context) + count(samples[0].question)
            total += num_tokens
            longest, longest_text = max(longest, num_tokens), max(longest_text, num_text)
            longest_answer = max(longest_answer, sum(count(sample.output) for sample in samples))
            if num_tokens > limit:
                too_long.append(f"{where} ({example.id}): {num_tokens} tokens, more than {limit}")
            if num_text > MAX_PROMPT_TOKENS:
                wordy.append(f"{where} ({example.id}): {num_text} tokens of prompt text, over {MAX_PROMPT_TOKENS}")
    if not num_samples:
        return skipped(name, NO_SAMPLES), None
    lengths = TokenLengths(longest, longest_text, longest_answer, total, num_samples)
    summary = (
        f"longest sample {longest} of {limit} tokens, mean {total / num_samples:.0f}; prompt text at most "
        f"{longest_text} of {MAX_PROMPT_TOKENS}, answer at most {longest_answer}"
    )
    if too_long:
        return Check(name, "FAIL", f"{summary}; {len(too_long)} cannot be trained on", (*too_long, *wordy)), lengths
    return Check(name, "WARN" if wordy else "PASS", summary, tuple(wordy)), lengths
