"""Build a room of the toy game as a ROM for the Game Boy Advance; it is free to use and to share.

python scripts/build_toy_rom.py --seed 1 --level 1 --output_file toy.gba
"""

from dataclasses import dataclass
from pathlib import Path

from pokegemma.cli import parse_options, run
from pokegemma.errors import PokegemmaError
from pokegemma.options import option
from pokegemma.outputs import atomic_file
from pokegemma.play.rom.build import build_rom
from pokegemma.play.toy.rooms import check_level


@dataclass
class RomOptions:
    output_file: str = option(..., "ROM to write; the name ends in .gba.")
    seed: int = option(0, "Room to build, the same as the toy game's room of this seed.")
    level: int = option(1, "Level of the room, as for the toy game.")
    overwrite: bool = option(False, "Replace OUTPUT_FILE if it exists.")

    def __post_init__(self) -> None:
        check_level(self.level)
        if Path(self.output_file).suffix != ".gba":
            raise PokegemmaError(
                f"--output_file {self.output_file}: the name must end in .gba, or no emulator opens it"
            )
        if Path(self.output_file).exists() and not self.overwrite:
            raise PokegemmaError(f"--output_file {self.output_file} exists; choose another, or add --overwrite")


def main() -> None:
    (options,) = parse_options(RomOptions, description=__doc__)
    rom = build_rom(options.seed, options.level)
    path = Path(options.output_file)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        temporary.write_bytes(rom)
    print(f"{path}: room {options.seed} of level {options.level}, {len(rom) / 2**20:.2f} MiB")


if __name__ == "__main__":
    run(main)
