"""Time the reading of packed trajectories against one lz4 JSON file a battle: the same tensors, by turns in one run.

    python benchmarks/battles_reading.py --num_battles 400

json: decompress a file and parse it with `json`, as metamon's loader does; no tensor is made. files: that, and words,
numbers, actions, legal actions and rewards as tensors. packed: the same tensors from `PackedTrajectories`. Rates are
battles a CPU second of this process, medians of the repeats; the tensors of all battles are compared first.
"""

import dataclasses
import json
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pokegemma.battles.trajectories.actions import NUM_ACTIONS, legal_actions
from pokegemma.battles.trajectories.files import (
    TrajectoryName,
    decode_json_text,
    find_trajectory_files,
    write_trajectory,
)
from pokegemma.battles.trajectories.packed import PackedTrajectories
from pokegemma.battles.trajectories.packing import pack_trajectories
from pokegemma.battles.trajectories.records import (
    NO_ACTION,
    BattleTrajectory,
    TrajectoryMove,
    TrajectoryPokemon,
    TrajectoryState,
)
from pokegemma.battles.trajectories.rewards import REWARDS, compute_rewards
from pokegemma.battles.trajectories.texts import list_numbers, list_words
from pokegemma.cli import parse_options, run
from pokegemma.errors import CheckFailedError, check_ranges
from pokegemma.options import option
from pokegemma.provenance import git_commit
from pokegemma.tables import format_table

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class ReadingOptions:
    trajectories_dir: str | None = option(None, "Folder of trajectory files. Default: made-up ones.")
    num_battles: int = option(400, "Made-up battles.")
    num_states: int = option(32, "States of each.")
    repeats: int = option(5, "Runs of each way; medians are printed.")
    json: bool = option(False, "Print JSON instead of a table.")

    def __post_init__(self) -> None:
        check_ranges(self, "num_battles", "repeats", at_least=1)
        check_ranges(self, "num_states", at_least=2)


def make_pokemon(draw: random.Random) -> TrajectoryPokemon:
    """Return a made-up Pokémon with four moves."""
    name = f"species{draw.randrange(150)}"
    moves = tuple(
        TrajectoryMove(f"move{chr(97 + number // 10)}{chr(97 + number % 10)}", "water", "special", 80, 1.0, 0, 20, 24)
        for number in draw.sample(range(100), 4)
    )
    return TrajectoryPokemon(
        name,
        draw.random(),
        "notype water",
        "leftovers",
        "pressure",
        82,
        "nostatus",
        "noeffect",
        moves,
        *[0] * 7,
        *[draw.randrange(20, 150) for _ in range(6)],
        "notype",
        name,
    )


def make_battle(draw: random.Random, num_states: int) -> BattleTrajectory:
    """Return a made-up battle that is won."""
    team = [make_pokemon(draw) for _ in range(6)]
    state = TrajectoryState(
        "gen1ou",
        team[0],
        make_pokemon(draw),
        tuple(team[1:]),
        team[0].moves[0],
        team[1].moves[1],
        6,
        "noconditions",
        "noconditions",
        "noweather",
        "nofield",
        False,
        False,
        False,
        False,
        (),
    )
    states = [
        dataclasses.replace(state, opponent_active_pokemon=make_pokemon(draw), opponents_remaining=draw.randrange(1, 7))
        for _ in range(num_states - 1)
    ]
    actions = [draw.choice(legal_actions(each)) for each in states]
    return BattleTrajectory((*states, dataclasses.replace(state, battle_won=True)), (*actions, NO_ACTION))


def write_battles(folder: Path, *, num_battles: int, num_states: int) -> None:
    """Write made-up battles, each different."""
    for number in range(num_battles):
        name = TrajectoryName(f"made-gen1ou-{number:07d}", "Unrated", "A", "B", "11-29-2026", True)
        write_trajectory(folder, name, make_battle(random.Random(number), num_states))


def read_json(path: Path) -> Any:
    """Return a file's content, parsed as metamon's loader parses it."""
    return json.loads(decode_json_text(path.read_bytes(), path.name).decode())


def read_file(path: Path, numbers: dict[str, int]) -> Tensors:
    """Return a battle's tensors from its file; `numbers` are those of the words."""
    trajectory = BattleTrajectory.from_data(read_json(path))
    states = trajectory.states
    legal = np.zeros((len(states), NUM_ACTIONS), dtype=bool)
    for row, state in zip(legal, states, strict=True):
        row[list(legal_actions(state))] = True
    columns = (
        np.array([[numbers[word] for word in list_words(state)] for state in states], dtype=np.int32),
        np.stack([list_numbers(state) for state in states]),
        np.array(trajectory.actions, dtype=np.int8),
        legal,
        np.stack([compute_rewards(states, reward) for reward in REWARDS.values()], axis=1),
    )
    return tuple(map(torch.from_numpy, columns))


def read_packed(battles: PackedTrajectories, index: int) -> Tensors:
    """Return a battle's tensors, which are copies of what the shard contains."""
    battle = battles[index]
    copies = (battle.words, *(part.copy() for part in (battle.numbers, battle.actions, battle.legal, battle.rewards)))
    return tuple(map(torch.from_numpy, copies))


def rate(read: Callable[[Any], Any], items: Sequence[Any]) -> float:
    """Return items a CPU second of this process."""
    start = time.process_time()
    for item in items:
        read(item)
    return len(items) / (time.process_time() - start)


def measure(folder: Path, packed: Path, *, repeats: int) -> dict[str, list[float]]:
    """Return the rates of each way in each repeat.

    Raises:
        CheckFailedError: the tensors of a battle differ.
    """
    paths = find_trajectory_files(folder)
    pack_trajectories(folder, packed)
    battles = PackedTrajectories(packed)
    numbers = {word: place for place, word in enumerate(battles.words)}
    for index, path in enumerate(paths):
        pairs = zip(read_file(path, numbers), read_packed(battles, index), strict=True)
        if not all(torch.equal(plain, fast) and plain.dtype == fast.dtype for plain, fast in pairs):
            raise CheckFailedError(f"{path.name}: other tensors when packed")
    rates: dict[str, list[float]] = {"json": [], "files": [], "packed": []}
    many = [*range(len(paths))] * 20  # a tenth of a second at least
    for _ in range(repeats):
        rates["json"].append(rate(read_json, paths))
        rates["files"].append(rate(lambda path: read_file(path, numbers), paths))
        rates["packed"].append(rate(lambda index: read_packed(battles, index), many))
    return rates


def main() -> None:
    (options,) = parse_options(ReadingOptions, description=__doc__)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.trajectories_dir or f"{temporary}/files")
        if options.trajectories_dir is None:
            write_battles(folder, num_battles=options.num_battles, num_states=options.num_states)
        rates = measure(folder, Path(temporary) / "packed", repeats=options.repeats)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    record = {"machine": platform.platform(), "commit": git_commit(), "battles_per_cpu_s": medians, "all": rates}
    if options.json:
        print(json.dumps(record, indent=2))
        return
    rows = [("way", "battles a CPU second", "times the files")]
    rows += [(name, f"{value:,.0f}", f"{value / medians['files']:.1f}") for name, value in medians.items()]
    print(format_table(rows))
    print(f"{record['machine']}, commit {record['commit']}")


if __name__ == "__main__":
    run(main)
