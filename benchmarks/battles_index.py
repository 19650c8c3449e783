"""Measure the memory of four million names of trajectory files, and how much of it a worker's task takes along.

    python benchmarks/battles_index.py --num_names 4000000

The names are made up, 68 bytes long with folder and extension as metamon's are, and in no order. list: what a list of
paths takes, as Python makes it; measured with fewer names, since it takes gigabytes. index: `TrajectoryFiles`. Bytes a
name are what tracemalloc counts, at the end and at most on the way.
"""

import itertools
import json
import pickle
import platform
import random
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pokegemma.battles.trajectories.files import TrajectoryFiles, index_names
from pokegemma.cli import parse_options, run
from pokegemma.errors import check_ranges
from pokegemma.options import option
from pokegemma.provenance import git_commit
from pokegemma.tables import format_table

_NAMES_IN_LIST = 200_000
_FOLDER = Path("trajectories")


@dataclass(frozen=True)
class IndexOptions:
    num_names: int = option(4_000_000, "Names.")
    json: bool = option(False, "Print JSON instead of a table.")

    def __post_init__(self) -> None:
        check_ranges(self, "num_names", at_least=1)


def make_names(num_names: int) -> Iterator[bytes]:
    """Yield made-up names, all of one length, without keeping them."""
    draw = random.Random(0)
    for number in range(num_names):
        battle = (number * 7_919) % num_names  # each once, in no order
        rating, user = draw.randrange(1000, 2000), draw.randrange(10_000)
        yield b"gen1ou/gen1ou-%010d_%d_u%04d_vs_v%04d_11-29-2026_WIN.json.lz4" % (battle, rating, user, user)


def measure(make: Callable[[], Any], num_names: int) -> dict[str, float]:
    """Return bytes a name of what `make` returns, at the end and at most, and names a second."""
    tracemalloc.start()
    made = make()
    end, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(made) == num_names
    start = time.process_time()
    del made
    make()
    return {
        "end": end / num_names,
        "most": most / num_names,
        "names_a_cpu_s": num_names / (time.process_time() - start),
    }


def main() -> None:
    (options,) = parse_options(IndexOptions, description=__doc__)
    longest = len(next(make_names(1)))

    def make_index() -> TrajectoryFiles:
        return TrajectoryFiles(_FOLDER, index_names(make_names(options.num_names), options.num_names, longest))

    few = min(_NAMES_IN_LIST, options.num_names)
    found = {
        "list": measure(lambda: sorted(_FOLDER / name.decode() for name in make_names(few)), few),
        "index": measure(make_index, options.num_names),
    }
    files = make_index()
    taken = len(pickle.dumps(files[: min(64, len(files))])) / min(64, len(files))
    ordered = all(first <= second for first, second in itertools.pairwise(files._names[:100_000].tolist()))
    record = {"machine": platform.platform(), "commit": git_commit(), "ways": found, "bytes_a_name_in_a_task": taken}
    assert ordered
    if options.json:
        print(json.dumps(record, indent=2))
        return
    rows = [("way", "bytes a name", "at most", "names a CPU second")]
    rows += [
        (name, *(f"{facts[key]:,.0f}" for key in ("end", "most", "names_a_cpu_s"))) for name, facts in found.items()
    ]
    print(format_table(rows))
    print(f"{options.num_names:,} names; a task of 64 takes {taken:.0f} bytes a name along")
    print(f"{record['machine']}, commit {record['commit']}")


if __name__ == "__main__":
    run(main)
