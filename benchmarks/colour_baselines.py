"""Measure how far colours alone go in the toy game, next to baselines that see no picture.

    python benchmarks/colour_baselines.py
    python benchmarks/colour_baselines.py --levels 4 5 6 --noise 0.2 --recording_noise 0.2

For each level the expert is recorded as in the demonstration, and the same sessions are held out. A multinomial
logistic regression gets nothing but the mean colour of the frame, or those of 12 x 8 equal parts of it. It is measured
on the held-out decisions, and plays unseen rooms. Level 3 is left out, since its expert knows what no screen shows.
"""

import json
import os
import platform
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from pokegemma import cli
from pokegemma.data.convert import WindowOptions
from pokegemma.data.corpus import convert_corpus
from pokegemma.data.frame_pictures import open_picture
from pokegemma.data.prompts import BUTTONS
from pokegemma.data.samples import Sample, read_samples
from pokegemma.errors import check_ranges
from pokegemma.evaluation.baselines import BASELINES, count_buttons
from pokegemma.evaluation.metrics import read_decisions, wilson_interval
from pokegemma.options import option
from pokegemma.play.closed_loop.measure import require_fair
from pokegemma.play.closed_loop.rooms import play_room
from pokegemma.play.closed_loop.rules import RoomRules
from pokegemma.play.players import ButtonChoice
from pokegemma.play.toy.recorder import record_sessions
from pokegemma.play.toy.rooms import check_level
from pokegemma.provenance import git_commit
from pokegemma.tables import format_interval, format_percent

PARTS = {"mean colour": (1, 1), "12 x 8 colours": (12, 8)}
"""Columns and rows of what each regression gets."""


@dataclass(frozen=True)
class ColourOptions:
    """Which levels, and how much of them."""

    levels: list[int] = option([1, 2, 4, 5, 6], "levels of the toy game")
    num_sessions: int = option(120, "recorded sessions of 25 turns for each level; a tenth is held out")
    num_rooms: int = option(100, "rooms that each regression plays")
    recording_noise: float = option(0.0, "share of the presses replaced by another button in recordings (DART)")
    noise: float = option(0.0, "the same in the rooms that are played")
    json: bool = option(False, "print the result as JSON")

    def __post_init__(self) -> None:
        check_ranges(self, "num_rooms", at_least=1)
        check_ranges(self, "num_sessions", at_least=2)
        check_ranges(self, "recording_noise", "noise", at_least=0, at_most=1)
        for level in self.levels:
            check_level(level)
            require_fair(level)


def mean_colours(picture: Image.Image, *, columns: int, rows: int) -> np.ndarray:
    """Return the mean colours (rows * columns * 3,) of equal parts of a picture, from 0 to 1, row by row."""
    pixels = np.asarray(picture.convert("RGB"), float) / 255
    height, width, _ = pixels.shape
    return pixels.reshape(rows, height // rows, columns, width // columns, 3).mean((1, 3)).ravel()


@dataclass(frozen=True)
class ColourPlayer:
    """Press what a regression on mean colours predicts for the screen."""

    regression: Pipeline
    columns: int
    rows: int
    name: str = "colours"

    def start(self, goal: str | None) -> None:
        pass

    def decide(self, frame: Image.Image | str | Path, *, time: float | None = None) -> ButtonChoice:
        assert isinstance(frame, Image.Image)
        features = mean_colours(frame, columns=self.columns, rows=self.rows)
        return ButtonChoice(BUTTONS[self.regression.predict([features])[0]])

    def pressed(self, *buttons: str) -> None:
        pass

    def prepare(self) -> None:
        pass


def record_dataset(folder: Path, *, level: int, options: ColourOptions) -> tuple[list[Sample], list[Sample]]:
    """Record and convert the expert as ./train_gemma3.sh does; return the samples to learn from and those held out."""
    noise, num_sessions = options.recording_noise, options.num_sessions
    record_sessions(folder / "recorded", num_sessions=num_sessions, seed=0, level=level, noise=noise)
    window = WindowOptions(num_frames=1, min_frames=1, grid_images=False)
    convert_corpus(folder / "recorded", folder / "dataset", window=window, eval_fraction=0.1, num_workers=1)
    train, held_out = (list(read_samples(folder / "dataset" / f"{name}.jsonl")) for name in ("train", "eval"))
    return train, held_out


def measure_level(folder: Path, *, level: int, options: ColourOptions) -> dict[str, Any]:
    """Return the share of right buttons of each baseline and regression, and how many rooms the regressions solve."""
    splits = record_dataset(folder, level=level, options=options)
    train, held_out = (read_decisions(samples) for samples in splits)
    pictures = [[open_picture(folder / "dataset" / sample.frames[-1]) for sample in samples] for samples in splits]
    right = {
        name: predict(count_buttons(train), held_out.previous)[0] == held_out.truth
        for name, (_, predict) in BASELINES.items()
    }
    solved = {}
    for name, (columns, rows) in PARTS.items():
        known, unseen = ([mean_colours(picture, columns=columns, rows=rows) for picture in some] for some in pictures)
        regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(known, train.truth)
        right[name] = regression.predict(unseen) == held_out.truth
        player, rules = ColourPlayer(regression, columns, rows), RoomRules(level, noise=options.noise)
        rooms = tqdm(range(options.num_rooms), desc=f"level {level}, {name}", unit="room")
        solved[name] = sum(play_room(player, seed=seed, rules=rules).is_solved for seed in rooms)
    return {
        "level": level,
        "num_decisions": len(held_out.truth),
        "right": {name: int(hits.sum()) for name, hits in right.items()},
        "solved": solved,
    }


def format_level(result: dict[str, Any], *, num_rooms: int) -> str:
    """Return a level as a row of a Markdown table."""
    total, cells = result["num_decisions"], [str(result["level"])]
    for name, count in result["right"].items():
        cells.append(format_percent(count / total))
        if name in PARTS:
            cells[-1] += f" ({format_interval(wilson_interval(count, total))})"
    return "| " + " | ".join([*cells, *(f"{count} of {num_rooms}" for count in result["solved"].values())]) + " |"


def main() -> None:
    (options,) = cli.parse_options(ColourOptions, description=__doc__)
    results = []
    for level in options.levels:
        with tempfile.TemporaryDirectory(prefix="pokegemma_colours_") as folder:
            results.append(measure_level(Path(folder), level=level, options=options))
    if options.json:
        json.dump({"results": results, "options": asdict(options), "commit": git_commit()}, sys.stdout, indent=2)
        return
    columns = ["level", *(label for label, _ in BASELINES.values()), *PARTS, *(f"rooms, {name}" for name in PARTS)]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for result in results:
        print(format_level(result, num_rooms=options.num_rooms))
    print(f"{platform.platform()}, {os.cpu_count()} cores, commit {git_commit()}")


if __name__ == "__main__":
    cli.run(main)
