"""Record battles of two players as trajectory files that metamon reads, too.

python scripts/battles_record.py --players heuristic random --num_battles 100 --output_dir outputs/battles

Writes OUTPUT_DIR/FORMAT/NAME.json.lz4, two files a battle, one of each player's view. The same command continues a run
that was interrupted; a larger --num_battles adds battles.
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from pokegemma.cli import parse_options, run
from pokegemma.environment import usable_cores
from pokegemma.errors import CheckFailedError, PokegemmaError, check_range, check_ranges
from pokegemma.options import option


@dataclass
class BattlesRecordOptions:
    output_dir: str = option(..., "Folder of the trajectories.")
    battle_format: str = option("gen1ou", "Format as Pokémon Showdown names it: gen1ou, gen9randombattle.")
    players: list[str] = option(
        ["heuristic", "heuristic"],
        "Two players, as scripts/battles_arena.py takes them: random, max-base-power, heuristic, or NAME=SOURCE, such "
        "as new=outputs/policy@1.0. They change sides after every battle.",
        nargs=2,
    )
    num_battles: int = option(100, "Battles in the folder when the run has ended.")
    seed: int = option(0, "The same seed, players and teams give the same battles.")
    teams_file: str | None = option(
        None,
        "Teams as Showdown's team builder exports them, for formats without random teams. Default: pokegemma's own.",
    )
    max_turns: int = option(1000, "A longer battle ends with neither a winner nor a loser.")
    timeout_s: float | None = option(
        None,
        "Seconds a player may take for a decision; then the strongest legal move is played. With it, a player decides "
        "one after the other, and not for all battles at once. Default: no limit.",
    )
    date: str | None = option(
        None, "Date in the names of the files, MM-DD-YYYY. Default: today, or that of an earlier run."
    )
    concurrency: int = option(64, "Battles at once in a process. The battles do not depend on it.")
    num_workers: int = option(0, "Processes, each with a node process of its own. 0: one for each core.")
    json: bool = option(False, "Print the report as JSON.")

    def __post_init__(self) -> None:
        check_ranges(self, "num_battles", "max_turns", "concurrency", at_least=1)
        check_range("--num_workers", self.num_workers, at_least=0)
        check_range("--timeout_s", self.timeout_s, above=0)
        if self.date is not None and not re.fullmatch(r"\d\d-\d\d-\d{4}", self.date):
            raise PokegemmaError(f"--date {self.date}: must be MM-DD-YYYY")


def main() -> None:
    (options,) = parse_options(BattlesRecordOptions, description=__doc__)
    from pokegemma.battles.players.player import describe_replaced
    from pokegemma.battles.recording import RecordingPlan, record_battles, today

    report = record_battles(
        RecordingPlan(
            battle_format=options.battle_format,
            players=tuple(options.players),
            seed=options.seed,
            max_turns=options.max_turns,
            timeout_s=options.timeout_s,
            date=options.date or today(),
            teams_file=options.teams_file,
        ),
        Path(options.output_dir),
        num_battles=options.num_battles,
        concurrency=options.concurrency,
        num_workers=options.num_workers or usable_cores(),
    )
    if options.json:
        json.dump(report, sys.stdout, indent=2)
        print()
    else:
        wins = ", ".join(f"{name} won {number}" for name, number in report["wins"].items())
        print(
            f"{options.output_dir}: {report['num_battles']} battles, {wins}; no winner: {report['num_without_winner']}"
        )
        played = report["played_now"]
        for name, number in played.get("timeouts", {}).items():
            if number or played["unanswered"][name]:
                print(f"{name}: {describe_replaced(number, played['unanswered'][name])}")
    if report["problems"]:
        number = len(report["problems"])
        raise CheckFailedError(f"{number} battles could not be played: {report['problems'][0]}")


if __name__ == "__main__":
    run(main)
