"""A cache on disk of what the frozen vision tower makes of each frame: encoded once, memory-mapped ever after.

    DIR/key.json                     what the features depend on
    DIR/chunks/<name>.safetensors    `features` (frames, tokens, width), and the SHA-256 of each frame's file

A frame costs tokens x width x bytes of a number: 1.25 MiB for google/gemma-3-4b-it in bfloat16, 0.31 MiB at 448 px.
"""

import functools
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import Gemma3ForConditionalGeneration, Gemma3Processor
from transformers.integrations import is_deepspeed_zero3_enabled

from pokegemma.errors import PokegemmaError
from pokegemma.outputs import atomic_file
from pokegemma.training.families import require_exact
from pokegemma.training.models import Dtype, default_device, load_config, load_model, load_processor
from pokegemma.training.pictures import read_pictures
from pokegemma.training.vision import PROJECTOR, TOWER, encode_pictures

logger = logging.getLogger(__name__)

FRAMES_PER_CHUNK = 128
"""The unit of work that a killed precompute loses at most, and that workers share out."""

_KEY_FILE, _CHUNKS, _TENSOR = "key.json", "chunks", "features"
_NUM_HASHING_THREADS = 8
_NUM_OPEN_CHUNKS = 256


def _vision_parameters(model: Gemma3ForConditionalGeneration) -> list[tuple[str, torch.nn.Parameter]]:
    parts = ((part, getattr(model.model, part)) for part in (TOWER, PROJECTOR))
    return [(f"{part}.{name}", weight) for part, module in parts for name, weight in module.named_parameters()]


def _gathered(model: Gemma3ForConditionalGeneration) -> AbstractContextManager:
    """Return a context in which tower and projector are whole, also where ZeRO-3 has cut them into shards."""
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([weight for _, weight in _vision_parameters(model)])


