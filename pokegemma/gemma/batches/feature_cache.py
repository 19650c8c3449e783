"""A cache on disk of the soft tokens that the frozen vision tower makes of each frame, read by memory mapping.

    DIR/key.json                     all that the features depend on
    DIR/chunks/<name>.safetensors    `features` (frames, tokens, width), and the SHA-256 of each frame's file

A frame costs tokens x width x bytes of a number: 1.25 MiB for google/gemma-3-4b-it in bfloat16, 0.31 MiB at 448 px.
"""

import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from pokegemma.environment import GIB
from pokegemma.errors import PokegemmaError
from pokegemma.outputs import atomic_file

FRAMES_PER_CHUNK = 128
"""The unit of work of a process. A run that is killed loses one chunk of each process at most."""

_KEY_FILE, _CHUNKS, _TENSOR = "key.json", "chunks", "features"
_NUM_HASHING_THREADS = 8
_NUM_OPEN_CHUNKS = 256


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
    """The features of one model in a folder; see `open_cache` and `feature_encoder.prepare_cache`.

    `digests`: the SHA-256 of each known frame's file, by path. The workers of a DataLoader get a copy of it.
    """

    folder: Path
    key: dict[str, Any]
    digests: dict[str, str] = field(default_factory=dict)
    _places: dict[str, tuple[str, int]] = field(default_factory=dict)  # by digest: chunk and row

    @property
    def bytes_per_frame(self) -> int:
        return self.key["tokens"] * self.key["width"] * getattr(torch, self.key["dtype"]).itemsize

    def describe(self) -> str:
        """Return how many pictures the cache contains for the known paths, and their size."""
        number, size = len(set(self.digests.values())), self.bytes_per_frame
        return f"{self.folder}: {number} frames, {size / 2**20:.2f} MiB each, {number * size / GIB:.2f} GiB"

    def refresh(self) -> None:
        """Read which frames the chunks on disk contain.

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
                raise PokegemmaError(f"{path} is damaged ({error}); delete it, and it is written again") from error
            if shape != [len(digests), self.key["tokens"], self.key["width"]]:
                raise PokegemmaError(f"{path} is damaged (shape {shape}); delete it, and it is written again")
            self._places |= {digest: (path.stem, row) for row, digest in enumerate(digests)}

    def missing_chunks(self) -> list[Chunk]:
        """Return the frames without features in chunks; the result is the same in every process."""
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
            PokegemmaError: one is not in the cache, or its chunk cannot be read.
        """
        rows = []
        for path in paths:
            place = self._places.get(self.digests.get(path, ""))
            if place is None:
                raise PokegemmaError(f"{path} is not in the feature cache {self.folder}")
            chunk = self._chunk_path(place[0])
            try:
                rows.append(_open_chunk(chunk).get_slice(_TENSOR)[place[1]])
            except (OSError, SafetensorError) as error:
                raise PokegemmaError(f"{chunk} is damaged or missing ({error}); run again to write it again") from error
        return torch.stack(rows)

    def _chunk_path(self, name: str) -> Path:
        return self.folder / _CHUNKS / f"{name}.safetensors"


@functools.lru_cache(maxsize=_NUM_OPEN_CHUNKS)
def _open_chunk(path: Path) -> Any:
    return safe_open(path, framework="pt")  # maps the file: what is not read takes no memory


def open_cache(folder: Path, key: dict[str, Any]) -> FeatureCache:
    """Return the cache in `folder`, which is created if it does not exist.

    Raises:
        PokegemmaError: the cache is of another model, size or processor, or the folder contains other files.
    """
    path = folder / _KEY_FILE
    try:
        # First, since another process of the run may write the key between the two looks.
        entries = list(folder.iterdir()) if folder.is_dir() else []
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            different = [name for name in key if found.get(name) != key[name]]
            if different:
                raise PokegemmaError(
                    f"--vision_features {folder} is of another model or size ({', '.join(different)} differ from "
                    f"those in {path.name}); choose another folder"
                )
        elif any(entry.name != _CHUNKS and entry.suffix != ".part" for entry in entries):
            raise PokegemmaError(
                f"--vision_features {folder} contains other files (no {_KEY_FILE}); choose another folder"
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
    """Return the SHA-256 of each frame's file, by path: frames are identified by their content, not by their name.

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


def missing_feature_bytes(folder: Path, *, num_frames: int, bytes_per_frame: int) -> int:
    """Return the bytes that a feature cache for `num_frames` will grow by, if its features are all of these frames."""
    written = sum(path.stat().st_size for path in (folder / _CHUNKS).glob("*.safetensors"))
    return max(0, num_frames * bytes_per_frame - written)
