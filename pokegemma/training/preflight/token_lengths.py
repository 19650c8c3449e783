"""Lengths of the rows of training in tokens, compared with the largest length that can be trained."""

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from tqdm import tqdm

from pokegemma.data.checks.records import NO_SAMPLES, Check, Split, skipped
from pokegemma.data.prompts import MAX_PROMPT_TOKENS
from pokegemma.data.trajectories import Trajectory
from pokegemma.errors import PokegemmaError
from pokegemma.gemma.batches.collator import Example
from pokegemma.gemma.batches.processor_collator import Collator


@dataclass
class TokenLengths:
    """Lengths in tokens, the largest of all rows.

    Attributes:
        longest: of a whole row, with the tokens of its pictures and answers.
        longest_prompt_text: of the text before an answer.
        longest_answer: of the answers of a row together.
        most_pictures: pictures of a row.
        total: of all rows together.
    """

    longest: int = 0
    longest_prompt_text: int = 0
    longest_answer: int = 0
    most_pictures: int = 0
    total: int = 0
    num_rows: int = 0

    def add(self, *, num_tokens: int, prompt_text: int, answer: int, num_pictures: int) -> None:
        """Count one more row."""
        self.longest = max(self.longest, num_tokens)
        self.longest_prompt_text = max(self.longest_prompt_text, prompt_text)
        self.longest_answer = max(self.longest_answer, answer)
        self.most_pictures = max(self.most_pictures, num_pictures)
        self.total += num_tokens
        self.num_rows += 1


def check_token_lengths(
    splits: Iterable[Split],
    collators: Mapping[str, Collator],
    *,
    max_positions: int,
    max_length: int | None,
    rows: Callable[[Split], Iterable[tuple[str, Example]]] = Split.located,
) -> tuple[Check, TokenLengths | None]:
    """Fail if a row is longer than the model's positions or `max_length`; warn if a prompt is over its budget.

    A prompt over `MAX_PROMPT_TOKENS` can be trained on, but slowly; a tiny tokenizer needs more tokens than Gemma's.

    Args:
        collators: by the name of the split.
        max_positions: `max_position_embeddings` of the text model.
        max_length: the limit of the training run, or None for `max_positions`.
        rows: yields the rows of a split and where each is in the file.

    Returns:
        The result, and the lengths; None where no row could be measured.
    """
    name, limit = "token lengths", min(max_positions, max_length or max_positions)
    lengths, num_rows = TokenLengths(), 0
    too_long, over_budget = [], []
    for split in splits:
        collator, count = collators[split.name], _token_counter(collators[split.name])
        for where, example in tqdm(rows(split), f"tokens of {split.name}", leave=False):
            num_rows += 1
            samples = example.samples if isinstance(example, Trajectory) else (example,)
            try:
                num_tokens, num_pictures = collator.count_tokens(example), len(collator.picture_paths(example))
            except PokegemmaError as error:
                too_long.append(f"{where} ({example.id}): {error}")
                continue
            prompt_text = count(samples[0].context) + count(samples[0].question)
            answer = sum(count(sample.output) for sample in samples)
            lengths.add(num_tokens=num_tokens, prompt_text=prompt_text, answer=answer, num_pictures=num_pictures)
            if num_tokens > limit:
                too_long.append(f"{where} ({example.id}): {num_tokens} tokens, more than {limit}")
            if prompt_text > MAX_PROMPT_TOKENS:
                budget = f"{prompt_text} tokens of prompt text, over {MAX_PROMPT_TOKENS}"
                over_budget.append(f"{where} ({example.id}): {budget}")
    if not num_rows:
        return skipped(name, NO_SAMPLES), None
    if not lengths.num_rows:
        return Check(name, "FAIL", f"none of {num_rows} rows can be trained on", tuple(too_long)), None
    summary = (
        f"longest sample {lengths.longest} of {limit} tokens, mean {lengths.total / lengths.num_rows:.0f}; prompt text "
        f"at most {lengths.longest_prompt_text} of {MAX_PROMPT_TOKENS}, answer at most {lengths.longest_answer}"
    )
    if too_long:
        summary += f"; {len(too_long)} cannot be trained on"
        return Check(name, "FAIL", summary, (*too_long, *over_budget)), lengths
    return Check(name, "WARN" if over_budget else "PASS", summary, tuple(over_budget)), lengths


def _token_counter(collator: Collator) -> Callable[[str], int]:
    """Return a function that counts the tokens of a text. It caches results, since contexts repeat."""
    tokenizer = collator.processor.tokenizer

    @functools.lru_cache(maxsize=10_000)
    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    return count
