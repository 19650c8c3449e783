"""Trajectory files: metamon's names, JSON in LZ4 frames or plain, written whole or not at all.

A file is FOLDER/FORMAT/NAME.json.lz4 (or .json). NAME has exactly seven parts between underscores, because metamon
skips any other file without a message:

    metamon-gen1ou-1234567890_Unrated_MM-0042_vs_Heuristic_11-29-2026-23:25:00_WIN
"""

import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import overload

import numpy as np

from pokegemma.battles.trajectories.records import BattleTrajectory, TrajectoryError
from pokegemma.errors import PokegemmaError
from pokegemma.outputs import RUN_FILE, atomic_file

try:
    import lz4.frame
except ImportError as error:
    raise PokegemmaError(f"battles need {error.name}: ./init.sh --with battles") from error

COMPRESSED, PLAIN = ".json.lz4", ".json"
UNRATED_POINTS = 1000
"""The rating that metamon takes for a name whose rating is not an integer."""

_DATE, _DATE_TIME = "%m-%d-%Y", "%m-%d-%Y-%H:%M:%S"
_RESULTS = {"WIN": True, "LOSS": False}
_NOT_IN_FORMAT = re.compile(r"[\[\] ]")


@dataclass(frozen=True)
class TrajectoryName:
    """The name of a trajectory's file, without the extension.

    `battle_id` contains the format; `rating` is an integer or a word such as "Unrated"; `date` is MM-DD-YYYY or
    MM-DD-YYYY-HH:MM:SS. A tie counts as a loss: metamon's names have no third result.

    Raises:
        TrajectoryError: a part is empty, contains an underscore, a slash or a control character, or is not a date.
    """

    battle_id: str
    rating: str
    player: str
    opponent: str
    date: str
    won: bool

    def __post_init__(self) -> None:
        for part in ("battle_id", "rating", "player", "opponent", "date"):
            value = getattr(self, part)
            if not value or re.search(r"[_/\x00-\x1f]", value):
                raise TrajectoryError(f"{part} {value!r}: must not be empty or contain '_', '/' or control characters")
        self.played_at  # noqa: B018 (raises)

    @classmethod
    def parse(cls, name: str) -> "TrajectoryName":
        """Return the parts of a name, with or without extension.

        Raises:
            TrajectoryError: it does not have seven parts, or one of them is wrong.
        """
        parts = strip_extension(name).split("_")
        if len(parts) != 7:
            raise TrajectoryError(f"{len(parts)} parts between underscores instead of 7")
        battle_id, rating, player, versus, opponent, date, result = parts
        if versus != "vs":
            raise TrajectoryError(f"part 4 is {versus!r} instead of 'vs'")
        if result not in _RESULTS:
            raise TrajectoryError(f"part 7 is {result!r} instead of WIN or LOSS")
        return cls(battle_id, rating, player, opponent, date, _RESULTS[result])

    def __str__(self) -> str:
        result = "WIN" if self.won else "LOSS"
        return "_".join((self.battle_id, self.rating, self.player, "vs", self.opponent, self.date, result))

    @property
    def played_at(self) -> datetime:
        """The time of the battle; midnight where the name has a date only."""
        for pattern in (_DATE, _DATE_TIME):
            try:
                return datetime.strptime(self.date, pattern)
            except ValueError:
                continue
        raise TrajectoryError(f"date {self.date!r}: must be MM-DD-YYYY or MM-DD-YYYY-HH:MM:SS")

    @property
    def rating_points(self) -> int:
        """The rating as metamon's filters take it."""
        try:
            return int(self.rating)
        except ValueError:
            return UNRATED_POINTS

    def is_of_format(self, battle_format: str) -> bool:
        """Return whether metamon finds the file in the folder of a format."""
        return battle_format in _NOT_IN_FORMAT.sub("", self.battle_id).lower()


def format_date(moment: datetime) -> str:
    """Return a time as a part of a name."""
    return moment.strftime(_DATE_TIME)


def format_of(path: str) -> str:
    """Return the format of a file by its folder: of FORMAT/NAME or RECORDING/FORMAT/NAME."""
    return PurePosixPath(path).parent.name


def name_of(path: str) -> TrajectoryName:
    """Return the parts of a file's name, of FORMAT/NAME or RECORDING/FORMAT/NAME.

    Raises:
        TrajectoryError: as `TrajectoryName.parse`.
    """
    return TrajectoryName.parse(PurePosixPath(path).name)


def strip_extension(name: str) -> str:
    """Return the name of a trajectory's file without .json.lz4 or .json."""
    for extension in (COMPRESSED, PLAIN):
        if name.endswith(extension):
            return name.removesuffix(extension)
    return name


