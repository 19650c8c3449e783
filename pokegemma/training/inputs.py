"""What training reads: a dataset's files, its samples or trajectories as rows, and checks of both."""

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError

from pokegemma.data.prompts import ANSWER_PREFIX, answer_button
from pokegemma.data.samples import Sample, dataset_hash, read_samples
from pokegemma.data.trajectories import Trajectory, cut_trajectories
from pokegemma.errors import PokegemmaError
from pokegemma.gemma.batches.collator import Example, Row
from pokegemma.gemma.batches.processor_collator import Collator
from pokegemma.training.options import DataOptions

_MAX_NAMED = 5


def eval_file(data: DataOptions, beside_train: Path | None) -> Path | None:
    """Return the JSONL file to evaluate on: the one that was named, or eval.jsonl beside train.jsonl, or None.

    Raises:
        PokegemmaError: the named one does not exist.
    """
    if data.eval_dataset_path is None:
        return beside_train
    path = Path(data.eval_dataset_path)
    path = path / "eval.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise PokegemmaError(f"--eval_dataset_path: {path} not found")
    return path


def read_examples(path: Path, data: DataOptions) -> Iterator[Example]:
    """Yield what a row of training shows: the samples of a JSONL file, or their trajectories. Paths are absolute.

    Raises:
        PokegemmaError: a line is not a sample.
    """
    folder = path.parent.resolve()
    samples = (
        dataclasses.replace(
            sample,
            frames=tuple(str(folder / frame) for frame in sample.frames),
            image=sample.image and str(folder / sample.image),
        )
        for sample in read_samples(path)
    )
    if data.layout != "trajectory":
        return samples
    return cut_trajectories(samples, max_decisions=data.max_decisions, overlap=data.overlap_decisions)


def load_dataset(path: Path, data: DataOptions, *, cache_dir: Path) -> Dataset:
    """Return the rows of a JSONL file as a memory-mapped dataset; see `collator.Row`.

    Paths are absolute, so that files of several folders go through one collator.

    Raises:
        PokegemmaError: a line is not a sample.
    """

    def rows(**cache_key: str) -> Iterator[Row]:
        for example in read_examples(path, data):
            if isinstance(example, Sample):
                yield {"sample": example.to_json()}
            else:
                samples = [sample.to_json() for sample in example.samples]
                yield {"samples": samples, "num_context": example.num_context}

    with PartialState().main_process_first():
        # The whole path, since rows hold whole ones: the same relative one elsewhere is another file.
        key = {"path": str(path.resolve()), "content": dataset_hash(path), "options": repr(data)}
        try:
            return Dataset.from_generator(rows, gen_kwargs=key, cache_dir=str(cache_dir))
        except DatasetGenerationError as error:
            raise PokegemmaError(str(error.__cause__)) from error


def check_lengths(path: Path, examples: Iterable[Example], collator: Collator, *, max_length: int) -> None:
    """Refuse rows of more than `max_length` tokens, naming them: cutting one would cut pictures or the answer.

    Raises:
        PokegemmaError: there are such rows.
    """
    too_long = []
    num_image_tokens = collator.processor.image_seq_length + 4  # begin, end and the newlines around
    for example in examples:
        samples = example.samples if isinstance(example, Trajectory) else (example,)
        num_bytes = sum(len(text.encode()) for one in samples for text in (one.context, one.question, one.output))
        num_images = len(collator.picture_paths(example))
        # A token has at least one byte, and the chat template adds fewer than 64: most need not be tokenized.
        if num_bytes + num_images * num_image_tokens + 64 * len(samples) <= max_length:
            continue
        num_tokens = collator.count_tokens(example)
        if num_tokens > max_length:
            too_long.append(f"{example.id} ({num_tokens})")
    if too_long:
        what, advice = ("samples", "convert with fewer frames")
        if collator.layout == "trajectory":
            what, advice = ("trajectories", "lower --max_decisions")
        raise PokegemmaError(
            f"{path}: {len(too_long)} {what} are longer than {max_length} tokens: {', '.join(too_long[:_MAX_NAMED])}"
            f"{' ...' if len(too_long) > _MAX_NAMED else ''}; raise --max_length, or {advice}"
        )


def require_scorable_answers(path: Path) -> None:
    """Refuse answers that evaluation could not find a button in: at its first one, a run would be lost.

    Raises:
        PokegemmaError: there are such samples.
    """
    bad = []
    for sample in read_samples(path):
        button = answer_button(sample.output)
        if button is None or not sample.output.strip().startswith(f'{ANSWER_PREFIX}{button}"'):
            bad.append(sample.id)
    if bad:
        raise PokegemmaError(
            f"{path}: {len(bad)} answers do not begin with {ANSWER_PREFIX} and a button: "
            f"{', '.join(bad[:_MAX_NAMED])}{' ...' if len(bad) > _MAX_NAMED else ''}"
        )
