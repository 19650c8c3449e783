"""Self-play in rounds: the best policy plays itself, a candidate learns from that, and the arena decides between them.

A candidate that does not beat the best is rejected. Its battles stay: the next candidate learns from all battles that
were recorded so far.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pokegemma.battles.arena.plan import Pair
from pokegemma.battles.arena.standings import results_against
from pokegemma.battles.players.opening import PlayerSource
from pokegemma.battles.selfplay.learner import LEARNER, Learner, parse_others, start_run
from pokegemma.battles.selfplay.options import SelfPlayOptions
from pokegemma.outputs import write_if_changed
from pokegemma.training.run_folder import DATASET_CACHE

SELFPLAY_FILE = "results.json"
_SEEDS_A_RUN = 1000
"""A round's battles have the seed of the run times this plus the round, so that no two rounds have the same ones."""


def play_rounds(options: SelfPlayOptions) -> dict[str, Any]:
    """Play all rounds, copy the best policy to `options.output_dir`/best, and return what results.json contains.

    Returns:
        rule: `accept` and `accept_above`; start: results of the first policy against `--compare_with`, by player;
        rounds, see `judge_candidate`; best: name and path; final: the best's results against the first policy and
        `--compare_with` on new battles, None if they are one.

    Raises:
        PokegemmaError: the folder contains a run with other options, or a player does not exist.
        CheckFailedError: a script failed.
    """
    reserved = ("start", *(f"round{number}" for number in range(1, options.rounds + 1)))
    yardsticks = parse_others(options.compare_with, reserved=reserved, flag="--compare_with")
    results: dict[str, Any] = {}
    start_run(options, lambda learner: results.update(_SelfPlay(options, learner, yardsticks).run()))
    return results


def is_accepted(against_best: Mapping[str, Any], *, accept: str, above: float) -> bool:
    """Return whether a candidate becomes the best.

    Args:
        against_best: its `win_rate` and `win_rate_interval` (95 %, Wilson's) against the best; a tie is not a win.
        accept: "interval": the lower bound of the interval counts; "share": the win rate.
    """
    value = against_best["win_rate_interval"][0] if accept == "interval" else against_best["win_rate"]
    return value > above


@dataclass(frozen=True)
class _SelfPlay:
    """A run; `yardsticks` are the players of `--compare_with`."""

    options: SelfPlayOptions
    learner: Learner
    yardsticks: tuple[PlayerSource, ...]

    def run(self) -> dict[str, Any]:
        options, folder = self.options, self.options.folder
        start = best = PlayerSource("start", options.policy_path)
        seed = options.seed * _SEEDS_A_RUN
        results: dict[str, Any] = {"rule": {"accept": options.accept, "accept_above": options.accept_above}}
        rounds = self.learner.compare(folder / "start", [start, *self.yardsticks], seed=seed, against=[start.name])
        results |= {"start": self._against_yardsticks(start, rounds), "rounds": []}
        recordings: list[Path] = []
        for number in range(1, options.rounds + 1):
            place = folder / f"round{number}"
            drawing = replace(best, name=LEARNER, temperature=options.temperature)
            recordings.append(
                self.learner.record(
                    place / "recorded", (drawing, drawing), num_battles=options.num_battles, seed=seed + number
                )
            )
            trained = self.learner.train(place, recordings, best.folder)
            candidate = PlayerSource(place.name, str(trained))
            results["rounds"].append(self._judge(place, best, candidate, seed=seed + number))
            if results["rounds"][-1]["accepted"]:
                best = candidate
            results["best"] = {"name": best.name, "path": best.source}
            self._write(results)
        results["final"] = None if best == start else self._compare_finally(start, best, seed=seed + _SEEDS_A_RUN - 1)
        self._write(results)
        copy_policy(best.folder, folder / "best")
        return results

    def _judge(self, place: Path, best: PlayerSource, candidate: PlayerSource, *, seed: int) -> dict[str, Any]:
        """Let a candidate play; return its record: round, candidate, model, best, accepted, and its results."""
        players = [candidate, best, *self.yardsticks]
        rounds = self.learner.compare(place / "arena", players, seed=seed, against=[candidate.name])
        against_best = _result(rounds, candidate, best)
        return {
            "round": int(place.name.removeprefix("round")),
            "candidate": candidate.name,
            "model": candidate.source,
            "best": best.name,
            "accepted": is_accepted(against_best, accept=self.options.accept, above=self.options.accept_above),
            "against_best": against_best,
            "against": self._against_yardsticks(candidate, rounds),
        }

    def _compare_finally(self, start: PlayerSource, best: PlayerSource, *, seed: int) -> dict[str, Any]:
        """Return results of the best in battles that did not choose it."""
        players = [best, start, *self.yardsticks]
        rounds = self.learner.compare(self.options.folder / "final", players, seed=seed, against=[best.name])
        return {"against_start": _result(rounds, best, start), "against": self._against_yardsticks(best, rounds)}

    def _against_yardsticks(self, player: PlayerSource, rounds: Mapping[Pair, np.ndarray]) -> dict[str, Any]:
        return {yardstick.name: _result(rounds, player, yardstick) for yardstick in self.yardsticks}

    def _write(self, results: Mapping[str, Any]) -> None:
        write_if_changed(self.options.folder / SELFPLAY_FILE, json.dumps(results, indent=2) + "\n")


def _result(rounds: Mapping[Pair, np.ndarray], player: PlayerSource, opponent: PlayerSource) -> dict[str, Any]:
    """Return a player's wins, losses, ties, win rate and its interval against an opponent."""
    (row,) = (row for row in results_against(opponent.name, rounds) if row["name"] == player.name)
    return {key: value for key, value in row.items() if key not in ("name", "baseline")}


def copy_policy(policy: Path, target: Path) -> None:
    """Copy a policy without its checkpoints; an earlier copy stays until the new one is whole."""
    new, old = (target.with_name(f".{target.name}.{part}.part") for part in ("new", "old"))
    for path in (new, old):
        shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(policy, new, ignore=shutil.ignore_patterns("checkpoint-*", DATASET_CACHE))
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)
