"""Pack trajectory files into shards that are memory-mapped: what a trainer reads is computed once, nothing is lost.

A shard is a safetensors file of B battles with S states in all, in the order of the files:

    words       (S, 87) uint16    the 87 words, as places in the shard's list of words (in its metadata)
    numbers     (S, 48) float32
    short       (W,)    uint16    the words of the short texts, one text after the other, and where each ends:
    short_ends  (S,)    int64
    actions     (S,)    int8      the last of a battle is the filler -1
    legal       (S, 13) bool
    rewards     (S, 3)  float32   in the order of `rewards.REWARDS`; 0 for the last state of a battle
    ends        (B,)    int64     where each battle's states end
    files       (F,)    uint8     the bytes of the files, one after the other, and where each ends:
    file_ends   (B,)    int64
    names       (N,)    uint8     the paths of the files, FORMAT/NAME.json.lz4, and where each ends:
    name_ends   (B,)    int64

OUTPUT/pack.json lists the shards and all words. It is complete only at the end.
"""

import functools
import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pokegemma.battles.trajectories.actions import NUM_ACTIONS, legal_actions
from pokegemma.battles.trajectories.files import decode_json_text, find_trajectory_files
from pokegemma.battles.trajectories.records import NO_ACTION, BattleTrajectory, TrajectoryError
from pokegemma.battles.trajectories.rewards import REWARDS, compute_rewards
from pokegemma.battles.trajectories.short_text import list_short_words
from pokegemma.battles.trajectories.texts import BLANK, MAX_BLANK, NUM_WORDS, list_numbers, list_words
from pokegemma.data.checks.records import percent
from pokegemma.errors import CheckFailedError, PokegemmaError
from pokegemma.outputs import atomic_file, refuse_to_replace, write_synced
from pokegemma.parallel.workers import is_cancelled, map_items

PACK_FILE = "pack.json"
_VERSION = 1
_MAX_WORDS = 2**16


@dataclass(frozen=True)
class EncodedBattle:
    """A battle of T states as a trainer reads it, with words instead of their places in a list.

    words: T lists of 87; short: T lists of any length; numbers (T, 48) float32; actions (T,) int8; legal (T, 13) bool;
    rewards (T - 1, 3) float32, in the order of `REWARDS`.
    """

    words: list[list[str]]
    short: list[list[str]]
    numbers: np.ndarray
    actions: np.ndarray
    legal: np.ndarray
    rewards: np.ndarray


def encode_battle(trajectory: BattleTrajectory) -> EncodedBattle:
    """Return a battle's texts, numbers, actions, legal actions and rewards.

    Raises:
        TrajectoryError: it has fewer than two states, another number of actions, or a state has no text.
    """
    states = trajectory.states
    if len(states) < 2 or len(trajectory.actions) != len(states):
        raise TrajectoryError(f"{len(states)} states, {len(trajectory.actions)} actions: must be as many, at least 2")
    legal = np.zeros((len(states), NUM_ACTIONS), dtype=bool)
    for row, state in zip(legal, states, strict=True):
        row[list(legal_actions(state))] = True
    for index, action in enumerate(trajectory.actions):
        if action != NO_ACTION and not (0 <= action < NUM_ACTIONS and legal[index, action]):
            raise TrajectoryError(f"actions[{index}] is {action}, which is not legal")
    return EncodedBattle(
        words=[list_words(state) for state in states],
        short=[list_short_words(state) for state in states],
        numbers=np.stack([list_numbers(state) for state in states]),
        actions=np.array(trajectory.actions, dtype=np.int8),
        legal=legal,
        rewards=np.stack([compute_rewards(states, reward) for reward in REWARDS.values()], axis=1),
    )


@dataclass(frozen=True)
class _Task:
    paths: Sequence[Path]
    shard: Path


@dataclass(frozen=True)
class _ShardResult:
    problems: tuple[str, ...] = ()
    num_states: int = 0
    num_blank: int = 0
    words: tuple[str, ...] = ()


def pack_trajectories(
    folder: Path, output: Path, *, battles_per_shard: int = 1000, num_workers: int = 1, ray_address: str | None = None
) -> dict[str, Any]:
    """Pack every trajectory file of a folder; return what pack.json contains. The bytes depend on the files only.

    Shards that an earlier call wrote for the same files stay as they are, so that an interrupted call can be repeated.

    Raises:
        PokegemmaError: `folder` contains no trajectories, or `output` is within it or was not created by this.
        CheckFailedError: files are not trajectories (all are named), or their texts are nothing but pads.
    """
    paths = find_trajectory_files(folder)
    _claim(output, folder)
    parts = [paths[start : start + battles_per_shard] for start in range(0, len(paths), battles_per_shard)]
    tasks = [_Task(part, output / f"shard-{index:05d}.safetensors") for index, part in enumerate(parts)]
    found = map_items(
        functools.partial(_pack_shard, folder=folder),
        tasks,
        num_workers=num_workers,
        ray_address=ray_address,
        folders=(folder, output),
        label="packing",
        unit="shard",
    )
    results = list(found)
    if problems := [problem for result in results for problem in result.problems]:
        raise CheckFailedError(f"{len(problems)} of {len(paths)} files cannot be packed: {'; '.join(problems)}")
    num_states, num_blank = (sum(getattr(result, key) for result in results) for key in ("num_states", "num_blank"))
    if num_blank > MAX_BLANK * num_states * NUM_WORDS:
        share = percent(num_blank, num_states * NUM_WORDS)
        raise CheckFailedError(f"{folder}: {share} of all words are pads: there is nothing to learn from")
    words = {word for result in results for word in result.words} - {BLANK}
    record = {
        "version": _VERSION,
        "complete": True,
        "num_battles": len(paths),
        "num_states": num_states,
        "rewards": list(REWARDS),
        "shards": [
            {"name": task.shard.name, "num_battles": len(task.paths), "num_states": result.num_states}
            for task, result in zip(tasks, results, strict=True)
        ],
        "words": [BLANK, *sorted(words)],
    }
    for shard in sorted(output.glob("shard-*.safetensors"))[len(tasks) :]:
        shard.unlink()  # of an earlier call with more files
    write_synced(output / PACK_FILE, json.dumps(record, indent=1).encode())
    return record


