"""Train one tiny Gemma 3 for each way to show the past, and compare what they learned: frames, layout, earlier buttons.

    python benchmarks/window_ablation.py --output_dir outputs/window_toy
    python benchmarks/window_ablation.py --output_dir outputs/window_recorded --recordings path/to/runs \\
        --eval_fraction 0.3 --models_dir outputs/window_toy/models

Without --recordings, sessions of the toy game's expert are recorded. Random weights first learn level 1 of the toy game
from one frame without earlier buttons, since longer windows take them long to learn from nothing. Each cell of the
ablation goes on from there for the same number of optimizer steps, with about the same number of decisions in each. A
frame has the same number of pixels and tokens in every layout, and answers are cut to the button. A finished cell is a
line of OUTPUT_DIR/results.jsonl; the same command continues a run that was stopped.
"""

import contextlib
import dataclasses
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import set_seed

from pokegemma import cli
from pokegemma.data import prompts
from pokegemma.data.convert import WindowOptions
from pokegemma.data.corpus import convert_corpus
from pokegemma.data.grids import NUM_TILES
from pokegemma.data.samples import Sample, read_samples
from pokegemma.data.trajectories import cut_trajectories
from pokegemma.errors import PokegemmaError, check_range, check_ranges
from pokegemma.evaluation.evaluate import PlayMeasurement, evaluate
from pokegemma.evaluation.metrics import wilson_interval
from pokegemma.evaluation.options import EvaluateOptions
from pokegemma.evaluation.predict import Predictor
from pokegemma.export.merge import merge
from pokegemma.gemma.tiny.gemma3 import make_tiny_gemma3
from pokegemma.options import option
from pokegemma.outputs import atomic_folder
from pokegemma.play.closed_loop.episodes import summarize_episodes
from pokegemma.play.closed_loop.measure import play_view, require_fair
from pokegemma.play.closed_loop.rooms import play_rooms
from pokegemma.play.closed_loop.rules import RoomRules
from pokegemma.play.toy.recorder import record_sessions
from pokegemma.play.toy.rooms import check_level
from pokegemma.provenance import PROJECT_ROOT, git_commit, write_run_record
from pokegemma.tables import format_interval, format_percent
from pokegemma.training.options import DataOptions, ModelOptions, TrainingOptions
from pokegemma.training.sft import train

NUM_FRAMES = (1, 2, 4, 8)
PATCH_SIZE_PX = 14
SAMPLES_PER_ROW = 4
"""Share the first part of their prompts, which changes no loss and is faster."""

RESULTS_FILE = "results.jsonl"
NOT_OF_A_CELL = ("output_dir", "models_dir", "layouts", "num_frames")
"""Options that may differ between the runs that fill one results file."""


@dataclass(frozen=True)
class AblationOptions:
    """The game and the size of every cell."""

    output_dir: str = option("outputs/window_ablation", "folder of the datasets and the results; a run is continued")
    recordings: str | None = option(None, "folder of recorded sessions; default: the toy game's expert")
    level: int = option(1, "level of the toy game")
    num_sessions: int = option(120, "recorded sessions of 25 turns of the toy game")
    eval_fraction: float = option(0.1, "share of the samples held out, in whole sessions")
    num_steps: int = option(30, "optimizer steps of each cell")
    models_dir: str | None = option(
        None, "folder of the models that cells go on from, made where it does not exist; default: OUTPUT_DIR/models"
    )
    num_first_steps: int = option(100, "optimizer steps of these models")
    decisions_a_step: int = option(16, "decisions in an optimizer step")
    layouts: list[str] = option(list(prompts.LAYOUTS), "only the cells with these", choices=prompts.LAYOUTS)
    num_frames: list[int] = option(list(NUM_FRAMES), "only the cells with these", choices=NUM_FRAMES)
    frame_size_px: int = option(56, "width and height of a frame, a multiple of 14; each 14 x 14 pixels are a token")
    num_rooms: int = option(20, "rooms that a model of the toy game plays, where that is possible; 0: none")
    seed: int = option(0, "of the weights and of the order of the samples")

    def __post_init__(self) -> None:
        check_ranges(self, "num_steps", "num_first_steps", "decisions_a_step", at_least=1)
        check_ranges(self, "num_rooms", "seed", at_least=0)
        check_range("--num_sessions", self.num_sessions, at_least=2)
        check_range("--eval_fraction", self.eval_fraction, above=0, below=1)
        if self.frame_size_px < PATCH_SIZE_PX or self.frame_size_px % PATCH_SIZE_PX:
            raise PokegemmaError(f"--frame_size_px {self.frame_size_px}: must be a multiple of {PATCH_SIZE_PX}")
        check_level(self.level)
        if self.recordings is None and self.num_rooms:
            require_fair(self.level)


