"""Learn from play: DAgger for several rounds, next to the same training on more of the expert's own play.

DAgger: Ross, Gordon and Bagnell 2011. The model plays, the expert labels each screen that it met, and the next model
is trained from the base on everything so far. DART (Laskey et al. 2017): the expert plays, and some of its presses are
replaced.
"""

import json
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pokegemma.environment import usable_cores
from pokegemma.errors import PokegemmaError
from pokegemma.outputs import atomic_file
from pokegemma.play.closed_loop.options import FIRST_RECORDED_ROOM
from pokegemma.play.improve.options import ImproveOptions
from pokegemma.play.improve.scripts import ScriptRunner, link_sessions

NUM_TURNS = 25
"""Turns of a session that the expert records."""

_ROOMS_A_SEED, _ROOMS_A_ROUND = 1_000_000, 10_000
RESULTS_FILE = "results.json"


def improve(options: ImproveOptions) -> list[dict[str, Any]]:
    """Run all seeds, and return one record for each model: arm, round, seed, number of samples, and its play.

    Raises:
        PokegemmaError: the folder contains a run with other options.
        CheckFailedError: a step failed.
    """
    folder = Path(options.output_dir)
    _keep_options(folder, options)
    logs = folder / "logs"
    logs.mkdir(exist_ok=True)
    runner = ScriptRunner(logs, num_threads=max(1, usable_cores() // options.num_parallel))
    with ThreadPoolExecutor(options.num_parallel) as executor:
        runs = [executor.submit(_SeedRun(options, runner, seed).run) for seed in options.seeds]
        results = [result for run in runs for result in run.result()]
    with atomic_file(folder / RESULTS_FILE) as temporary:
        temporary.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    _keep_best(folder, results, also_level=options.also_level)
    return results


def choose_best(results: Sequence[dict[str, Any]], *, also_level: int) -> dict[str, Any]:
    """Return the model that solves most rooms of the level, among those that solve 95 % of the other where any does."""
    able = [result for result in results if result["also"]["success"] >= 0.95]
    return max(able or results, key=lambda result: (result["play"]["success"], result["also"]["success"]))


@dataclass(frozen=True)
class _SeedRun:
    """One seed: its recordings, the models of its rounds, and the controls."""

    options: ImproveOptions
    runner: ScriptRunner
    seed: int

    @property
    def folder(self) -> Path:
        return Path(self.options.output_dir) / f"seed{self.seed}"

    def run(self) -> list[dict[str, Any]]:
        options, results = self.options, []
        sessions = [self._record("expert", options.level), self._record("expert_also", options.also_level)]
        start = list(sessions)
        for number in range(options.rounds + 1):
            results.append(self._train(f"round{number}", sessions, arm="dagger", number=number))
            if number < options.rounds:
                sessions.append(self._play(self.folder / f"round{number}" / "adapter", number + 1))
        if options.controls and options.rounds:
            num_more = results[-1]["num_samples"] - results[0]["num_samples"]
            num_sessions = max(1, round(num_more / NUM_TURNS))
            for arm, noise in (("expert", 0.0), ("dart", options.noise)):
                more = self._record(f"more_{arm}", options.level, num_sessions=num_sessions, noise=noise, offset=1)
                results.append(self._train(arm, [*start, more], arm=arm, number=options.rounds))
        return results

    def _record(
        self, name: str, level: int, *, num_sessions: int | None = None, noise: float = 0.0, offset: int = 0
    ) -> Path:
        """Record the expert; return the folder of the sessions."""
        output = self.folder / "recorded" / name
        self.runner.run(
            "record_toy_game",
            output,
            output_dir=output,
            level=level,
            num_sessions=num_sessions or self.options.num_sessions,
            num_turns=NUM_TURNS,
            noise=noise,
            seed=10 * self.seed + level + 100 * offset,
        )
        return output / "runs"

    def _play(self, model: Path, number: int) -> Path:
        """Let the model play rooms that are not measured on; return the folder of the labelled sessions."""
        options = self.options
        output, sessions = self.folder / "recorded" / f"play{number}", self.folder / "recorded" / f"play{number}_runs"
        if sessions.exists() and not output.exists():
            shutil.rmtree(sessions)  # of a run that was stopped
        self.runner.run(
            "evaluate",
            output,
            model_path=model,
            closed_loop=options.rooms_per_round,
            level=options.level,
            noise=options.noise,
            first_room=FIRST_RECORDED_ROOM + self.seed * _ROOMS_A_SEED + number * _ROOMS_A_ROUND,
            max_detour=1.5,
            record=sessions,
            output_dir=output,
        )
        return sessions

    def _train(self, name: str, sessions: Sequence[Path], *, arm: str, number: int) -> dict[str, Any]:
        """Convert, train from the base, and measure; return the record of the model."""
        options, folder = self.options, self.folder / name
        dataset, adapter = folder / "dataset", folder / "adapter"
        if not dataset.exists():
            link_sessions(sessions, folder / "runs")
        self.runner.run(
            "convert_eevee_data_v2", dataset, eevee_data_dir=folder / "runs", output_dir=dataset, num_frames=1
        )
        self.runner.run(
            "sft_pokemon_gemma3",
            adapter,
            config=options.training_config,
            model_name_or_path=options.model_path,
            dataset_path=dataset,
            output_dir=adapter,
            max_steps=options.max_steps,
            samples_per_row=options.samples_per_row,
            seed=self.seed,
            eval_strategy="no",
            report_to="none",
        )
        num_samples = sum(len((dataset / f"{part}.jsonl").read_text().splitlines()) for part in ("train", "eval"))
        return {
            "arm": arm,
            "round": number,
            "seed": self.seed,
            "num_samples": num_samples,
            "model": str(adapter),
            "play": self._measure(adapter, folder / "play", options.level, options.noise),
            "also": self._measure(adapter, folder / "play_also", options.also_level, 0.0),
        }

    def _measure(self, model: Path, output: Path, level: int, noise: float) -> dict[str, Any]:
        options = {"closed_loop": self.options.num_rooms, "level": level, "noise": noise, "output_dir": output}
        self.runner.run("evaluate", output, model_path=model, **options)
        played = json.loads((output / "metrics.json").read_text(encoding="utf-8"))["closed_loop"]
        return played["players"]["model"]


def _keep_options(folder: Path, options: ImproveOptions) -> None:
    """Write the options into the folder, or compare them with those of the run that it contains."""
    path, values = folder / "options.json", asdict(options)
    values.pop("num_parallel")
    if not path.exists():
        if folder.exists() and any(folder.iterdir()):
            raise PokegemmaError(f"{folder} contains files that are not from this script; choose another --output_dir")
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    if changed := [name for name, value in values.items() if before.get(name) != value]:
        pairs = ", ".join(f"--{name} was {before.get(name)}, is {values[name]}" for name in changed)
        raise PokegemmaError(f"{folder} contains a run with other options: {pairs}; choose another --output_dir")


def _keep_best(folder: Path, results: Sequence[dict[str, Any]], *, also_level: int) -> None:
    """Copy the model that plays best to `folder`/best."""
    best = folder / "best"
    shutil.rmtree(best, ignore_errors=True)
    shutil.copytree(choose_best(results, also_level=also_level)["model"], best)
