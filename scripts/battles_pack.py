"""Pack trajectory files of battles for training: what is read from JSON in minutes is then read in a second.

    python scripts/battles_pack.py --trajectories_dir outputs/trajectories --output_dir outputs/packed
    python scripts/battles_pack.py --trajectories_dir outputs/packed --output_dir outputs/again --unpack

Writes shards that are memory-mapped, with the files' own bytes in them, and pack.json. A call that was interrupted is
repeated: shards that are complete stay. scripts/battles_check.py checks the result.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from pokegemma.cli import parse_options, run
from pokegemma.environment import usable_cores
from pokegemma.errors import check_range, check_ranges
from pokegemma.options import option


@dataclass
class BattlesPackOptions:
    trajectories_dir: str = option(..., "Folder of trajectory files; with --unpack, of packed trajectories.")
    output_dir: str = option(..., "Folder to write.")
    battles_per_shard: int = option(1000, "Battles in a shard: what one worker does at once.")
    unpack: bool = option(False, "Write the files that were packed.")
    num_workers: int = option(0, "Processes. 0: one for each core.")
    ray_address: str | None = option(
        None, "Pack on a Ray cluster whose machines share both folders: host:port, ray://host:port, auto, or local."
    )
    json: bool = option(False, "Print JSON instead of a line.")

    def __post_init__(self) -> None:
        check_range("--battles_per_shard", self.battles_per_shard, at_least=1, at_most=100_000)
        check_ranges(self, "num_workers", at_least=0)


def main() -> None:
    (options,) = parse_options(BattlesPackOptions, description=__doc__)
    from pokegemma.battles.trajectories.packed import unpack_trajectories
    from pokegemma.battles.trajectories.packing import pack_trajectories

    folder, output = Path(options.trajectories_dir), Path(options.output_dir)
    if options.unpack:
        counts = {"battles": unpack_trajectories(folder, output)}
    else:
        record = pack_trajectories(
            folder,
            output,
            battles_per_shard=options.battles_per_shard,
            num_workers=options.num_workers or (usable_cores() if options.ray_address in (None, "local") else 0),
            ray_address=options.ray_address,
        )
        counts = {"battles": record["num_battles"], "states": record["num_states"], "shards": len(record["shards"])}
    if options.json:
        print(json.dumps({"output_dir": str(output), **counts}))
    else:
        print(f"{output}: {', '.join(f'{count} {name}' for name, count in counts.items())}")


if __name__ == "__main__":
    run(main)
