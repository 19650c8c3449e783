"""Learn from play: DAgger for several rounds, next to the same training on more of the expert's own play.

DAgger: Ross, Gordon and Bagnell 2011. The model plays, the expert labels each screen that it met, and the next model
is trained from the base on everything so far. DART (Laskey et al. 2017): the expert plays, and some of its presses are
replaced.
"""

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pokegemma.environment import usable_cores
from pokegemma.outputs import atomic_file
from pokegemma.parallel.script_runner import ScriptRunner, keep_options
from pokegemma.play.closed_loop.options import FIRST_RECORDED_ROOM
from pokegemma.play.improve.options import ImproveOptions
from pokegemma.play.stuck import STUCK_DEFAULT
from pokegemma.provenance import read_run_record

NUM_TURNS = 25
"""Turns of a session that the expert records."""

_ROOMS_A_SEED, _ROOMS_A_ROUND = 1_000_000, 10_000
RESULTS_FILE = "results.json"


@dataclass(frozen=True)
class Improvement:
    """What was learned.

    Attributes:
        results: one record for each model: arm, round, seed, number of samples, folder, and its play on both levels.
        best: the record of the model that plays best.
        best_play: its play on rooms that did not choose it.
    """

    results: list[dict[str, Any]]
    best: dict[str, Any]
    best_play: dict[str, Any]


def improve(options: ImproveOptions) -> Improvement:
    """Run all seeds, and keep the model that plays best in `options.output_dir`/best.

    Raises:
        PokegemmaError: the folder contains a run with other options.
        CheckFailedError: a step failed.
    """
    folder = Path(options.output_dir)
    keep_options(folder, {name: value for name, value in asdict(options).items() if name != "num_parallel"})
    logs = folder / "logs"
    logs.mkdir(exist_ok=True)
    runner = ScriptRunner(logs, num_threads=max(1, usable_cores() // options.num_parallel))
    runs = [_SeedRun(options, runner, seed).run for seed in options.seeds]
    results = [result for run in runner.run_all(runs, num_parallel=options.num_parallel) for result in run]
    with atomic_file(folder / RESULTS_FILE) as temporary:
        temporary.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    best = choose_best(results)
    shutil.rmtree(folder / "best", ignore_errors=True)
    shutil.copytree(best["model"], folder / "best")
    model = Path(best["model"])
    others = {"level": options.level, "noise": options.noise, "first_room": options.num_rooms}
    played = measure_rooms(runner, model, model.parent / "play_others", options, **others)
    return Improvement(results, best, played)


def choose_best(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
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
                sessions.append(self._play(results[-1]["model"], number + 1))
        if options.controls and options.rounds:
            num_more = results[-1]["num_samples"] - results[0]["num_samples"]
            num_sessions = max(1, round(num_more / NUM_TURNS))
            for arm, noise in (("expert", 0.0), ("dart", options.play_noise)):
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

    def _play(self, model: str, number: int) -> Path:
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
            noise=options.play_noise,
            first_room=FIRST_RECORDED_ROOM + self.seed * _ROOMS_A_SEED + number * _ROOMS_A_ROUND,
            max_detour=1.0,
            stuck=2,  # a loop shows few screens
            record_mistakes=True,
            record=sessions,
            output_dir=output,
        )
        return sessions

    def _train(self, name: str, sessions: Sequence[Path], *, arm: str, number: int) -> dict[str, Any]:
        """Convert, train from the base, merge, and measure; return the record of the model."""
        options, folder = self.options, self.folder / name
        dataset, trained, model = folder / "dataset", folder / "trained", folder / "model"
        if not dataset.exists():
            link_sessions(sessions, folder / "runs")
        self.runner.run(
            "convert_eevee_data_v2", dataset, eevee_data_dir=folder / "runs", output_dir=dataset, num_frames=1
        )
        self.runner.run(
            "sft_pokemon_gemma3",
            trained,
            config=options.training_config,
            model_name_or_path=options.model_path,
            dataset_path=dataset,
            output_dir=trained,
            max_steps=options.max_steps,
            samples_per_row=options.samples_per_row,
            seed=self.seed,
            eval_strategy="no",
            report_to="none",
        )
        if read_run_record(trained)["options"]["finetuning"] != "full":
            self.runner.run("merge_qlora", model, lora_path=trained, output_path=model, dtype="float32")  # plays faster
        else:
            model = trained
        play = {"level": options.level, "noise": options.noise}
        num_samples = sum(len((dataset / f"{part}.jsonl").read_text().splitlines()) for part in ("train", "eval"))
        return {
            "arm": arm,
            "round": number,
            "seed": self.seed,
            "num_samples": num_samples,
            "model": str(model),
            "play": measure_rooms(self.runner, model, folder / "play", options, **play),
            # Without noise a greedy model repeats one wrong button for ever, so here it plays as in scripts/play.py.
            "also": measure_rooms(
                self.runner, model, folder / "play_also", options, level=options.also_level, stuck=STUCK_DEFAULT
            ),
        }


def measure_rooms(
    runner: ScriptRunner,
    model: Path,
    output: Path,
    options: ImproveOptions,
    *,
    level: int,
    noise: float = 0.0,
    first_room: int = 0,
    stuck: int = 0,
) -> dict[str, Any]:
    """Let a model play unseen rooms; return what it reached."""
    rooms = {"closed_loop": options.num_rooms, "first_room": first_room, "level": level, "noise": noise, "stuck": stuck}
    runner.run("evaluate", output, model_path=model, output_dir=output, **rooms)
    played = json.loads((output / "metrics.json").read_text(encoding="utf-8"))["closed_loop"]
    return played["players"]["model"]


def link_sessions(folders: Iterable[Path], runs: Path) -> None:
    """Make `runs` with the sessions of several recordings, without copying their pictures."""
    for number, folder in enumerate(folders):
        for session in sorted(folder.glob("session_*")):
            target = runs / f"session_{number}_{session.name.removeprefix('session_')}"
            for file in sorted(path for path in session.rglob("*") if path.is_file()):
                link = target / file.relative_to(session)
                link.parent.mkdir(parents=True, exist_ok=True)
                if not link.exists():
                    os.link(file, link)
