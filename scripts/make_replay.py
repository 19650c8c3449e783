"""Write replays of recorded sessions as HTML pages: screens, presses, mistakes, and where the player was stuck.

python scripts/make_replay.py --sessions_path outputs/play --output_file outputs/replay.html

Arrow keys go from turn to turn. More than 2,000 turns become a page for each session, with OUTPUT_FILE as their index.
"""

from dataclasses import dataclass
from pathlib import Path

from pokegemma.cli import parse_options, run
from pokegemma.data.recordings.readers import find_recordings
from pokegemma.errors import PokegemmaError
from pokegemma.options import option
from pokegemma.play.replay.pages import write_replay


@dataclass
class ReplayOptions:
    sessions_path: str = option(..., "A recorded session, or a folder with sessions at any depth.")
    output_file: str = option(..., "Page to write, .html.")
    overwrite: bool = option(False, "Replace an existing OUTPUT_FILE.")

    def __post_init__(self) -> None:
        if not Path(self.sessions_path).is_dir():
            raise PokegemmaError(f"--sessions_path {self.sessions_path}: no such folder")
        if Path(self.output_file).suffix != ".html":
            raise PokegemmaError(f"--output_file {self.output_file}: name a file that ends in .html")
        if Path(self.output_file).exists() and not self.overwrite:
            raise PokegemmaError(f"--output_file {self.output_file} exists; add --overwrite to replace it")


def main() -> None:
    (options,) = parse_options(ReplayOptions, description=__doc__)
    for path in write_replay(find_recordings(Path(options.sessions_path)), Path(options.output_file)):
        print(path)


if __name__ == "__main__":
    run(main)
