"""Record the toy game's expert as Eevee v1 sessions.

python scripts/record_toy_game.py --output_dir toy_sessions --num_sessions 120 --num_turns 25 --seed 0
"""

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from pokegemma.cli import parse_options, run
from pokegemma.data.prompts import BUTTONS
from pokegemma.errors import check_range
from pokegemma.options import option
from pokegemma.outputs import atomic_folder
from pokegemma.play.toy.recorder import blind_accuracies, record_sessions
from pokegemma.play.toy.rooms import check_level
from pokegemma.provenance import write_run_record


@dataclass
class RecordOptions:
    output_dir: str = option(..., "Folder to make; the sessions go to OUTPUT_DIR/runs.")
    num_sessions: int = option(120, "Number of sessions.")
    num_turns: int = option(25, "Turns in each session.")
    level: int = option(
        1,
        "1 and 2: the trail starts at the player. 4 and 5: it is painted once and eaten up, and off it an arrow shows "
        "the way back. 6: as 5, and all cells of the trail look alike. 3: nothing shows the way. Rooms of 2, 3, 5 "
        "and 6 are longer.",
    )
    noise: float = option(
        0.0, "Share of the presses to replace by another button; the expert's stays the label (DART)."
    )
    seed: int = option(0, "The same seed gives the same sessions, byte for byte.")
    overwrite: bool = option(False, "Replace OUTPUT_DIR if it exists.")

    def __post_init__(self) -> None:
        check_range("--num_sessions", self.num_sessions, at_least=1, at_most=2000)
        check_range("--num_turns", self.num_turns, at_least=1, at_most=10_000)
        check_level(self.level)
        check_range("--noise", self.noise, at_least=0, at_most=1)
        check_range("--seed", self.seed, at_least=0, at_most=100_000)


def main() -> None:
    (options,) = parse_options(RecordOptions, description=__doc__)
    with atomic_folder(Path(options.output_dir), stage="record", overwrite=options.overwrite) as folder:
        decisions = record_sessions(
            folder,
            num_sessions=options.num_sessions,
            seed=options.seed,
            num_turns=options.num_turns,
            level=options.level,
            noise=options.noise,
        )
        counts = Counter(button for buttons in decisions for button in buttons)
        total = counts.total()
        accuracies = blind_accuracies(decisions) if total else {}
        write_run_record(
            folder, stage="record", options=asdict(options), button_counts=dict(counts), blind_accuracies=accuracies
        )
    num_turns = options.num_sessions * options.num_turns
    print(f"{options.output_dir}/runs: {options.num_sessions} sessions, {num_turns} turns, {total} decisions")
    for button in BUTTONS:
        print(f"  {button:<16}{counts[button]:>6}{counts[button] / max(total, 1):>8.1%}")
    print("accuracy of a guess that sees no picture")
    for name, accuracy in accuracies.items():
        print(f"  {name:<22}{accuracy:>8.1%}")


if __name__ == "__main__":
    run(main)
