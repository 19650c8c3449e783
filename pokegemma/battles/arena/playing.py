"""Play the battles of an arena that have no result yet, in parallel; a result is on the disk when its battle ends."""

import contextlib
import functools
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pokegemma.battles.arena.plan import ArenaBattle, ArenaRules, Pair, list_battles, list_pairs, make_spec
from pokegemma.battles.arena.ratings import require_connected
from pokegemma.battles.arena.results import BATTLES_FILE, ArenaResult, append_result, mend_results, read_battles
from pokegemma.battles.players.opening import PlayerSource, open_once
from pokegemma.battles.players.player import Decider
from pokegemma.battles.runner import BattleResult, BattleRunner
from pokegemma.battles.simulated_battle import ROLES, BattleFormat
from pokegemma.battles.simulator import Simulator
from pokegemma.battles.teams import read_teams
from pokegemma.errors import PokegemmaError
from pokegemma.fingerprints import hash_of
from pokegemma.outputs import atomic_file, file_lock, is_unfinished
from pokegemma.parallel.workers import is_cancelled, map_items
from pokegemma.provenance import read_run_record, write_run_record

ARENA_STAGE = "battles_arena"
REPLAYS_FOLDER = "replays"
_LOCK_FILE, _WORKERS_LOCK_FILE = ".lock", ".workers.lock"
_BATTLES_A_TASK = 128
"""A task starts a node process of its own, which takes as long as five battles."""

_WAIT_FOR_LOCK_S = 10
"""A worker of a run that was killed ends within half a second, and holds its lock until then."""


@dataclass(frozen=True)
class _Task:
    """Battles for one worker."""

    battles: tuple[ArenaBattle, ...]
    rules: ArenaRules
    players: tuple[PlayerSource, ...]
    battle_format: BattleFormat
    teams: tuple[str, ...]
    concurrency: int
    num_replay_rounds: int
    output_dir: Path


