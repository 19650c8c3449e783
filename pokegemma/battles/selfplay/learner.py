"""What self-play and PSRO have in common: record battles, train a policy on them, let players meet in an arena."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pokegemma.battles.arena.plan import Pair, list_battles, list_pairs
from pokegemma.battles.arena.report import STANDINGS_FILE
from pokegemma.battles.arena.results import BATTLES_FILE, read_battles
from pokegemma.battles.arena.standings import count_rounds
from pokegemma.battles.offline_rl.encoder_path import SHAPE_FILE
from pokegemma.battles.offline_rl.network_files import load_actor_critic
from pokegemma.battles.players.opening import PlayerSource, parse_players
from pokegemma.battles.policy.checkpoint import open_policy
from pokegemma.battles.selfplay.options import LearningOptions
from pokegemma.battles.trajectories.files import TrajectoryName, find_trajectory_files
from pokegemma.battles.trajectories.packing import PACK_FILE
from pokegemma.environment import usable_cores
from pokegemma.errors import PokegemmaError
from pokegemma.fingerprints import FileHashes, hash_of
from pokegemma.parallel.script_runner import SCRIPT_MODULES, ScriptRunner, keep_options

SCRIPTS_IMPORT = (
    *SCRIPT_MODULES,
    "pokegemma.battles.cloning.train",
    "pokegemma.battles.offline_rl.train",
    "pokegemma.battles.arena.playing",
    "pokegemma.battles.recording",
)
"""What the scripts of a run import."""

LEARNER = "learner"
"""The name of the one that learns in recorded battles."""


@dataclass(frozen=True)
class Learner:
    """Runs the scripts of a run with its options, each unless its result is there already."""

    options: LearningOptions
    runner: ScriptRunner

    def record(self, folder: Path, players: tuple[PlayerSource, PlayerSource], *, num_battles: int, seed: int) -> Path:
        """Record battles of two players in a folder, and return it."""
        self.runner.run(
            "battles_record",
            folder,
            output_dir=folder,
            players=[player.text for player in players],
            num_battles=num_battles,
            seed=seed,
            **self._battle_options(),
        )
        return folder

    def train(self, folder: Path, recordings: Sequence[Path], start: Path, *, player: str | None = None) -> Path:
        """Train a policy on recorded battles; return its folder.

        Args:
            recordings: folders of trajectory files; `--trajectories_dir` is added to them.
            start: what training starts from. Where it is an adapter, a new one is trained on its base. With `rl` and
                an actor-critic, it is also the reference of KL damping; with `rl` and a policy, a new actor-critic is
                trained on that policy's features.
            player: only this player's views of the recorded battles are learned from.
        """
        options = self.options
        files, packed, trained = folder / "battles", folder / "packed", folder / "trained"
        if options.trajectories_dir is not None:
            link_trajectories(Path(options.trajectories_dir), files)
        for recording in recordings:
            link_trajectories(recording, files, player=player)
        self.runner.run(
            "battles_pack",
            packed,
            is_complete=_is_whole,
            trajectories_dir=files,
            output_dir=packed,
            num_workers=options.num_workers,
        )
        self.runner.run(
            f"{options.trainer}_battles",
            trained,
            config=options.config_file,
            trajectories_dir=packed,
            output_dir=trained,
            won_only=options.won_only,
            seed=options.seed,
            **find_start(start, trainer=options.trainer),
        )
        return trained

    def compare(
        self, folder: Path, players: Sequence[PlayerSource], *, seed: int, against: Sequence[str] = ()
    ) -> dict[Pair, np.ndarray]:
        """Let players meet in an arena, all pairs or those with a player of `against`, as far as they have not met.

        Returns:
            Of each pair in the folder, (R, 3): wins of its first player, of its second, and ties, round by round.
        """
        rounds = self.options.arena_rounds
        battles = list(list_battles(list_pairs(players, against), rounds))

        def is_complete(folder: Path) -> bool:
            results, report = read_battles(folder / BATTLES_FILE), folder / STANDINGS_FILE
            return all(battle in results for battle in battles) and _count_reported(report) == len(results)

        self.runner.run(
            "battles_arena",
            folder,
            is_complete=is_complete,
            output_dir=folder,
            players=[player.text for player in players],
            against=list(against) or None,
            num_rounds=rounds,
            seed=seed,
            **self._battle_options(),
        )
        return count_rounds(read_battles(folder / BATTLES_FILE).values())

    def _battle_options(self) -> dict[str, object]:
        names = ("battle_format", "teams_file", "max_turns", "concurrency", "num_workers")
        return {name: getattr(self.options, name) for name in names}


def start_run(options: LearningOptions, run: Callable[[Learner], None]) -> None:
    """Call a function that has all results of a run made, in `options.output_dir`, or continues an earlier call.

    Raises:
        PokegemmaError: the folder contains a run with other options, an input does not exist, or the policy cannot be
            trained so.
        CheckFailedError: a script failed.
    """
    options.require_inputs()
    policy = Path(options.policy_path)
    find_start(policy, trainer=options.trainer)
    hashes = FileHashes()
    inputs = {"--policy_path": PlayerSource("", options.policy_path).fingerprint()}
    for flag, path in (("--training_config", options.config_file), ("--teams_file", options.teams_file)):
        if path is not None:
            inputs[flag] = hashes.of(Path(path))
    if options.trajectories_dir is not None:
        files = find_trajectory_files(Path(options.trajectories_dir))
        inputs["--trajectories_dir"] = hash_of([path.name for path in files])
    keep_options(options.folder, options.fixed(), inputs=inputs)
    logs = options.folder / "logs"
    logs.mkdir(exist_ok=True)
    runner = ScriptRunner(logs, num_threads=usable_cores(), modules=SCRIPTS_IMPORT)
    runner.run_all([lambda: run(Learner(options, runner))])


def parse_others(texts: Sequence[str], *, reserved: Sequence[str], flag: str) -> tuple[PlayerSource, ...]:
    """Return the players of a flag, none of which may have a name that the run gives.

    Raises:
        PokegemmaError: as `parse_players`.
    """
    return parse_players([*texts, *(f"{name}=random" for name in reserved)], flag=flag)[: len(texts)]


def find_start(start: Path, *, trainer: str) -> dict[str, object]:
    """Return the flags that name what training starts from; see `Learner.train`.

    Raises:
        PokegemmaError: it cannot be opened, or is an actor-critic and the trainer is `sft`.
    """
    if not (start / SHAPE_FILE).is_file():
        policy = open_policy(start)
        return {"encoder": start} if trainer == "rl" else {"model_name_or_path": policy.path, "text": policy.text}
    if trainer == "sft":
        raise PokegemmaError(f"{start} is a result of scripts/rl_battles.py; train it with --trainer rl")
    _, encoder = load_actor_critic(start)
    return {"encoder": encoder.adapter.path if encoder.adapter else encoder.path, "reference": start}


def link_trajectories(recording: Path, files: Path, *, player: str | None = None) -> None:
    """Make a link in `files` to each trajectory file of a recording, or to those of one player's views.

    Raises:
        PokegemmaError: there is another file of that name.
    """
    for path in find_trajectory_files(recording):
        if player is not None and TrajectoryName.parse(path.name).player != player:
            continue
        target, link = path.resolve(), files / path.parent.name / path.name
        if link.is_symlink() and link.resolve() != target:
            raise PokegemmaError(f"{target} and {link.resolve()} have one name; record one of them with another --seed")
        if not link.is_symlink():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(target)


def _is_whole(folder: Path) -> bool:
    path = folder / PACK_FILE
    return path.is_file() and json.loads(path.read_text(encoding="utf-8"))["complete"]


def _count_reported(standings: Path) -> int | None:
    """Return the number of battles in an arena's report; None without a report."""
    return json.loads(standings.read_text(encoding="utf-8"))["num_battles"] if standings.is_file() else None