@dataclass(frozen=True)
class Cell:
    """One way to show the past.

    Attributes:
        num_frames: of a window; with layout trajectory, the decisions of a conversation, each with its frame.
        shows_buttons: whether the question names the earlier buttons.
    """

    layout: prompts.Layout
    num_frames: int
    shows_buttons: bool

    @property
    def can_play(self) -> bool:
        """Whether play shows a model the same: it always names the buttons, and conversations are slow to play."""
        return self.shows_buttons and self.layout != "trajectory"


def list_cells() -> list[Cell]:
    """Return the cells that differ from one another.

    A grid has room for four frames. A conversation of one decision is layout frames with one frame, and the answers of
    a longer one are the earlier buttons, so it cannot be without them.
    """
    grids = [("grid", number) for number in NUM_FRAMES if number <= NUM_TILES]
    windows = [*grids, *(("frames", number) for number in NUM_FRAMES)]
    conversations = [("trajectory", number) for number in NUM_FRAMES if number > 1]
    shown = [(*window, True) for window in windows + conversations] + [(*window, False) for window in windows]
    return [Cell(layout, number, shows) for layout, number, shows in shown]


def show(sample: Sample, cell: Cell) -> Sample:
    """Return a sample with its answer cut to the button, and without the earlier buttons where a cell has none.

    Its metadata keep the earlier buttons, from which the baselines predict.
    """
    button = prompts.parse_answer(sample.output).button
    question = sample.question if cell.shows_buttons else prompts.NEXT_QUESTION
    return dataclasses.replace(
        sample, question=question, output=prompts.build_output(button=button, reasoning="", context="")
    )


def make_dataset(options: AblationOptions, cell: Cell) -> tuple[Path, Path]:
    """Return the files to train and to evaluate a cell on. Cells with the same number of frames share the pictures."""
    root, num_frames = Path(options.output_dir), 1 if cell.layout == "trajectory" else cell.num_frames
    recorded, dataset = root / "recorded", root / f"dataset_{num_frames}"
    if options.recordings is None and not recorded.is_dir():
        with atomic_folder(recorded, stage="record") as folder:
            record_sessions(folder, num_sessions=options.num_sessions, seed=options.seed, level=options.level)
    if not dataset.is_dir():
        window = WindowOptions(num_frames, min(num_frames, NUM_TILES), grid_images=num_frames <= NUM_TILES)
        sessions = recorded if options.recordings is None else Path(options.recordings)
        convert_corpus(sessions, dataset, window=window, eval_fraction=options.eval_fraction, num_workers=1)
    files = []
    for split in ("train", "eval"):
        files.append(dataset / f"{split}_{'with' if cell.shows_buttons else 'without'}_buttons.jsonl")
        samples = read_samples(dataset / f"{split}.jsonl")
        files[-1].write_text("".join(show(sample, cell).to_json() + "\n" for sample in samples), encoding="utf-8")
    return files[0], files[1]