def _claim(output: Path, folder: Path) -> None:
    refuse_to_replace(output, folder)
    if output.resolve().is_relative_to(folder.resolve()):
        raise PokegemmaError(f"--output_dir {output} is within the folder of trajectories; choose another folder")
    if output.is_dir() and any(output.iterdir()) and not is_packed(output):
        raise PokegemmaError(
            f"{output} was not created by this script, so it is not overwritten; choose another folder"
        )
    output.mkdir(parents=True, exist_ok=True)
    write_synced(output / PACK_FILE, json.dumps({"version": _VERSION, "complete": False}).encode())


def is_packed(folder: Path) -> bool:
    """Return whether a folder was written by `pack_trajectories`, whole or in part."""
    return (folder / PACK_FILE).is_file()


def _pack_shard(task: _Task, _: None, *, folder: Path) -> _ShardResult:
    contents = [path.read_bytes() for path in task.paths]
    names = [path.relative_to(folder).as_posix() for path in task.paths]
    digest = _digest(names, contents)
    if done := _read_done(task.shard, digest):
        return done
    battles, problems = [], []
    for name, content in zip(names, contents, strict=True):
        try:
            battles.append(encode_battle(BattleTrajectory.from_json(decode_json_text(content, name))))
        except TrajectoryError as error:
            problems.append(f"{name}: {error}")
        if is_cancelled():
            raise KeyboardInterrupt
    if problems:
        return _ShardResult(tuple(problems))
    places: dict[str, int] = {}
    columns = _columns(battles, places) | _blobs("files", "file_ends", contents)
    columns |= _blobs("names", "name_ends", [name.encode() for name in names])
    if len(places) > _MAX_WORDS:
        raise PokegemmaError(f"{task.shard.name}: {len(places)} different words; pack fewer battles in a shard")
    with atomic_file(task.shard) as temporary:
        save_file(columns, temporary, metadata=write_metadata(digest, list(places)))
    return _result_of(columns["words"], list(places))


def write_metadata(digest: str, words: Sequence[str]) -> dict[str, str]:
    """Return a shard's metadata: one entry, because safetensors writes several in another order each time."""
    return {"pack": json.dumps([digest, list(words)])}


def read_metadata(metadata: dict[str, str]) -> tuple[str, list[str]]:
    """Return the digest of a shard's files, and its words."""
    digest, words = json.loads(metadata["pack"])
    return digest, words


def _digest(names: Sequence[str], contents: Sequence[bytes]) -> str:
    digest = hashlib.sha256(f"{_VERSION}".encode())
    for name, content in zip(names, contents, strict=True):
        digest.update(f"{len(name)} {name} {len(content)} ".encode() + content)
    return digest.hexdigest()


def _read_done(shard: Path, digest: str) -> _ShardResult | None:
    if not shard.is_file():
        return None
    try:
        with safe_open(shard, framework="np") as file:
            inputs, words = read_metadata(file.metadata())
            if inputs == digest:
                return _result_of(file.get_tensor("words"), words)
    except SafetensorError:
        return None  # damaged: written again
    return None


def _result_of(words: np.ndarray, names: Sequence[str]) -> _ShardResult:
    blank = names.index(BLANK) if BLANK in names else -1
    return _ShardResult((), len(words), int((words == blank).sum()), tuple(names))


def _columns(battles: Sequence[EncodedBattle], places: dict[str, int]) -> dict[str, np.ndarray]:
    """Return the columns of a shard; `places` gets the words in the order in which they occur."""
    number = lambda words: [places.setdefault(word, len(places)) for word in words]  # noqa: E731
    rows = [number(words) for battle in battles for words in battle.words]
    texts = [number(words) for battle in battles for words in battle.short]
    rewards = [part for battle in battles for part in (battle.rewards, np.zeros((1, len(REWARDS)), np.float32))]
    return {
        "words": np.array(rows, dtype=np.uint16),
        "numbers": np.concatenate([battle.numbers for battle in battles]),
        "short": np.array(list(itertools.chain.from_iterable(texts)), dtype=np.uint16),
        "short_ends": np.cumsum([len(text) for text in texts], dtype=np.int64),
        "actions": np.concatenate([battle.actions for battle in battles]),
        "legal": np.concatenate([battle.legal for battle in battles]),
        "rewards": np.concatenate(rewards),
        "ends": np.cumsum([len(battle.actions) for battle in battles], dtype=np.int64),
    }


def _blobs(name: str, ends: str, contents: Sequence[bytes]) -> dict[str, np.ndarray]:
    return {
        name: np.frombuffer(b"".join(contents), dtype=np.uint8),
        ends: np.cumsum([len(content) for content in contents], dtype=np.int64),
    }
