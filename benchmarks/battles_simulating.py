"""Time the simulator against poke-env's players with a local server: CPU time a turn, by turns in one run.

    python benchmarks/battles_simulating.py --battle_format gen1randombattle --num_battles 50

Both ways two random players meet, and poke-env's Battle follows each side. ours: `BattleRunner` with one node process.
server: poke-env's RandomPlayer twice, against Pokémon Showdown's server as ./init.sh --with showdown installs it, with
the processes that it starts by default, and 16 battles at once. Counted is the CPU time of this process and of all node
processes; a first run of each way is not counted. Before that the same seeds are played at three concurrencies, and
their logs compared.
"""

import asyncio
import json
import logging
import platform
import statistics
import time
from dataclasses import dataclass
from typing import Any

import psutil
from poke_env import AccountConfiguration, ServerConfiguration
from poke_env.player import RandomPlayer

from pokegemma.battles.online.local_server import LocalServer
from pokegemma.battles.players.player import Decider
from pokegemma.battles.players.scripted import RandomBattlePlayer
from pokegemma.battles.runner import BattleRunner
from pokegemma.battles.simulated_battle import BattleFormat, BattleSpec
from pokegemma.battles.simulator import Simulator
from pokegemma.cli import parse_options, run
from pokegemma.errors import CheckFailedError, check_ranges
from pokegemma.options import option
from pokegemma.provenance import git_commit
from pokegemma.tables import format_table


@dataclass(frozen=True)
class SimulatingOptions:
    battle_format: str = option("gen1randombattle", "Format with random teams.")
    num_battles: int = option(50, "Battles of each way in each repeat.")
    repeats: int = option(3, "Runs of each way; medians are printed.")
    port: int = option(8100, "Port of the server.")
    json: bool = option(False, "Print JSON instead of a table.")

    def __post_init__(self) -> None:
        check_ranges(self, "num_battles", "repeats", at_least=1)


def cpu_seconds() -> float:
    """Return the CPU time of this process and of those that it started and that still run."""
    total = time.process_time()
    for child in psutil.Process().children(recursive=True):
        times = child.cpu_times()
        total += times.user + times.system
    return total


def make_specs(battle_format: str, num_battles: int, repeat: int) -> list[BattleSpec]:
    return [
        BattleSpec(f"{repeat}-{number}", battle_format, ("ann", "bob"), seed=f"{repeat}/{number}")
        for number in range(num_battles)
    ]


def play_here(
    simulator: Simulator, battle_format: BattleFormat, specs: list[BattleSpec], *, concurrency: int = 16
) -> dict[str, tuple[str, int]]:
    """Return the log and the number of turns of each battle."""
    deciders = {"ann": Decider(RandomBattlePlayer()), "bob": Decider(RandomBattlePlayer())}
    runner = BattleRunner(simulator, battle_format, deciders, concurrency=concurrency)
    results = {result.spec.battle_id: result for result in runner.play(specs)}
    if problems := [result.problem for result in results.values() if result.problem]:
        raise CheckFailedError(f"{len(problems)} battles could not be played: {problems[0]}")
    return {battle_id: (result.log, result.num_turns) for battle_id, result in results.items()}


def check_concurrency(simulator: Simulator, battle_format: BattleFormat, num_battles: int) -> None:
    """Play the same battles at three concurrencies.

    Raises:
        CheckFailedError: a log differs.
    """
    specs = make_specs(battle_format.name, num_battles, 0)
    runs = [play_here(simulator, battle_format, specs, concurrency=number) for number in (1, 8, 64)]
    if different := [battle_id for battle_id in runs[0] if len({run[battle_id] for run in runs}) > 1]:
        raise CheckFailedError(f"battles depend on concurrency: {', '.join(sorted(different))}")


def make_pair(server: LocalServer, battle_format: str, repeat: int) -> tuple[RandomPlayer, RandomPlayer]:
    """Return poke-env's players, 16 battles at once as ours."""
    configuration = ServerConfiguration(server.url, "")
    return tuple(
        RandomPlayer(
            account_configuration=AccountConfiguration(f"{name}{repeat}", None),
            battle_format=battle_format,
            server_configuration=configuration,
            log_level=logging.WARNING,
            max_concurrent_battles=16,
        )
        for name in ("ann", "bob")
    )


def measure(options: SimulatingOptions) -> dict[str, list[float]]:
    """Return CPU milliseconds a turn of each way in each repeat."""
    found: dict[str, list[float]] = {"ours": [], "server": []}
    with Simulator() as simulator, LocalServer(options.port, num_children=1) as server:
        battle_format = simulator.describe_format(options.battle_format)
        check_concurrency(simulator, battle_format, options.num_battles)
        for repeat in range(options.repeats + 1):
            before = cpu_seconds()
            played = play_here(simulator, battle_format, make_specs(options.battle_format, options.num_battles, repeat))
            turns = sum(num_turns for _, num_turns in played.values())
            found["ours"].append(1000 * (cpu_seconds() - before) / turns)
            first, second = make_pair(server, options.battle_format, repeat)
            before = cpu_seconds()
            asyncio.run(first.battle_against(second, n_battles=options.num_battles))
            turns = sum(battle.turn for battle in first.battles.values())
            found["server"].append(1000 * (cpu_seconds() - before) / turns)
    return {name: values[1:] for name, values in found.items()}


def main() -> None:
    (options,) = parse_options(SimulatingOptions, description=__doc__)
    found = measure(options)
    medians = {name: statistics.median(values) for name, values in found.items()}
    record: dict[str, Any] = {
        "battle_format": options.battle_format,
        "machine": platform.platform(),
        "commit": git_commit(),
        "cpu_ms_a_turn": medians,
        "all": found,
    }
    if options.json:
        print(json.dumps(record, indent=2))
        return
    rows = [("way", "CPU ms a turn", "of the server's")]
    rows += [(name, f"{value:.2f}", f"{value / medians['server']:.2f}") for name, value in medians.items()]
    print(format_table(rows))
    print(f"{options.battle_format}, the same {options.num_battles} battles at concurrency 1, 8 and 64")
    print(f"{record['machine']}, commit {record['commit']}")


if __name__ == "__main__":
    run(main)
