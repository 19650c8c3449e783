"""Encode every distinct frame of a dataset once, for --vision_features of training and evaluation.

python scripts/precompute_features.py --dataset_path training_data --vision_features outputs/features

Training does the same when it starts. This script can do it earlier, on another machine or on a Ray cluster
(--ray_address), and several processes at once share the work. After a run that was killed, the next one continues it.
Prints how many frames there are and their size.
"""

import functools
import itertools
from dataclasses import dataclass
from pathlib import Path

from pokegemma.cli import parse_options, run
from pokegemma.data.prompts import Layout
from pokegemma.data.samples import dataset_files
from pokegemma.errors import check_ranges
from pokegemma.options import option


@dataclass
class PrecomputeOptions:
    dataset_path: str = option(..., "Folder with train.jsonl (and eval.jsonl), or a JSONL file.")
    vision_features: str = option(..., "Folder of the features. It is created if it does not exist.")
    model_name_or_path: str = option("google/gemma-3-4b-it", "Gemma 3 checkpoint with vision: a Hub id or a folder.")
    layout: Layout = option("grid", "Which pictures to encode: grids, or frames (also for trajectories).")
    image_size: int | None = option(None, "As in training. Default: the checkpoint's own.")
    dtype: str = option("auto", "Type of the weights, as in training.", choices=["auto", "bfloat16", "float32"])
    batch_size: int = option(8, "Frames in one forward pass.")
    num_workers: int = option(0, "Processes that decode pictures. With --ray_address: workers that encode, 0 for all.")
    ray_address: str | None = option(
        None, "Work on a Ray cluster whose machines share all folders: host:port, ray://host:port, auto, or local."
    )

    def __post_init__(self) -> None:
        check_ranges(self, "batch_size", at_least=1)
        check_ranges(self, "num_workers", at_least=0)


def main() -> None:
    (options,) = parse_options(PrecomputeOptions, description=__doc__)
    files = [path for path in dataset_files(Path(options.dataset_path)) if path is not None]
    import torch  # not before the options are checked

    from pokegemma.gemma.batches.feature_encoder import fill_cache, load_encoder
    from pokegemma.training.inputs import read_examples
    from pokegemma.training.options import DataOptions, automatic_dtype

    data = DataOptions(dataset_path=options.dataset_path, layout=options.layout)
    base = Path(options.model_name_or_path)
    load = functools.partial(
        load_encoder,
        str(base.resolve()) if base.is_dir() else options.model_name_or_path,
        Path(options.vision_features).resolve(),
        image_size=options.image_size,
        dtype=automatic_dtype("lora") if options.dtype == "auto" else options.dtype,
        batch_size=options.batch_size,
        num_workers=0 if options.ray_address else options.num_workers,
        num_threads=torch.get_num_threads(),
    )
    cache = fill_cache(
        itertools.chain.from_iterable(read_examples(path, data) for path in files),
        load,
        layout=options.layout,
        num_workers=options.num_workers,
        ray_address=options.ray_address,
        folders=[*(path.parent.resolve() for path in files), *([base] if base.is_dir() else [])],
    )
    print(cache.describe())


if __name__ == "__main__":
    run(main)
