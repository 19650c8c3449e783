"""Check trajectory files of battles before training on them.

python scripts/battles_check.py --trajectories_dir outputs/trajectories

Takes a folder of FORMAT/NAME.json.lz4, or one that scripts/battles_pack.py wrote. Prints a line for each check, and
every bad file by name: its name's parts, the alignment of states and actions, legality, one terastallization, values,
unknown words and pads. Of packed files it also compares the columns with what the files give. Exit status 1 when a
check fails.
"""

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from pokegemma.cli import parse_options, run
from pokegemma.environment import usable_cores
from pokegemma.errors import check_ranges
from pokegemma.options import option


@dataclass
class BattlesCheckOptions:
    trajectories_dir: str = option(..., "Folder of trajectory files, or of packed trajectories.")
    num_workers: int = option(0, "Processes. 0: one for each core.")
    ray_address: str | None = option(
        None, "Check on a Ray cluster whose machines share the folder: host:port, ray://host:port, auto, or local."
    )
    json: bool = option(False, "Print JSON instead of lines.")

    def __post_init__(self) -> None:
        check_ranges(self, "num_workers", at_least=0)


def main() -> int:
    (options,) = parse_options(BattlesCheckOptions, description=__doc__)
    from pokegemma.battles.trajectories.checks.folders import check_packed, check_trajectories
    from pokegemma.battles.trajectories.packing import is_packed

    folder = Path(options.trajectories_dir)
    num_workers = options.num_workers or (usable_cores() if options.ray_address in (None, "local") else 0)
    check = check_packed if is_packed(folder) else check_trajectories
    checks = check(folder, num_workers=num_workers, ray_address=options.ray_address)
    counts = Counter(each.status for each in checks)
    if options.json:
        print(json.dumps({"failed": counts["FAIL"], "checks": [asdict(each) for each in checks]}, indent=2))
    else:
        for each in checks:
            print(f"{each.status}  {each.name:<10}  {each.summary}", *each.details, sep=f"\n{'':18}")
    return 1 if counts["FAIL"] else 0


if __name__ == "__main__":
    run(main)
