"""Read packed trajectories: each battle is a few views of memory-mapped columns. Unpack them."""

import bisect
import hashlib
import itertools
import json
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from pokegemma.battles.trajectories.files import decode_json_text
from pokegemma.battles.trajectories.packing import PACK_FILE, read_metadata
from pokegemma.battles.trajectories.records import BattleTrajectory
from pokegemma.errors import PokegemmaError
from pokegemma.outputs import atomic_file

_DTYPES = {"U8": np.uint8, "U16": np.uint16, "I8": np.int8, "I64": np.int64, "F32": np.float32, "BOOL": np.bool_}


@dataclass(frozen=True)
class PackedBattle:
    """A battle of T states. All but `words` are read-only views of a file.

    words (T, 87) int32, places in `PackedTrajectories.words`, 0 is the pad; numbers (T, 48) float32; actions (T,) int8,
    the last is the filler -1; legal (T, 13) bool; rewards (T - 1, 3) float32, in the order of `REWARDS`.
    """

    words: np.ndarray
    numbers: np.ndarray
    actions: np.ndarray
    legal: np.ndarray
    rewards: np.ndarray


class PackedTrajectories:
    """The battles in a folder that `pack_trajectories` wrote, by number, in the order of the files' names.

    Nothing is read before it is asked for, and no list of battles is kept: a copy in a worker costs no memory.

    Attributes:
        words: all words of the texts; the first is the pad.

    Raises:
        PokegemmaError: the folder was not packed, or not to the end.

    Example:
        >>> battles = PackedTrajectories(Path("outputs/packed"))
        >>> battles[0].numbers.shape
        (32, 48)
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            record = json.loads((folder / PACK_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise PokegemmaError(f"{folder} is not a folder of packed trajectories ({error})") from error
        if not record.get("complete"):
            raise PokegemmaError(f"{folder}: packing was interrupted; repeat scripts/battles_pack.py")
        self.words: list[str] = record["words"]
        self._names = [shard["name"] for shard in record["shards"]]
        self._starts = [0, *itertools.accumulate(shard["num_battles"] for shard in record["shards"])]
        self._open: dict[int, _Shard] = {}

    def __len__(self) -> int:
        return self._starts[-1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}  # each process maps the files itself

    def __getitem__(self, index: int) -> PackedBattle:
        shard, place = self._find(index)
        return shard.read(place)

    def name(self, index: int) -> str:
        """Return the path of a battle's file, FORMAT/NAME.json.lz4."""
        shard, place = self._find(index)
        return shard.slice("names", "name_ends", place).tobytes().decode()

    def content(self, index: int) -> bytes:
        """Return the bytes of a battle's file."""
        shard, place = self._find(index)
        return shard.slice("files", "file_ends", place).tobytes()

    def digest(self) -> str:
        """Return a hash of the names and bytes of all files that were packed."""
        digest = hashlib.sha256()
        for name in self._names:
            with safe_open(self.folder / name, framework="np") as file:
                digest.update(read_metadata(file.metadata())[0].encode())
        return digest.hexdigest()

    def trajectory(self, index: int) -> BattleTrajectory:
        """Return a battle's states and actions."""
        return BattleTrajectory.from_json(decode_json_text(self.content(index), self.name(index)))

    def short_texts(self, index: int) -> list[str]:
        """Return the short texts of a battle, one a state."""
        shard, place = self._find(index)
        start, end = shard.bounds("ends", place)
        ends = shard.columns["short_ends"]
        starts = [int(ends[start - 1]) if start else 0, *ends[start : end - 1].tolist()]
        places = shard.columns["short"]
        return [
            " ".join(shard.words[number] for number in places[first:last].tolist())
            for first, last in zip(starts, ends[start:end].tolist(), strict=True)
        ]

    def _find(self, index: int) -> tuple["_Shard", int]:
        if not 0 <= index < len(self):
            raise IndexError(f"battle {index} of {len(self)}")
        number = bisect.bisect_right(self._starts, index) - 1
        shard = self._open.get(number)
        if shard is None:
            numbers = {word: place for place, word in enumerate(self.words)}
            shard = self._open[number] = _Shard(self.folder / self._names[number], numbers)
        return shard, index - self._starts[number]


class _Shard:
    """A memory-mapped safetensors file (https://github.com/huggingface/safetensors#format)."""

    def __init__(self, path: Path, numbers: dict[str, int]) -> None:
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start = 8 + int.from_bytes(mapped[:8], "little")
        header = json.loads(mapped[8:start])
        _, self.words = read_metadata(header.pop("__metadata__"))
        self.table = np.array([numbers[word] for word in self.words], dtype=np.int32)
        self.columns = {name: _view(mapped, start, entry) for name, entry in header.items()}
        self._of_states = [self.columns[name] for name in ("words", "numbers", "actions", "legal", "rewards")]

    def bounds(self, ends: str, place: int) -> tuple[int, int]:
        column = self.columns[ends]
        return (int(column[place - 1]) if place else 0), int(column[place])

    def slice(self, column: str, ends: str, place: int) -> np.ndarray:
        start, end = self.bounds(ends, place)
        return self.columns[column][start:end]

    def read(self, place: int) -> PackedBattle:
        start, end = self.bounds("ends", place)
        words, numbers, actions, legal, rewards = self._of_states
        return PackedBattle(
            self.table.take(words[start:end]),
            numbers[start:end],
            actions[start:end],
            legal[start:end],
            rewards[start : end - 1],
        )


def _view(mapped: mmap.mmap, start: int, entry: dict[str, Any]) -> np.ndarray:
    begin, end = entry["data_offsets"]
    dtype = np.dtype(_DTYPES[entry["dtype"]])
    count = (end - begin) // dtype.itemsize
    return np.frombuffer(mapped, dtype, count, start + begin).reshape(entry["shape"])


def unpack_trajectories(folder: Path, output: Path) -> int:
    """Write the files that were packed, byte for byte, at their paths in OUTPUT; return how many.

    Raises:
        PokegemmaError: `folder` was not packed to the end, or `output` contains files.
    """
    battles = PackedTrajectories(folder)
    if output.exists() and any(output.iterdir()):
        raise PokegemmaError(f"{output} exists; choose another folder")
    for index in range(len(battles)):
        with atomic_file(output / battles.name(index)) as temporary:
            temporary.write_bytes(battles.content(index))
    return len(battles)
