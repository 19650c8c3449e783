"""The dataset of trials of a batch size: the longest rows of the real one, which need the most memory."""

import dataclasses
import heapq
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from pokegemma.data.samples import Sample
from pokegemma.data.trajectories import Trajectory
from pokegemma.gemma.batches.collator import Example
from pokegemma.gemma.batches.processor_collator import Collator
from pokegemma.training.inputs import read_examples
from pokegemma.training.options import DataOptions, ModelOptions


def longest_first(examples: Iterator[Example], collator: Collator, *, number: int) -> list[tuple[int, Example]]:
    """Return the `number` examples with the most tokens, each with its count, the longest first."""
    counted = ((collator.count_tokens(example), example) for example in examples)
    return heapq.nlargest(number, counted, key=lambda pair: pair[0])


def _relocate(sample: Sample, *, split: str, step: int, row: int, source: Path) -> Sample:
    """Return a sample with its pictures in SPLIT_row_N, and with a session of its own for each row and step."""

    def below(path: str) -> str:
        return f"{split}_row_{row}/{Path(path).relative_to(source).as_posix()}"

    return dataclasses.replace(
        sample,
        frames=tuple(map(below, sample.frames)),
        image=sample.image and below(sample.image),
        metadata={**sample.metadata, "session": f"{sample.session} step {step} row {row}"},
    )


def _samples(example: Example) -> tuple[Sample, ...]:
    """Return the samples of a row, which become a row of as many tokens when they are read from a new file."""
    if not isinstance(example, Trajectory):
        return (example,)
    first, *others = example.samples
    if example.num_context:  # only the beginning of a session shows its window
        first = dataclasses.replace(first, frames=first.frames[-1:])
    return (first, *others)


def write_rows(
    examples: Sequence[Example], folder: Path, *, split: str, source: Path, step_rows: int, num_steps: int
) -> None:
    """Write `num_steps` times the same `step_rows` rows as SPLIT.jsonl in `folder`, examples repeated if too few.

    Every step has the same rows in the same order, so that its first forward pass is the largest possible. Each row
    has its own link to the pictures in `source`: a batch of training rarely contains a picture twice, and the collator
    reads equal paths once. All decisions of a trajectory count, including those that were only context.
    """
    folder.mkdir(exist_ok=True)
    for row in range(step_rows):
        (folder / f"{split}_row_{row}").symlink_to(source)
    with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as file:
        for step in range(num_steps):
            for row, example in enumerate(itertools.islice(itertools.cycle(examples), step_rows)):
                for sample in _samples(example):
                    file.write(f"{_relocate(sample, split=split, step=step, row=row, source=source).to_json()}\n")


def write_trial_dataset(
    data: DataOptions, model: ModelOptions, folder: Path, *, step_rows: int, num_steps: int, eval_rows: int = 0
) -> list[int]:
    """Write what a trial trains on into `folder`, and return the tokens of its different rows, the longest first.

    Args:
        eval_rows: rows to evaluate on at most; 0 where training does not evaluate.

    Raises:
        PokegemmaError: dataset or processor cannot be read, or the model is stored quantised.
    """
    train, held_out = data.find_splits()
    checkpoint = model.open_checkpoint()
    checkpoint.require_full_precision()
    collator = checkpoint.collator(layout=data.layout, dataset_folder=Path())

    def longest_rows(path: Path, number: int) -> list[tuple[int, Example]]:
        examples = tqdm(read_examples(path, data), "count tokens", leave=False, disable=None)
        return longest_first(examples, collator, number=number)

    longest = longest_rows(train.path, step_rows)
    write_rows(
        [example for _, example in longest],
        folder,
        split="train",
        source=train.folder.resolve(),
        step_rows=step_rows,
        num_steps=num_steps,
    )
    if eval_rows and held_out is not None and (rows := longest_rows(held_out.path, eval_rows)):
        write_rows(
            [example for _, example in rows],
            folder,
            split="eval",
            source=held_out.folder.resolve(),
            step_rows=len(rows),
            num_steps=1,
        )
    return [num_tokens for num_tokens, _ in longest]
