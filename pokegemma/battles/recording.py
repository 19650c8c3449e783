"""Record battles of two players as metamon's trajectory files, both players' views of each; resumable by battle."""

import collections
import datetime
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pokegemma.battles.players.opening import PlayerSource, open_once
from pokegemma.battles.players.player import Decider
from pokegemma.battles.runner import BattleResult, BattleRunner
from pokegemma.battles.seat import Seat
from pokegemma.battles.simulated_battle import ROLES, BattleFormat, BattleSpec
from pokegemma.battles.simulator import Simulator
from pokegemma.battles.teams import draw_teams, read_teams
from pokegemma.battles.trajectories.files import COMPRESSED, TrajectoryName, write_trajectory
from pokegemma.battles.trajectories.from_battle import state_from_battle
from pokegemma.battles.trajectories.records import NO_ACTION, BattleTrajectory, TrajectoryState
from pokegemma.errors import PokegemmaError
from pokegemma.fingerprints import hash_of
from pokegemma.parallel.workers import is_cancelled, map_items
from pokegemma.provenance import read_run_record, write_run_record

STAGE = "record_battles"
_BATTLES_A_TASK = 256
"""A task starts a node process of its own, which takes as long as five battles."""


@dataclass(frozen=True)
class RecordingPlan:
    """What determines the content of the files.

    Attributes:
        players: as `PlayerSource.parse` takes them; they change sides after every battle.
        seed: a number; a battle's random numbers come from it and the battle's index.
        date: of the files' names, MM-DD-YYYY.
        teams_file: the teams, where the format has no random ones; None: those of pokegemma.
    """

    battle_format: str
    players: tuple[str, str]
    seed: int
    max_turns: int
    timeout_s: float | None
    date: str
    teams_file: str | None

    @cached_property
    def sources(self) -> tuple[PlayerSource, PlayerSource]:
        """The players.

        Raises:
            PokegemmaError: one does not exist, or two have one name.
        """
        first, second = map(PlayerSource.parse, self.players)
        if first != second and first.name == second.name:
            raise PokegemmaError(f"--players: two players are called {first.name!r}; write NAME=SOURCE")
        return first, second


@dataclass(frozen=True)
class _Task:
    """Battles for one worker."""

    plan: RecordingPlan
    battle_format: BattleFormat
    teams: tuple[str, ...]
    indices: tuple[int, ...]
    concurrency: int
    output_dir: Path