def play_arena(
    rules: ArenaRules,
    players: Sequence[PlayerSource],
    output_dir: Path,
    *,
    num_rounds: int,
    against: Sequence[str] = (),
    num_replay_rounds: int = 1,
    concurrency: int = 64,
    num_workers: int = 1,
) -> tuple[dict[ArenaBattle, ArenaResult], list[str]]:
    """Play what is missing in a folder, and return all its results, and what could not be played.

    A folder may get more rounds and more players; results that are there count, those of players that are not named
    now included.

    Args:
        against: names; only pairs with one of them play. By default all do.
        num_replay_rounds: of how many rounds the logs are kept, as replays/BATTLE.log.

    Raises:
        PokegemmaError: the folder contains something else or other rules' battles, a name stood for another player
            before, some players never meet the others, or another arena plays in the folder.
    """
    pairs = list_pairs(players, against)
    with Simulator() as simulator:
        battle_format = simulator.describe_format(rules.battle_format)
        teams_file = None if rules.teams_file is None else Path(rules.teams_file)
        teams = tuple(read_teams(simulator, battle_format, teams_file))
    options = _check_folder(output_dir, rules, players, teams)
    output_dir.mkdir(parents=True, exist_ok=True)
    with _only_one_arena(output_dir):
        path = output_dir / BATTLES_FILE
        mend_results(path)
        results = read_battles(path)
        _check_pool(pairs, results)
        write_run_record(output_dir, stage=ARENA_STAGE, options=options, status="running")
        missing = [battle for battle in list_battles(pairs, num_rounds) if battle not in results]
        size = max(1, min(_BATTLES_A_TASK, -(-len(missing) // max(1, num_workers))))
        batches = [tuple(missing[start : start + size]) for start in range(0, len(missing), size)]
        setup = (rules, tuple(players), battle_format, teams, concurrency, num_replay_rounds, output_dir)
        tasks = [_Task(batch, *setup) for batch in batches]
        problems: list[str] = []
        hold = functools.partial(_hold_workers_lock, output_dir)
        for found in map_items(
            _play_task, tasks, num_workers=num_workers, initialize=hold, label="Playing", unit="task"
        ):
            problems += found
        results = read_battles(path)
        status = "incomplete" if problems else "complete"
        write_run_record(output_dir, stage=ARENA_STAGE, options=options, status=status, num_battles=len(results))
    return results, problems


def _check_folder(
    output_dir: Path, rules: ArenaRules, players: Sequence[PlayerSource], teams: Sequence[str]
) -> dict[str, Any]:
    """Return what run.json records: the rules, and by name the players that the folder knows and the new ones."""
    named = {player.name: [player.source, player.fingerprint()] for player in players}
    mine = {**asdict(rules), "teams": hash_of(list(teams)), "players": named}
    names = {path.name for path in output_dir.iterdir()} if output_dir.exists() else set()
    if not {name for name in names - {_LOCK_FILE, _WORKERS_LOCK_FILE} if not is_unfinished(name)}:
        return mine
    record = read_run_record(output_dir) or {}
    if record.get("stage") != ARENA_STAGE:
        raise PokegemmaError(f"{output_dir} was not created by this script; choose another --output_dir")
    before, results = record["options"], read_battles(output_dir / BATTLES_FILE)
    if not results:  # nothing that could be mixed: a name, a seed or teams may have been wrong
        return mine
    played = {name for battle in results for name in battle.pair}
    before["players"] = {name: known for name, known in before["players"].items() if name in played}
    for key, value in asdict(rules).items():
        if before[key] != value:
            raise PokegemmaError(f"{output_dir} contains battles with --{key} {before[key]}; choose another folder")
    if before["teams"] != mine["teams"]:
        raise PokegemmaError(
            f"{output_dir} contains battles with other teams ({rules.teams_file}); choose another folder"
        )
    for name, (source, fingerprint) in named.items():
        known_source, known_fingerprint = before["players"].get(name, (source, fingerprint))
        if known_fingerprint != fingerprint:
            changed = f"it was {known_source}" if known_source != source else f"{source} has changed"
            raise PokegemmaError(f"player {name!r} of {output_dir} is another one now ({changed}); give it a new name")
    return {**mine, "players": {**before["players"], **named}}


def _check_pool(pairs: Sequence[Pair], results: dict[ArenaBattle, ArenaResult]) -> None:
    met = [*pairs, *(battle.pair for battle in results)]
    require_connected(sorted({name for pair in met for name in pair}), met)


@contextlib.contextmanager
def _only_one_arena(output_dir: Path) -> Iterator[None]:
    """Hold the folder's lock, once no worker of a run that was killed writes results any more.

    Raises:
        PokegemmaError: another arena plays there.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_locked(output_dir, _LOCK_FILE))
        with _locked(output_dir, _WORKERS_LOCK_FILE):
            pass
        yield


@contextlib.contextmanager
def _locked(output_dir: Path, name: str) -> Iterator[None]:
    end = time.monotonic() + _WAIT_FOR_LOCK_S
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(file_lock(output_dir / name, wait=False))
                break
            except BlockingIOError as error:
                if time.monotonic() > end:
                    raise PokegemmaError(f"another arena plays in {output_dir}; wait, or stop it") from error
                time.sleep(0.1)
        yield


def _hold_workers_lock(output_dir: Path) -> contextlib.ExitStack:
    """Hold the lock of the workers with the others, until what is returned is gone: until this process ends.

    A worker may live longer than the arena that started it, and it does not inherit that arena's own lock where workers
    are not forked.
    """
    stack = contextlib.ExitStack()
    stack.enter_context(file_lock(output_dir / _WORKERS_LOCK_FILE, shared=True))
    return stack


def _play_task(task: _Task, lock: contextlib.ExitStack) -> list[str]:
    """Play a task's battles, write their results, and return what went wrong."""
    names = {name for battle in task.battles for name in battle.pair}
    deciders = {
        player.name: Decider(open_once(player), timeout_s=task.rules.timeout_s)
        for player in task.players
        if player.name in names
    }
    battles = {battle.battle_id: battle for battle in task.battles}
    problems = []
    with Simulator() as simulator:
        runner = BattleRunner(
            simulator,
            task.battle_format,
            deciders,
            concurrency=task.concurrency,
            max_turns=task.rules.max_turns,
        )
        for result in runner.play([make_spec(battle, task.rules, task.teams) for battle in task.battles]):
            if result.problem:
                problems.append(f"{result.spec.battle_id}: {result.problem}")
            else:
                _write_result(task, battles[result.spec.battle_id], result)
            if is_cancelled():
                raise KeyboardInterrupt
    for decider in deciders.values():
        decider.close()
    return problems


def _write_result(task: _Task, battle: ArenaBattle, result: BattleResult) -> None:
    """Write a battle's log, if it is kept, and then its result: a battle with a result has all that it shall have."""
    if battle.round < task.num_replay_rounds and result.log:
        with atomic_file(task.output_dir / REPLAYS_FOLDER / f"{battle.battle_id}.log") as temporary:
            temporary.write_text(result.log, encoding="utf-8")
    seats = dict(zip(battle.names, result.seats, strict=True))
    first, second = (seats[name] for name in battle.pair)
    append_result(
        task.output_dir / BATTLES_FILE,
        ArenaResult(
            battle.pair,
            battle.round,
            battle.swapped,
            winner=None if result.winner is None else battle.names[ROLES.index(result.winner)],
            num_turns=result.num_turns,
            turn_limit_reached=result.turn_limit_reached,
            num_timeouts=(first.num_timeouts, second.num_timeouts),
            num_unanswered=(first.num_unanswered, second.num_unanswered),
        ),
    )
