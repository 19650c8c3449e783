"""The inputs of a training run: files, base model and rows, all checked before anything is written."""

import dataclasses
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError
from transformers.trainer_utils import IntervalStrategy

from pokegemma.data.checks.records import Split
from pokegemma.data.prompts import ANSWER_PREFIX, answer_button
from pokegemma.data.samples import Sample, dataset_hash, read_samples
from pokegemma.data.trajectories import Trajectory, cut_trajectories
from pokegemma.errors import PokegemmaError
from pokegemma.gemma.batches.collator import Example, Row
from pokegemma.gemma.batches.processor_collator import Collator
from pokegemma.gemma.families import require_exact
from pokegemma.gemma.image_attention import attention_facts
from pokegemma.gemma.loading import Checkpoint
from pokegemma.gemma.model_image_size import picture_facts
from pokegemma.provenance import read_run_record
from pokegemma.training.options import DataOptions, RunOptions
from pokegemma.training.preflight.loader_memory import check_workers, feature_bytes
from pokegemma.training.run_folder import check_output

logger = logging.getLogger(__name__)

_MAX_NAMED = 5


@dataclass(frozen=True)
class RunFiles:
    """The files of a training run.

    Attributes:
        held_out: None where the dataset has nothing to evaluate on.
        resume_from: the training checkpoint to continue from; None to start.
    """

    train: Split
    held_out: Split | None
    output_dir: Path
    resume_from: Path | None

    @property
    def splits(self) -> list[Split]:
        return [split for split in (self.train, self.held_out) if split is not None]


@dataclass(frozen=True)
class Inputs:
    """What a training run reads.

    Attributes:
        base: the checkpoint of the base model, with the image options of the run.
        collator: makes the batches; its `features` are set once the model is loaded.
        facts: what run.json records about the inputs.
    """

    files: RunFiles
    base: Checkpoint
    collator: Collator
    facts: dict[str, Any]

    def picture_paths(self, options: RunOptions) -> Iterator[str]:
        """Yield the path of each picture of the dataset, as often as a row shows it."""
        for split in self.files.splits:
            for example in read_examples(split.path, options.data):
                yield from self.collator.picture_paths(example)


def find_files(options: RunOptions) -> RunFiles:
    """Find the dataset and the checkpoint to continue from. Nothing is deleted.

    The path of the base model becomes absolute in the options, since the adapter records it. Without a file
    to evaluate on, evaluation is switched off in the options.

    Raises:
        PokegemmaError: a file does not exist, or the output folder cannot be used.
    """
    data, training, model = options.data, options.training, options.model
    if Path(model.model_name_or_path).is_dir():
        model.model_name_or_path = str(Path(model.model_name_or_path).resolve())
    train, held_out = data.find_splits()
    if held_out is None:
        logger.warning("no eval.jsonl: training without evaluation, the last checkpoint counts as the best")
        training.eval_strategy, training.load_best_model_at_end = IntervalStrategy.NO, False
    output_dir, features = Path(training.output_dir), data.vision_features
    sources = [split.path for split in (train, held_out) if split is not None]
    resume_from = check_output(
        output_dir,
        sources=[*sources, Path(model.model_name_or_path), *([] if features is None else [Path(features)])],
        overwrite=data.overwrite,
        resume=training.resume_from_checkpoint,
    )
    return RunFiles(train, held_out, output_dir, resume_from)


def read_inputs(options: RunOptions, files: RunFiles) -> Inputs:
    """Read the base model's config and processor and every sample, and refuse what cannot be trained on.

    An image size or attention that is the model's own is removed from the options: the run is the same without it.

    Raises:
        PokegemmaError: the model cannot be read or is stored quantised, an option is not exact for its family, or a
            sample is too long or cannot be evaluated on.
        SharedMemoryError: the workers of the data loader need more shared memory than is free.
    """
    data, model = options.data, options.model
    base = model.open_checkpoint()
    base.require_full_precision()
    model.image_size, model.image_attention = base.image_size, base.image_attention
    for option, used in (("--vision_features", data.vision_features), ("--samples_per_row", data.samples_per_row > 1)):
        if used:
            require_exact(base.config, option)
    # Rows name their pictures by absolute paths, so the folder is not used.
    collator = base.collator(layout=data.layout, dataset_folder=Path(), samples_per_row=data.samples_per_row)
    _check_samples(options, files, base, collator)
    hashes = [{"path": str(split.path.resolve()), "sha256": dataset_hash(split.path)} for split in files.splits]
    facts = {
        "base_model": base.path,
        "base_fingerprint": base.weights_fingerprint(),
        "seed": options.training.seed,
        "dataset": hashes[0],
        "eval_dataset": hashes[1] if files.held_out else None,
        "window": _window_facts(files.train.path.parent),
        **picture_facts(base.config),
        **attention_facts(base.config),
    }
    return Inputs(files, base, collator, facts)


def _window_facts(dataset_folder: Path) -> dict[str, Any] | None:
    """Return which frames the samples show, as their conversion recorded it: play shows a model the same."""
    record = read_run_record(dataset_folder) or {}
    shown = record.get("window") or record.get("options") or {}
    window = {name: shown.get(name) for name in ("num_frames", "min_frames", "max_gap_s")}
    return window if record.get("stage") == "convert" and None not in window.values() else None


def _check_samples(options: RunOptions, files: RunFiles, base: Checkpoint, collator: Collator) -> None:
    data, training = options.data, options.training
    max_length = training.max_length or base.config.text_config.max_position_embeddings
    for split in files.splits:
        check_lengths(split.path, read_examples(split.path, data), collator, max_length=max_length)
    evaluated = files.held_out if training.evaluates else None
    if evaluated is not None:
        require_scorable_answers(evaluated.path)
    check_workers(
        training,
        collator,
        read_examples(files.train.path, data),
        evaluated and read_examples(evaluated.path, data),
        picture_bytes=feature_bytes(base, options),
    )


def read_examples(path: Path, data: DataOptions) -> Iterator[Example]:
    """Yield the rows of training: the samples of a JSONL file, or its trajectories. Their paths are absolute.

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

    Paths are absolute, so that one collator can read files of several folders.

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
        # The absolute path, since rows contain absolute paths: the same relative path elsewhere is another file.
        key = {"path": str(path.resolve()), "content": dataset_hash(path), "options": repr(data)}
        try:
            return Dataset.from_generator(rows, gen_kwargs=key, cache_dir=str(cache_dir))
        except DatasetGenerationError as error:
            raise PokegemmaError(str(error.__cause__)) from error


def check_lengths(path: Path, examples: Iterable[Example], collator: Collator, *, max_length: int) -> None:
    """Refuse rows of more than `max_length` tokens, with their ids: cutting one would cut pictures or the answer.

    Raises:
        PokegemmaError: there are such rows.
    """
    too_long = []
    num_image_tokens = collator.processor.image_seq_length + 4  # begin, end and the newlines around
    for example in examples:
        samples = example.samples if isinstance(example, Trajectory) else (example,)
        num_bytes = sum(len(text.encode()) for s in samples for text in (s.context, s.question, s.output))
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
    """Refuse answers in which evaluation would find no button: a run would fail at the first one.

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