def record_battles(
    plan: RecordingPlan, output_dir: Path, *, num_battles: int, concurrency: int, num_workers: int
) -> dict[str, Any]:
    """Play the battles of a plan that have no files yet in `output_dir`/FORMAT/, and write two files of each.

    A run that was killed continues where it stopped, and one with more battles adds the new ones.

    Returns:
        The report: battles, wins by player, ties; of those played now, also turns and decisions, by player the
        decisions that were not its own (see `Choice`), and the battles that could not be played.

    Raises:
        PokegemmaError: a player or the format does not exist, a team is not allowed, or `output_dir` contains something
            else than battles of this plan.
    """
    fingerprints = [source.fingerprint() for source in plan.sources]
    with Simulator() as simulator:
        battle_format = simulator.describe_format(plan.battle_format)
        teams_file = None if plan.teams_file is None else Path(plan.teams_file)
        teams = tuple(read_teams(simulator, battle_format, teams_file))
    teams_hash = hash_of(list(teams))
    plan = _continue_plan(plan, output_dir, teams_hash, fingerprints)
    options = {**asdict(plan), "teams": teams_hash, "fingerprints": fingerprints}
    missing = [index for index in range(num_battles) if not _is_recorded(plan, output_dir, index)]
    size = max(1, min(_BATTLES_A_TASK, -(-len(missing) // max(1, num_workers))))
    tasks = [
        _Task(plan, battle_format, teams, tuple(missing[start : start + size]), concurrency, output_dir)
        for start in range(0, len(missing), size)
    ]
    output_dir.mkdir(parents=True, exist_ok=True)
    write_run_record(output_dir, stage=STAGE, options=options, status="running")
    played = _Played()
    for of_task in map_items(_record_task, tasks, num_workers=num_workers, label="Playing", unit="task"):
        played.add(of_task)
    report = {**_count_results(plan, output_dir, num_battles), **played.to_dict()}
    status = "incomplete" if played.problems else "complete"
    write_run_record(output_dir, stage=STAGE, options=options, status=status, report=report)
    return report


def player_names(plan: RecordingPlan, index: int) -> tuple[str, str]:
    """Return the names of p1 and p2 in a battle: they change sides, and one that plays itself has two names."""
    first, second = (source.name for source in plan.sources)
    names = (f"{first}-1", f"{second}-2") if first == second else (first, second)
    return names if index % 2 == 0 else names[::-1]


def _continue_plan(
    plan: RecordingPlan, output_dir: Path, teams_hash: str, fingerprints: Sequence[str]
) -> RecordingPlan:
    """Return the plan whose battles are in a folder, which is this one, except for the date of the first run."""
    if not output_dir.exists() or not any(output_dir.iterdir()):
        return plan
    record = read_run_record(output_dir) or {}
    if record.get("stage") != STAGE:
        raise PokegemmaError(f"{output_dir} was not created by this script; choose another --output_dir")
    options = {**record["options"], "players": tuple(record["options"]["players"])}
    if options.pop("teams") != teams_hash:
        raise PokegemmaError(f"{output_dir} contains battles with other teams; choose another --output_dir")
    known_fingerprints = options.pop("fingerprints", fingerprints)  # an earlier version had scripted players only
    changed = sorted(key for key, value in asdict(plan).items() if key != "date" and options[key] != value)
    if changed:
        key = changed[0]
        raise PokegemmaError(f"{output_dir} contains battles with --{key} {options[key]}; choose another --output_dir")
    for text, known, fingerprint in zip(plan.players, known_fingerprints, fingerprints, strict=True):
        if known != fingerprint:
            raise PokegemmaError(
                f"{output_dir} contains battles of another {text}, which has changed; choose another --output_dir"
            )
    return RecordingPlan(**options)


def _battle_id(plan: RecordingPlan, index: int) -> str:
    return f"pokegemma-{plan.battle_format}-{plan.seed}-{index:07d}"


def _file_name(plan: RecordingPlan, index: int, role: str, *, won: bool) -> TrajectoryName:
    names = dict(zip(ROLES, player_names(plan, index), strict=True))
    opponent = names[ROLES[1 - ROLES.index(role)]]
    return TrajectoryName(_battle_id(plan, index), "Unrated", names[role], opponent, plan.date, won)


def _find_results(plan: RecordingPlan, output_dir: Path, index: int) -> dict[str, bool]:
    """Return for each player of a battle whose file exists whether that player won."""
    names = dict(zip(ROLES, player_names(plan, index), strict=True))
    folder = output_dir / plan.battle_format
    return {
        names[role]: won
        for role in ROLES
        for won in (True, False)
        if (folder / f"{_file_name(plan, index, role, won=won)}{COMPRESSED}").is_file()
    }


def _is_recorded(plan: RecordingPlan, output_dir: Path, index: int) -> bool:
    return len(_find_results(plan, output_dir, index)) == len(ROLES)


def _count_results(plan: RecordingPlan, output_dir: Path, num_battles: int) -> dict[str, Any]:
    wins = dict.fromkeys(sorted(player_names(plan, 0)), 0)
    num_recorded = 0
    for index in range(num_battles):
        results = _find_results(plan, output_dir, index)
        num_recorded += len(results) == len(ROLES)
        for name, won in results.items():
            wins[name] += won
    return {"num_battles": num_recorded, "wins": wins, "num_without_winner": num_recorded - sum(wins.values())}


@dataclass
class _Played:
    """What was played in this run.

    Attributes:
        timeouts, unanswered: decisions that were not a player's own, by the player's name; see `Choice`.
        problems: battles that could not be played, and why.
    """

    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    timeouts: collections.Counter[str] = field(default_factory=collections.Counter)
    unanswered: collections.Counter[str] = field(default_factory=collections.Counter)
    problems: list[str] = field(default_factory=list)

    def add(self, other: "_Played") -> None:
        self.counts.update(other.counts)
        self.timeouts.update(other.timeouts)
        self.unanswered.update(other.unanswered)
        self.problems += other.problems

    def add_battle(self, result: BattleResult) -> None:
        self.counts.update(
            battles=1,
            turns=result.num_turns,
            decisions=sum(len(seat.steps) for seat in result.seats),
            unavailable_choices=sum(seat.num_unavailable for seat in result.seats),
            turn_limits=result.turn_limit_reached,
        )
        for name, seat in zip(result.spec.names, result.seats, strict=True):
            self.timeouts.update({name: seat.num_timeouts})
            self.unanswered.update({name: seat.num_unanswered})

    def to_dict(self) -> dict[str, Any]:
        replaced = {"timeouts": dict(self.timeouts), "unanswered": dict(self.unanswered)}
        return {"played_now": {**self.counts, **replaced} if self.counts else {}, "problems": self.problems}


def _record_task(task: _Task, state: None) -> _Played:
    """Play a task's battles and write their files."""
    plan, played = task.plan, _Played()
    players = {source: Decider(open_once(source), timeout_s=plan.timeout_s) for source in set(plan.sources)}
    deciders = {name: players[source] for name, source in zip(player_names(plan, 0), plan.sources, strict=True)}
    index_of = {_battle_id(plan, index): index for index in task.indices}
    with Simulator() as simulator:
        runner = BattleRunner(
            simulator,
            task.battle_format,
            deciders,
            concurrency=task.concurrency,
            max_turns=plan.max_turns,
            observer=_observe,
        )
        for result in runner.play(_make_specs(plan, task.teams, task.indices)):
            if result.problem:
                played.problems.append(f"{result.spec.battle_id}: {result.problem}")
                continue
            _write_battle(task, index_of[result.spec.battle_id], result)
            played.add_battle(result)
            if is_cancelled():
                raise KeyboardInterrupt
    for decider in players.values():
        decider.close()
    return played


def _make_specs(plan: RecordingPlan, teams: Sequence[str], indices: Sequence[int]) -> list[BattleSpec]:
    specs = []
    for index in indices:
        seed = f"{plan.seed}/{index}"
        drawn = draw_teams(teams, seed=seed)
        specs.append(
            BattleSpec(_battle_id(plan, index), plan.battle_format, player_names(plan, index), seed=seed, teams=drawn)
        )
    return specs


def _observe(seat: Seat) -> TrajectoryState:
    return state_from_battle(seat.battle)


def _write_battle(task: _Task, index: int, result: BattleResult) -> None:
    for role, seat in zip(ROLES, result.seats, strict=True):
        states = (*(step.record for step in seat.steps), seat.last_record)
        actions = (*(step.action for step in seat.steps), NO_ACTION)
        name = _file_name(task.plan, index, role, won=result.winner == role)
        write_trajectory(task.output_dir, name, BattleTrajectory(states, actions))


def today() -> str:
    """Return the date as it stands in the files' names."""
    return datetime.date.today().strftime("%m-%d-%Y")