def feature_key(model: Gemma3ForConditionalGeneration, processor: Gemma3Processor) -> dict[str, Any]:
    """Return what soft tokens depend on: every weight of tower and projector, type, size, processor settings."""
    digest = hashlib.sha256()
    with _gathered(model):
        for name, weight in sorted(_vision_parameters(model), key=lambda pair: pair[0]):
            digest.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode())
            digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    settings = processor.image_processor.to_dict()
    names = ("do_resize", "size", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
    return {
        "weights": digest.hexdigest(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "image_size": model.config.vision_config.image_size,
        "tokens": processor.image_seq_length,
        "width": model.config.get_text_config().hidden_size,
        "processor": json.loads(json.dumps({name: settings.get(name) for name in names})),
    }


@dataclass(frozen=True)
class Chunk:
    """Frames that are encoded together: the SHA-256 of each one's file, and a path to it."""

    digests: tuple[str, ...]
    paths: tuple[str, ...]

    @property
    def name(self) -> str:
        return hashlib.sha256("".join(self.digests).encode()).hexdigest()[:32]


@dataclass
class FeatureCache:
    """The features of one model in a folder; see `open_cache` and `fill_cache`.

    `digests`: the SHA-256 of each known frame's file, by path. It goes to the workers of a DataLoader by value.
    """

    folder: Path
    key: dict[str, Any]
    digests: dict[str, str] = field(default_factory=dict)
    _places: dict[str, tuple[str, int]] = field(default_factory=dict)  # by digest: chunk and row

    @property
    def bytes_per_frame(self) -> int:
        return self.key["tokens"] * self.key["width"] * getattr(torch, self.key["dtype"]).itemsize

    def refresh(self) -> None:
        """Read which frames the chunks on disk hold.

        Raises:
            PokegemmaError: a chunk is damaged.
        """
        known = {chunk for chunk, _ in self._places.values()}
        for path in sorted((self.folder / _CHUNKS).glob("*.safetensors")):
            if path.stem in known:
                continue
            try:
                with safe_open(path, framework="pt") as chunk:
                    digests, shape = chunk.metadata()["frames"].split(), chunk.get_slice(_TENSOR).get_shape()
            except (OSError, SafetensorError, KeyError, TypeError) as error:
                raise PokegemmaError(f"{path} is damaged ({error}); delete it, and it is made again") from error
            if shape != [len(digests), self.key["tokens"], self.key["width"]]:
                raise PokegemmaError(f"{path} is damaged (shape {shape}); delete it, and it is made again")
            self._places |= {digest: (path.stem, row) for row, digest in enumerate(digests)}

    def missing_chunks(self) -> list[Chunk]:
        """Return the frames without features in chunks: the same for every process that asks."""
        paths = {digest: path for path, digest in sorted(self.digests.items(), reverse=True)}
        missing = sorted(digest for digest in paths if digest not in self._places)
        parts = (missing[start : start + FRAMES_PER_CHUNK] for start in range(0, len(missing), FRAMES_PER_CHUNK))
        return [Chunk(tuple(part), tuple(paths[digest] for digest in part)) for part in parts]

    def has(self, chunk: Chunk) -> bool:
        return self._chunk_path(chunk.name).is_file()

    def write(self, chunk: Chunk, features: torch.Tensor) -> None:
        """Write the features (frames, tokens, width) of a chunk; several processes may write the same one."""
        with atomic_file(self._chunk_path(chunk.name)) as temporary:
            save_file({_TENSOR: features.contiguous()}, temporary, metadata={"frames": " ".join(chunk.digests)})

    def read(self, paths: Sequence[str]) -> torch.Tensor:
        """Return the features (pictures, tokens, width) of frames.

        Raises:
            PokegemmaError: one is not in the cache.
        """
        rows = []
        for path in paths:
            place = self._places.get(self.digests.get(path, ""))
            if place is None:
                raise PokegemmaError(f"{path} is not in the feature cache {self.folder}")
            rows.append(_open_chunk(self._chunk_path(place[0])).get_slice(_TENSOR)[place[1]])
        return torch.stack(rows)

    def _chunk_path(self, name: str) -> Path:
        return self.folder / _CHUNKS / f"{name}.safetensors"


@functools.lru_cache(maxsize=_NUM_OPEN_CHUNKS)
def _open_chunk(path: Path) -> Any:
    return safe_open(path, framework="pt")  # maps the file: what is not read takes no memory


def open_cache(folder: Path, key: dict[str, Any]) -> FeatureCache:
    """Return the cache in `folder`, made if there is none.

    Raises:
        PokegemmaError: it was made with another model, size or processor, or the folder holds something else.
    """
    path = folder / _KEY_FILE
    try:
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            different = [name for name in key if found.get(name) != key[name]]
            if different:
                raise PokegemmaError(
                    f"--vision_features {folder} is of another model or size ({', '.join(different)} differ from "
                    f"those in {path.name}); name another"
                )
        elif folder.is_dir() and any(entry.name != _CHUNKS and entry.suffix != ".part" for entry in folder.iterdir()):
            raise PokegemmaError(
                f"--vision_features {folder} holds something else (no {_KEY_FILE}); name another folder"
            )
        else:
            (folder / _CHUNKS).mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as temporary:
                temporary.write_text(json.dumps(key, indent=2), encoding="utf-8")
    except (OSError, ValueError) as error:
        raise PokegemmaError(f"--vision_features {folder} cannot be used: {error}") from error
    cache = FeatureCache(folder, key)
    cache.refresh()
    return cache


def hash_frames(paths: Iterable[str], *, progress: bool = True) -> dict[str, str]:
    """Return the SHA-256 of each frame's file, by path: a frame is known by its content, not by its name.

    Raises:
        PokegemmaError: a file cannot be read.
    """

    def digest(path: str) -> str:
        try:
            with open(path, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise PokegemmaError(f"{path} cannot be read as a picture: {error.strerror}") from error

    distinct = sorted(set(paths))
    with ThreadPoolExecutor(_NUM_HASHING_THREADS) as pool:
        results = tqdm(pool.map(digest, distinct), total=len(distinct), desc="hash frames", disable=not progress)
        return dict(zip(distinct, results, strict=True))


@dataclass(frozen=True)
class Encoder:
    """What turns frames into features and puts them into a cache."""

    cache: FeatureCache
    model: Gemma3ForConditionalGeneration
    processor: Gemma3Processor
    batch_size: int = 8
    num_workers: int = 0

    def fill(self, chunk: Chunk) -> None:
        """Encode a chunk, unless another process has done so since: the same bytes for the same chunk."""
        if not self.cache.has(chunk):
            self.cache.write(chunk, self._encode(chunk.paths))

    @torch.no_grad()
    def _encode(self, paths: Sequence[str]) -> torch.Tensor:
        loader = DataLoader(
            list(paths), batch_size=self.batch_size, num_workers=self.num_workers,
            collate_fn=functools.partial(read_pictures, self.processor),
        )  # fmt: skip
        device = _vision_parameters(self.model)[0][1].device
        parts = []
        with torch.autocast(device.type, enabled=False):
            for pixels in loader:
                parts.append(encode_pictures(self.model.model, pixels.to(device, self.model.dtype)).cpu())
        return torch.cat(parts)


def load_encoder(
    base: str, folder: Path, *, image_size: int | None, dtype: Dtype, batch_size: int, num_workers: int,
    num_threads: int,
) -> Encoder:  # fmt: skip
    """Return an encoder on this process's device, with the cache of `folder`.

    Args:
        num_threads: on a CPU; sums come out differently with another number, and so would the bytes.

    Raises:
        PokegemmaError: the model is none of Gemma 3's, or the cache is another model's.
    """
    torch.set_num_threads(num_threads)
    require_exact(load_config(base), "--vision_features")
    processor = load_processor(base, image_size_px=image_size)
    model = load_model(base, dtype=dtype, device=default_device(), image_size_px=image_size)
    return Encoder(open_cache(folder, feature_key(model, processor)), model, processor, batch_size, num_workers)


def fill_chunk(chunk: Chunk, encoder: Encoder) -> None:
    """Encode a chunk, as work for `workers.map_items`."""
    encoder.fill(chunk)


def describe_work(cache: FeatureCache, chunks: Sequence[Chunk]) -> str:
    """Return how many frames are to be encoded, and what they take on the disk."""
    num_frames = sum(len(chunk.paths) for chunk in chunks)
    return f"{num_frames} frames to encode into {cache.folder}: {num_frames * cache.bytes_per_frame / 2**30:.2f} GiB"


def prepare_cache(
    folder: Path, model: Gemma3ForConditionalGeneration, processor: Gemma3Processor, paths: Iterable[str], *,
    device: torch.device, batch_size: int = 8, num_workers: int = 0,
) -> FeatureCache:  # fmt: skip
    """Return a cache that holds all of `paths`; several processes of one run share the work and wait for each other.

    One that was killed continues with the next call. Only tower and projector go to `device`, for as long as they
    work: the rest may not fit it whole.

    Raises:
        PokegemmaError: see `open_cache` and `hash_frames`.
    """
    state = PartialState()
    cache = open_cache(folder, feature_key(model, processor))
    cache.digests = hash_frames((os.path.normpath(path) for path in paths), progress=state.is_main_process)
    chunks = cache.missing_chunks()
    state.wait_for_everyone()  # all must share out the same chunks, before one of them writes the first
    if chunks and state.is_main_process:
        logger.info("%s", describe_work(cache, chunks))
    mine = chunks[state.process_index :: state.num_processes]
    encoder = Encoder(cache, model, processor, batch_size, num_workers)
    parts, before = [getattr(model.model, part) for part in (TOWER, PROJECTOR)], model.device
    for part in parts:
        part.to(device)
    with _gathered(model):
        for chunk in tqdm(mine, desc="encode frames", unit="chunk", disable=not mine):
            encoder.fill(chunk)
    for part in parts:
        part.to(before)
    state.wait_for_everyone()
    cache.refresh()
    missing = cache.missing_chunks()
    if missing:
        raise PokegemmaError(f"{folder}: {len(missing)} chunks of features are missing; run it again")
    return cache