def make_first_model(options: AblationOptions, layout: prompts.Layout) -> Path:
    """Return the model that cells go on from; a grid of two by two frames is twice as large as a frame."""
    folder = Path(options.models_dir or f"{options.output_dir}/models")
    cell = Cell("grid" if layout == "grid" else "frames", 1, shows_buttons=False)
    model, random_model = folder / cell.layout, folder / f"{cell.layout}_random"
    if not model.is_dir():
        size_px = options.frame_size_px * (2 if layout == "grid" else 1)
        with atomic_folder(random_model, stage="tiny model", overwrite=True) as work:
            num_tokens = (size_px // PATCH_SIZE_PX) ** 2
            make_tiny_gemma3(work, seed=options.seed, image_size_px=size_px, num_image_tokens=num_tokens)
            write_run_record(work, stage="tiny model", options=asdict(options))
        facts = {"output_dir": str(folder), "recordings": None, "level": 1, "eval_fraction": 0.1}
        first = dataclasses.replace(options, num_steps=options.num_first_steps, **facts)
        train_cell(first, cell, make_dataset(first, cell), random_model, folder / "adapter")
        merge(folder / "adapter", model, dtype="float32")
    return model


def train_cell(
    options: AblationOptions, cell: Cell, files: tuple[Path, Path], model: str | Path, adapter: Path
) -> float:
    """Train a cell's adapter of a model; return the mean number of decisions of a step.

    Raises:
        KeyboardInterrupt: a signal stopped training.
    """
    rows, decisions_a_row, layout_settings = options.decisions_a_step, 1.0, {"samples_per_row": SAMPLES_PER_ROW}
    if cell.layout == "trajectory":  # a session's last conversation is shorter, so more of them make up a step
        samples = list(read_samples(files[0]))
        conversations = list(cut_trajectories(samples, max_decisions=cell.num_frames, overlap=0))
        decisions_a_row = len(samples) / len(conversations)
        rows = max(1, round(options.decisions_a_step / decisions_a_row))
        layout_settings = {"max_decisions": cell.num_frames, "overlap_decisions": 0}
    settings = {
        "config": PROJECT_ROOT / "training_configs" / "toy.yaml",
        "model_name_or_path": model,
        "dataset_path": files[0],
        "eval_dataset_path": files[1],
        "output_dir": adapter,
        "layout": cell.layout,
        "max_steps": options.num_steps,
        "per_device_train_batch_size": rows,
        "eval_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "seed": options.seed,
        "overwrite": True,
        **layout_settings,
    }
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    parsed = cli.parse_options(DataOptions, TrainingOptions, ModelOptions, description="", argv=flags)
    set_seed(options.seed)  # of the adapters: the same in a run that was continued
    with contextlib.redirect_stdout(sys.stderr):  # the losses
        if not train(*parsed):
            raise KeyboardInterrupt
    return rows * decisions_a_row


def evaluate_cell(options: AblationOptions, cell: Cell, files: tuple[Path, Path], adapter: Path) -> dict[str, Any]:
    """Return the metrics of a cell. In a conversation each decision follows the NUM_FRAMES - 1 before it."""

    def play(predictor: Predictor) -> PlayMeasurement:
        seeds, rules = range(options.num_rooms), RoomRules(options.level)
        return PlayMeasurement(summarize_episodes(play_rooms(predictor, play_view(str(adapter)), seeds, rules)), "")

    plays = options.recordings is None and options.num_rooms > 0 and cell.can_play
    return evaluate(
        EvaluateOptions(
            model_path=str(adapter),
            output_dir=str(adapter.with_name("evaluation")),
            layout=cell.layout,
            max_decisions=cell.num_frames,
            overlap_decisions=cell.num_frames - 1,
            batch_size=32,
            generate=False,
            overwrite=True,
        ),
        held_out=files[1],
        train=files[0],
        measure_play=play if plays else None,
    )


def measure_cell(options: AblationOptions, cell: Cell) -> dict[str, Any]:
    """Train and evaluate a cell; return what the results file has about it."""
    files, adapter = make_dataset(options, cell), Path(options.output_dir) / "adapter"
    model = make_first_model(options, cell.layout)
    began = time.monotonic()
    decisions_a_step = train_cell(options, cell, files, model, adapter)
    trained = time.monotonic()
    metrics = evaluate_cell(options, cell, files, adapter)
    return {
        "cell": asdict(cell),
        "options": _settings(options),
        "decisions_a_step": decisions_a_step,
        "train_s": trained - began,
        "evaluate_s": time.monotonic() - trained,
        **{name: metrics[name] for name in ("num_decisions", "num_change_decisions", "num_sessions", "rows")},
        "played": metrics.get("closed_loop"),
        "commit": git_commit(),
    }


def _settings(options: AblationOptions) -> dict[str, Any]:
    return {name: value for name, value in asdict(options).items() if name not in NOT_OF_A_CELL}


def read_results(file: Path, options: AblationOptions) -> list[dict[str, Any]]:
    """Return the cells that were finished.

    Raises:
        PokegemmaError: they were measured with other options.
    """
    results = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    for name, value in _settings(options).items():
        if other := [result for result in results if result["options"][name] != value]:
            raise PokegemmaError(
                f"--{name} {value}: {file} contains cells with {other[0]['options'][name]}; choose another --output_dir"
            )
    return results


def format_row(name: str, row: dict[str, Any], result: dict[str, Any], *more: str) -> str:
    """Return one row of the Markdown table: a cell or a baseline."""
    cells = [name]
    for key, count in (("accuracy", "num_decisions"), ("change_accuracy", "num_change_decisions")):
        interval = wilson_interval(round(row[key] * result[count]), result[count])
        cells.append(f"{format_percent(row[key])} ({format_interval(interval)})")
    return f"| {' | '.join([*cells, *more])} |"


def format_results(results: Sequence[dict[str, Any]]) -> str:
    """Return the finished cells and the baselines as a Markdown table, with 95 % intervals by Wilson."""
    lines = [
        "| layout, frames, earlier buttons | right buttons | on changes | rooms solved | training |",
        f"|{'---|' * 5}",
    ]
    for result in sorted(results, key=lambda result: list_cells().index(Cell(**result["cell"]))):
        cell, played = Cell(**result["cell"]), result["played"]
        rooms = "–"
        if played:
            interval = format_interval(played["success_interval"])
            rooms = f"{played['num_solved']} of {played['num_episodes']} ({interval})"
        row = next(row for row in result["rows"] if row["key"] == "scored")
        name = f"{cell.layout}, {cell.num_frames}, {'with' if cell.shows_buttons else 'without'}"
        lines.append(format_row(name, row, result, rooms, f"{result['train_s']:.0f} s"))
    for row in results[0]["rows"] if results else ():
        if row["key"] != "scored":
            lines.append(format_row(row["name"], row, results[0], "–", "–"))
    return "\n".join(lines)


def main() -> None:
    (options,) = cli.parse_options(AblationOptions, description=__doc__)
    root = Path(options.output_dir)
    root.mkdir(parents=True, exist_ok=True)
    results = read_results(root / RESULTS_FILE, options)
    done = [Cell(**result["cell"]) for result in results]
    wanted = [cell for cell in list_cells() if cell.layout in options.layouts and cell.num_frames in options.num_frames]
    for number, cell in enumerate(wanted, start=1):
        if cell not in done:
            print(f"cell {number} of {len(wanted)}: {cell}", file=sys.stderr)
            results.append(measure_cell(options, cell))
            with open(root / RESULTS_FILE, "a", encoding="utf-8") as file:
                file.write(json.dumps(results[-1]) + "\n")
    print(format_results(results))
    decisions, changes, sessions = (results[0][f"num_{name}"] for name in ("decisions", "change_decisions", "sessions"))
    print(f"{decisions} decisions of {sessions} held-out sessions, {changes} of them changes of the button")
    print(f"{platform.platform()}, {os.cpu_count()} cores, commit {git_commit()}")


if __name__ == "__main__":
    cli.run(main)
