"""Encode pictures with the frozen vision tower into a feature cache, alone or with other processes."""

import functools
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import Gemma3ForConditionalGeneration, Gemma3Processor

from pokegemma.data.prompts import Layout
from pokegemma.environment import GIB
from pokegemma.errors import PokegemmaError
from pokegemma.gemma.batches.collator import Example, Gemma3Collator
from pokegemma.gemma.batches.feature_cache import Chunk, FeatureCache, hash_frames, open_cache
from pokegemma.gemma.batches.feature_key import feature_key, vision_parameters
from pokegemma.gemma.batches.picture_resize import read_pictures
from pokegemma.gemma.batches.shared_memory import PREFETCH_FACTOR, SEMAPHORE_BYTES, check_free, share
from pokegemma.gemma.families import TOWER, require_exact
from pokegemma.gemma.loading import Dtype, default_device, open_checkpoint
from pokegemma.gemma.vision_tower import PROJECTOR, encode_pictures, gathered
from pokegemma.parallel.workers import map_items

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Encoder:
    """Vision tower and processor that turn frames into features and write them to a cache."""

    cache: FeatureCache
    model: Gemma3ForConditionalGeneration
    processor: Gemma3Processor
    batch_size: int = 8
    num_workers: int = 0

    def fill(self, chunk: Chunk) -> None:
        """Encode a chunk, unless another process has written it in the meantime: its bytes would be the same."""
        if not self.cache.has(chunk):
            self.cache.write(chunk, self._encode(chunk.paths))

    def check_shared_memory(self, *, flag: str) -> None:
        """Refuse more workers than /dev/shm has space for; `flag` sets their number.

        Raises:
            SharedMemoryError: it has less space.
        """
        size = self.processor.image_processor.size
        batch_bytes = self.batch_size * 3 * size["height"] * size["width"] * 4
        num_batches = self.num_workers * PREFETCH_FACTOR + 2  # one that is encoded, and the next
        needed = num_batches * batch_bytes + self.num_workers * SEMAPHORE_BYTES
        if self.num_workers:
            check_free(needed * int(os.environ.get("LOCAL_WORLD_SIZE", 1)), flag=flag)

    @torch.no_grad()
    def _encode(self, paths: Sequence[str]) -> torch.Tensor:
        loader = DataLoader(
            list(paths),
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            collate_fn=functools.partial(_read_batch, self.processor),
        )
        device = vision_parameters(self.model)[0][1].device
        parts = []
        with torch.autocast(device.type, enabled=False):
            for batch in loader:
                pixels = batch["pixel_values"].to(device, self.model.dtype)
                parts.append(encode_pictures(self.model.model, pixels).cpu())
        return torch.cat(parts)


def _read_batch(processor: Gemma3Processor, paths: Sequence[str]) -> dict[str, torch.Tensor]:
    return share({"pixel_values": read_pictures(processor, paths)})


def load_encoder(
    base: str,
    folder: Path,
    *,
    image_size: int | None = None,
    dtype: Dtype,
    batch_size: int,
    num_workers: int,
    num_threads: int,
) -> Encoder:
    """Return an encoder on this process's device, with the cache of `folder`.

    Args:
        num_threads: on a CPU; another number gives other sums, and so other bytes.

    Raises:
        PokegemmaError: the model is not a Gemma 3, or the cache is another model's.
    """
    torch.set_num_threads(num_threads)
    checkpoint = open_checkpoint(base, image_size)
    require_exact(checkpoint.config, "--vision_features")
    model = checkpoint.load_model(dtype=dtype, device=default_device())
    cache = open_cache(folder, feature_key(model, checkpoint.processor))
    return Encoder(cache, model, checkpoint.processor, batch_size, num_workers)


def _find_work(cache: FeatureCache, paths: Iterable[str], *, progress: bool = True) -> list[Chunk]:
    """Read which pictures `paths` are, and return those without features in chunks."""
    cache.digests = hash_frames((os.path.normpath(path) for path in paths), progress=progress)
    chunks = cache.missing_chunks()
    if chunks and progress:
        number = sum(len(chunk.paths) for chunk in chunks)
        size_gib = number * cache.bytes_per_frame / GIB
        logger.info("%d pictures to encode into %s: %.2f GiB", number, cache.folder, size_gib)
    return chunks


def fill_cache(
    examples: Iterable[Example],
    load: Callable[[], Encoder],
    *,
    layout: Layout,
    num_workers: int,
    ray_address: str | None,
    folders: Iterable[Path],
) -> FeatureCache:
    """Encode every distinct picture that a layout shows of samples, and return the filled cache.

    Args:
        examples: with absolute paths.
        load: returns an encoder; each worker of a Ray cluster calls it.
        num_workers: workers of a Ray cluster, 0 for one on each GPU (or CPU); without Ray this process encodes.
        folders: folders that the machines of a Ray cluster must share, besides the cache's.

    Raises:
        PokegemmaError: a picture cannot be read, or the cluster cannot be used.
    """
    encoder = load()
    collator = Gemma3Collator(processor=encoder.processor, layout=layout, dataset_folder=Path())
    chunks = _find_work(encoder.cache, (path for example in examples for path in collator.picture_paths(example)))
    if chunks:
        encoder.check_shared_memory(flag="--num_workers")
    for _ in map_items(
        _fill_chunk,
        chunks,
        num_workers=num_workers if ray_address else 1,
        initialize=load if ray_address else lambda: encoder,
        ray_address=ray_address,
        num_gpus=int(torch.cuda.is_available()),
        folders=sorted({encoder.cache.folder, *folders}),
        label="encode frames",
        unit="chunk",
    ):
        pass
    return encoder.cache


def _fill_chunk(chunk: Chunk, encoder: Encoder) -> None:
    encoder.fill(chunk)


def prepare_cache(
    folder: Path,
    model: Gemma3ForConditionalGeneration,
    processor: Gemma3Processor,
    paths: Iterable[str],
    *,
    device: torch.device,
    batch_size: int = 8,
    num_workers: int = 0,
) -> FeatureCache:
    """Return a cache that contains all of `paths`; the processes of a run share the work and wait for each other.

    Work that was interrupted continues with the next call. Only tower and projector are moved to `device`, while they
    encode: the whole model may not fit.

    Raises:
        PokegemmaError: see `open_cache` and `hash_frames`.
    """
    state = PartialState()
    cache = open_cache(folder, feature_key(model, processor))
    chunks = _find_work(cache, paths, progress=state.is_main_process)
    state.wait_for_everyone()  # every process must have the same list of chunks before one of them writes a chunk
    own_chunks = chunks[state.process_index :: state.num_processes]
    encoder = Encoder(cache, model, processor, batch_size, num_workers)
    if chunks:
        encoder.check_shared_memory(flag="--dataloader_num_workers")
    parts, before = [getattr(model.model, part) for part in (TOWER, PROJECTOR)], model.device
    for part in parts:
        part.to(device)
    with gathered(weight for _, weight in vision_parameters(model)):
        for chunk in tqdm(own_chunks, desc="encode frames", unit="chunk", disable=not own_chunks):
            encoder.fill(chunk)
    for part in parts:
        part.to(before)
    state.wait_for_everyone()
    cache.refresh()
    missing = cache.missing_chunks()
    if missing:
        raise PokegemmaError(f"{folder}: {len(missing)} chunks of features are missing; run it again")
    return cache
