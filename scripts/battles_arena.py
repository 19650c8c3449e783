"""Let players meet in battles, each against every other, and rate them.

python scripts/battles_arena.py --players random max-base-power heuristic --num_rounds 50 --output_dir outputs/arena

A round is two battles of each pair, on one seed with the sides swapped. Writes results.jsonl as battles end, then
arena.json, players.csv, pairs.csv and report.html, which has the ratings, the matrix and replays and needs no network.
The same command continues an arena that was interrupted; more rounds or players are added to what is there.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from pokegemma.cli import parse_options, run
from pokegemma.environment import usable_cores
from pokegemma.errors import CheckFailedError, PokegemmaError, check_range, check_ranges
from pokegemma.options import option


@dataclass
class BattlesArenaOptions:
    output_dir: str = option(..., "Folder of the results and the report.")
    players: list[str] = option(
        ["random", "max-base-power", "heuristic"],
        "Players: random, max-base-power or heuristic; NAME=SOURCE gives one another name. A source may be the folder "
        "of a policy, FOLDER@TEMPERATURE to draw actions by their probabilities, the URL of a policy's server, or "
        "MODULE:CALLABLE, a policy in Python that takes metamon's observation.",
        nargs="+",
    )
    against: list[str] = option([], "Only pairs with one of these players play. Default: all pairs.", nargs="+")
    baseline: str | None = option(None, "A player whose battles with each other one are listed by themselves.")
    battle_format: str = option("gen1ou", "Format as Pokémon Showdown names it: gen1ou, gen9randombattle.")
    num_rounds: int = option(50, "Rounds of two battles that each pair has played when the run has ended.")
    seed: int = option(0, "The same seed, players and teams give the same battles.")
    teams_file: str | None = option(
        None,
        "Teams as Showdown's team builder exports them, for formats without random teams. Default: pokegemma's own.",
    )
    max_turns: int = option(1000, "A longer battle counts as a tie.")
    timeout_s: float | None = option(
        None,
        "Seconds a player may take for a decision; then the strongest legal move is played. With it, a player decides "
        "one after the other, and not for all battles at once. Default: no limit.",
    )
    num_replay_rounds: int = option(1, "The page has replays of this many rounds.")
    num_resamples: int = option(1000, "Resamples of the bootstrap.")
    concurrency: int = option(64, "Battles at once in a process. The battles do not depend on it.")
    num_workers: int = option(0, "Processes, each with a node process of its own. 0: one for each core.")
    json: bool = option(False, "Print the standings as JSON.")

    def __post_init__(self) -> None:
        check_ranges(self, "num_rounds", "max_turns", "concurrency", "num_resamples", at_least=1)
        check_ranges(self, "num_workers", "num_replay_rounds", at_least=0)
        check_range("--timeout_s", self.timeout_s, above=0)


def main() -> None:
    (options,) = parse_options(BattlesArenaOptions, description=__doc__)
    from pokegemma.battles.arena.plan import ArenaRules
    from pokegemma.battles.arena.playing import play_arena
    from pokegemma.battles.arena.report import format_standings, write_arena_report
    from pokegemma.battles.arena.standings import make_standings
    from pokegemma.battles.players.opening import parse_players

    folder = Path(options.output_dir)
    rules = ArenaRules(options.battle_format, options.seed, options.max_turns, options.timeout_s, options.teams_file)
    players = parse_players(options.players, flag="--players")
    if options.baseline not in (None, *(player.name for player in players)):
        raise PokegemmaError(f"--baseline {options.baseline}: must be among the players")
    results, problems = play_arena(
        rules,
        players,
        folder,
        num_rounds=options.num_rounds,
        against=options.against,
        num_replay_rounds=options.num_replay_rounds,
        concurrency=options.concurrency,
        num_workers=options.num_workers or usable_cores(),
    )
    standings = make_standings(
        results.values(), baseline=options.baseline, num_resamples=options.num_resamples, seed=options.seed
    )
    write_arena_report(folder, standings, results.values(), battle_format=options.battle_format)
    if options.json:
        json.dump(standings, sys.stdout, indent=2)
        print()
    else:
        print(format_standings(standings))
        print(f"{folder / 'report.html'}: {standings['num_battles']} battles")
    if problems:
        raise CheckFailedError(f"{len(problems)} battles could not be played: {problems[0]}")


if __name__ == "__main__":
    run(main)
