"""Encode every distinct frame of a dataset once, for --vision_features of training and evaluation.

python scripts/precompute_features.py --dataset_path training_data --vision_features outputs/features

Training does the same when it starts; alone it can run before, on another machine or on a Ray cluster (--ray_address),
and several at once share the work. A run that was killed continues. Prints how many frames there are and their size.
"""

import functools
import itertools
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

from pokegemma.cli import parse_options, run
from pokegemma.data.prompts import Layout
from pokegemma.data.samples import dataset_files
from pokegemma.errors import PokegemmaError
from pokegemma.parallel.workers import map_items

logger = logging.getLogger("precompute_features")


@dataclass
class PrecomputeOptions:
    dataset_path: str = field(metadata={"help": "Folder with train.jsonl (and eval.jsonl), or a JSONL file."})
    vision_features: str = field(metadata={"help": "Folder of the features; made if there is none."})
    model_name_or_path: str = field(
        default="google/gemma-3-4b-it", metadata={"help": "Gemma 3 checkpoint with vision: a Hub id or a folder."}
    )
    layout: Layout = field(
        default="grid", metadata={"help": "Which pictures: grids, or frames (also of trajectories)."}
    )
    image_size: int | None = field(default=None, metadata={"help": "As in training. Default: the checkpoint's own."})
    dtype: str = field(
        default="auto",
        metadata={"help": "Type of the weights, as in training.", "choices": ["auto", "bfloat16", "float32"]},
    )
    batch_size: int = field(default=8, metadata={"help": "Frames in one forward pass."})
    num_workers: int = field(
        default=0,
        metadata={"help": "Processes that decode pictures; with --ray_address workers that encode, 0 for all."},
    )
    ray_address: str | None = field(
        default=None,
        metadata={
            "help": "Work on a Ray cluster whose machines share all folders: host:port, ray://host:port, auto, or "
            "local."
        },
    )

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("num_workers", 0)):
            if getattr(self, name) < least:
                raise PokegemmaError(f"--{name}: {getattr(self, name)} is less than {least}")


def main() -> None:
    (options,) = parse_options(PrecomputeOptions, description=__doc__)
    files = [path for path in dataset_files(Path(options.dataset_path)) if path is not None]
    import torch

    from pokegemma.gemma.batches import feature_encoder
    from pokegemma.gemma.batches.collator import Gemma3Collator
    from pokegemma.gemma.batches.feature_cache import hash_frames
    from pokegemma.training.inputs import read_examples
    from pokegemma.training.options import DataOptions, automatic_dtype

    base = options.model_name_or_path
    load = functools.partial(
        feature_encoder.load_encoder,
        str(Path(base).resolve()) if Path(base).is_dir() else base,
        Path(options.vision_features).resolve(),
        image_size=options.image_size,
        dtype=automatic_dtype("lora") if options.dtype == "auto" else options.dtype,
        batch_size=options.batch_size,
        num_workers=0 if options.ray_address else options.num_workers,
        num_threads=torch.get_num_threads(),
    )
    encoder = load()
    cache, data = encoder.cache, DataOptions(dataset_path=options.dataset_path, layout=options.layout)
    collator = Gemma3Collator(processor=encoder.processor, layout=options.layout, dataset_folder=Path())
    examples = itertools.chain.from_iterable(read_examples(path, data) for path in files)
    paths = (os.path.normpath(path) for example in examples for path in collator.picture_paths(example))
    cache.digests = hash_frames(paths)
    chunks = cache.missing_chunks()
    logger.info("%s", feature_encoder.describe_work(cache, chunks))
    if chunks:
        encoder.check_shared_memory(flag="--num_workers")
    folders = {cache.folder, *(path.parent.resolve() for path in files), *([Path(base)] if Path(base).is_dir() else [])}
    for _ in map_items(
        feature_encoder.fill_chunk,
        chunks,
        num_workers=options.num_workers if options.ray_address else 1,
        initialize=load if options.ray_address else lambda: encoder,
        ray_address=options.ray_address,
        num_gpus=int(torch.cuda.is_available()),
        folders=sorted(folders),
        label="encode frames",
        unit="chunk",
    ):
        pass
    num_frames = len(set(cache.digests.values()))
    size_gib = num_frames * cache.bytes_per_frame / 2**30
    print(f"{cache.folder}: {num_frames} frames, {cache.bytes_per_frame / 2**20:.2f} MiB each, {size_gib:.2f} GiB")


if __name__ == "__main__":
    run(main)