class TrajectoryFiles(Sequence[Path]):
    """The trajectory files of a folder, sorted: FOLDER/FORMAT/NAME.json.lz4 and .json, or FOLDER/RECORDING/FORMAT/NAME.

    The names are one array, because four million paths of Python's take gigabytes and are copied into every worker. A
    slice is a view of it; what a worker gets are the names of its slice.
    """

    def __init__(self, folder: Path, names: np.ndarray) -> None:
        """Take the paths in the folder, (N,) bytes, such as FORMAT/NAME.json.lz4."""
        self.folder = folder
        self._names = names

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, index: int) -> Path: ...

    @overload
    def __getitem__(self, index: slice) -> "TrajectoryFiles": ...

    def __getitem__(self, index: int | slice) -> "Path | TrajectoryFiles":
        if isinstance(index, slice):
            return TrajectoryFiles(self.folder, self._names[index])
        return self.folder / os.fsdecode(self._names[index])


def find_trajectory_files(folder: Path) -> TrajectoryFiles:
    """Return the .json.lz4 and .json files in the folders of formats (FOLDER/FORMAT/NAME).

    A folder within `folder` that has no such files is a recording of its own: its folders of formats are read, too.

    Raises:
        PokegemmaError: `folder` does not exist, or contains no such file.
    """
    if not folder.is_dir():
        raise PokegemmaError(f"{folder} is not a folder of trajectories")
    num_names = longest = 0
    for name in _scan_names(folder):
        num_names, longest = num_names + 1, max(longest, len(name))
    if not num_names:
        raise PokegemmaError(f"{folder} contains no FORMAT/*.json.lz4 or FORMAT/*.json")
    return TrajectoryFiles(folder, index_names(_scan_names(folder), num_names, longest))


def index_names(names: Iterable[bytes], num_names: int, longest: int) -> np.ndarray:
    """Return names sorted, (num_names,) bytes of `longest` each; fewer where files were removed meanwhile."""
    array = np.zeros(num_names, dtype=f"S{longest}")
    num_found = 0
    for num_found, name in enumerate(itertools.islice(names, num_names), 1):
        array[num_found - 1] = name
    array = array[:num_found]
    array.sort()
    return array


def _scan_names(folder: Path, start: str = "") -> Iterator[bytes]:
    for each in sorted(folder.iterdir()):
        if not each.is_dir():
            continue
        prefix, is_format = f"{start}{each.name}/", False
        for name in _scan_files(each):
            is_format = True
            yield os.fsencode(prefix + name)
        if not is_format and not start:
            yield from _scan_names(each, prefix)


def _scan_files(folder: Path) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith((COMPRESSED, PLAIN)) and not entry.name.startswith(".") and entry.name != RUN_FILE:
                yield entry.name


def read_trajectory(path: Path) -> BattleTrajectory:
    """Return the trajectory in a .json.lz4 or .json file.

    Raises:
        TrajectoryError: the file is damaged, or not a trajectory.
        OSError: it cannot be read.
    """
    return BattleTrajectory.from_json(decode_json_text(path.read_bytes(), path.name))


def decode_json_text(content: bytes, name: str) -> bytes:
    """Return the JSON text in the content of a file, which is compressed if its name ends in .json.lz4.

    Raises:
        TrajectoryError: the content is not a whole LZ4 frame.
    """
    if not name.endswith(COMPRESSED):
        return content
    try:
        return lz4.frame.decompress(content)
    except RuntimeError as error:
        raise TrajectoryError(f"not a whole LZ4 frame: {error}") from error


def write_trajectory(folder: Path, name: TrajectoryName, trajectory: BattleTrajectory) -> Path:
    """Write FOLDER/FORMAT/NAME.json.lz4, with a checksum, replacing a file of this name; return its path.

    Raises:
        TrajectoryError: the trajectory has no state, or metamon would not find the name in the folder of its format.
        OSError: the file cannot be written.
    """
    if not trajectory.states:
        raise TrajectoryError(f"{name}: a trajectory needs at least one state")
    battle_format = trajectory.states[0].format
    if not battle_format or not name.is_of_format(battle_format):
        raise TrajectoryError(f"{name}: battle_id {name.battle_id!r} does not contain the format {battle_format!r}")
    path = folder / battle_format / f"{name}{COMPRESSED}"
    with atomic_file(path) as temporary:
        temporary.write_bytes(lz4.frame.compress(trajectory.to_json(), content_checksum=True))
    return path
