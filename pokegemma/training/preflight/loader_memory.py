"""How much shared memory a training run needs for the batches of its data loader workers."""

import dataclasses
import math
import mmap
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from pokegemma.data.checks.records import Check, skipped
from pokegemma.data.trajectories import Trajectory
from pokegemma.environment import Hardware
from pokegemma.errors import PokegemmaError
from pokegemma.gemma.batches import shared_memory
from pokegemma.gemma.batches.collator import Example
from pokegemma.gemma.batches.processor_collator import Collator
from pokegemma.gemma.loading import Checkpoint
from pokegemma.training.options import RunOptions, TrainingOptions
from pokegemma.training.preflight.planned_run import PlannedRun


@dataclass(frozen=True)
class Loading:
    """How a training run loads its batches; `eval_batch_size` is 0 where it does not evaluate.

    `on_cpu`: batches stay in shared memory for as long as training keeps them; a GPU gets copies.
    """

    num_workers: int
    batch_size: int
    eval_batch_size: int
    accumulation: int
    on_cpu: bool
    prefetch_factor: int = shared_memory.PREFETCH_FACTOR
    num_processes: int = field(default_factory=lambda: int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def loading_of(training: TrainingOptions) -> Loading:
    """Return how a training run of these options, in the processes of this machine, loads its batches."""
    return Loading(
        num_workers=training.dataloader_num_workers,
        batch_size=training.per_device_train_batch_size,
        eval_batch_size=training.per_device_eval_batch_size,
        accumulation=training.gradient_accumulation_steps,
        on_cpu=training.device.type == "cpu",
        prefetch_factor=training.dataloader_prefetch_factor or shared_memory.PREFETCH_FACTOR,
    )


@dataclass(frozen=True)
class RowSize:
    """The number of rows of a split, and the bytes of each tensor that a batch of its largest row has."""

    num_rows: int
    tensors: tuple[int, ...]

    def batch_bytes(self, batch_size: int) -> int:
        """Return the shared memory of a batch: each tensor has pages of its own."""
        return sum(math.ceil(size * batch_size / mmap.PAGESIZE) * mmap.PAGESIZE for size in self.tensors)


def measure_rows(
    collator: Collator, examples: Iterable[Example], *, picture_bytes: int | None = None
) -> RowSize | None:
    """Return the size of the row with the most pictures (and the most text of those) as a batch; None for no rows.

    Args:
        picture_bytes: of a picture's features, if they replace its pixels.

    Raises:
        PokegemmaError: a picture of that row cannot be read.
    """
    largest, largest_key, num_rows = None, (-1, -1), 0
    for example in examples:
        samples = example.samples if isinstance(example, Trajectory) else (example,)
        num_characters = sum(len(sample.context + sample.question + sample.output) for sample in samples)
        key = (len(set(collator.picture_paths(example))), num_characters)
        if key > largest_key:
            largest, largest_key = example, key
        num_rows += 1
    if largest is None:
        return None
    sizes = {name: tensor.nbytes for name, tensor in collator([largest]).items()}
    if picture_bytes is not None:
        sizes["pixel_values"] = largest_key[0] * picture_bytes
    return RowSize(num_rows, tuple(sizes.values()))


def needed_bytes(loading: Loading, train: RowSize | None, held_out: RowSize | None) -> int:
    """Return the shared memory that training needs at most, with the evaluation within it.

    Each worker has `prefetch_factor` batches ready, and a fast one makes another before training releases its last one.
    On a CPU, training keeps the batches of an optimizer step until it has those of the next one, and a loader is one
    batch ahead; a GPU has copies. During an evaluation the batches of the training loader stay in memory.
    """
    if not loading.num_workers or train is None:
        return 0
    ready = loading.num_workers * loading.prefetch_factor
    kept, resting, evaluating = (2 * loading.accumulation, loading.accumulation + 1, 2) if loading.on_cpu else (1, 1, 1)

    def share(rows: RowSize, batch_size: int, num_batches: int) -> int:
        num_of_process = math.ceil(rows.num_rows / loading.num_processes / batch_size)
        return rows.batch_bytes(min(batch_size, rows.num_rows)) * min(num_batches, num_of_process)

    semaphores = loading.num_workers * shared_memory.SEMAPHORE_BYTES
    needed = share(train, loading.batch_size, ready + kept + 1) + semaphores
    if held_out is not None and loading.eval_batch_size:
        evaluation = share(held_out, loading.eval_batch_size, ready + evaluating + 1)
        needed = max(needed, share(train, loading.batch_size, ready + resting) + evaluation + 2 * semaphores)
    return needed * loading.num_processes


def feature_bytes(checkpoint: Checkpoint, options: RunOptions) -> int | None:
    """Return the bytes of a picture's features, which take the place of its pixels; None without --vision_features."""
    if options.data.vision_features is None:
        return None
    width = checkpoint.config.get_text_config().hidden_size
    return checkpoint.processor.image_seq_length * width * getattr(torch, options.model.dtype).itemsize


def check_workers(
    training: TrainingOptions,
    collator: Collator,
    train: Iterable[Example],
    held_out: Iterable[Example] | None,
    *,
    picture_bytes: int | None,
) -> None:
    """Refuse to train with more data loader workers than shared memory has space for.

    Args:
        held_out: None where training does not evaluate.
        picture_bytes: of a picture's features, where they take the place of pixels.

    Raises:
        SharedMemoryError: it has too little space.
    """
    if training.dataloader_num_workers:
        sizes = [rows and measure_rows(collator, rows, picture_bytes=picture_bytes) for rows in (train, held_out)]
        shared_memory.check_free(needed_bytes(loading_of(training), *sizes))


def check_shared_memory(
    run: PlannedRun, hardware: Hardware, collators: Mapping[str, Collator], *, picture_bytes: int | None
) -> Check:
    """Fail if /dev/shm has too little space for the batches of training's data loader workers.

    Args:
        collators: by the name of the split.
        picture_bytes: of a picture's features; None without --vision_features.
    """
    name, free = "shared memory", shared_memory.free_bytes()
    if free is None or not run.options.training.dataloader_num_workers:
        return skipped(name, "not limited here" if free is None else "training has no data loader workers")
    num_gpus = len(hardware.usable_gpus)
    loading = dataclasses.replace(
        loading_of(run.options.training),
        eval_batch_size=run.eval_batch_size,
        on_cpu=not num_gpus,
        num_processes=max(1, num_gpus),
    )
    try:
        train, held_out = (
            split
            and measure_rows(
                collators[split.name], (example for _, example in run.rows(split)), picture_bytes=picture_bytes
            )
            for split in (run.train, run.held_out)
        )
    except PokegemmaError as error:
        return skipped(name, str(error))
    needed = needed_bytes(loading, train, held_out)
    found = shared_memory.describe(needed, free)
    if needed > free:
        return Check(name, "FAIL", f"{found}: {shared_memory.advise(needed)}")
    return Check(name, "PASS", found)
