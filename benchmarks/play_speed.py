"""Time play on the toy game's ROM in mGBA: where a recorded turn spends its time, and several games at once.

    python benchmarks/play_speed.py --model_path outputs/toy/merged

A model decides each turn, and the journal records it. The expert's button is pressed whatever the model decides, so
every model plays the same turns and leaves each room. Without --model_path it is a tiny Gemma 3 of random weights. The
same rooms are also played in several processes and in one, where the time until the models are loaded does not count.
"""

import functools
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

if __name__ == "__main__":  # a script has only its own folder on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pokegemma.cli import parse_options, run
from pokegemma.data.convert import WindowOptions
from pokegemma.data.prompts import LAYOUTS
from pokegemma.errors import check_range
from pokegemma.evaluation.predict import load_predictor
from pokegemma.gemma.tiny.make import make_tiny
from pokegemma.options import option
from pokegemma.parallel.workers import map_items
from pokegemma.play.cached_player import CachedPlayer
from pokegemma.play.emulators.emulator import PressTiming
from pokegemma.play.emulators.frames import FrameEmulator
from pokegemma.play.emulators.retro_console import RetroConsole
from pokegemma.play.emulators.rom_file import read_rom
from pokegemma.play.history import PlayView
from pokegemma.play.loop import STAGES, play
from pokegemma.play.players import ButtonChoice
from pokegemma.play.recording.journal import SessionJournal
from pokegemma.play.rom.build import build_rom
from pokegemma.play.rom.game import ToyRomEmulator
from pokegemma.play.toy.world import ToyWorld
from pokegemma.provenance import git_commit, package_versions
from pokegemma.tables import format_table

MODEL_STAGES = ("decide", "prepare")
MAX_TURNS_OF_A_ROOM = 200
MIN_ROOMS_OF_A_PROCESS = 2


@dataclass(frozen=True)
class SpeedOptions:
    model_path: str | None = option(None, "Merged Gemma 3 checkpoint; default: a tiny one.")
    layout: str = option("grid", "grid, frames or trajectory.", choices=list(LAYOUTS))
    num_frames: int = option(4, "Frames that a decision shows.")
    level: int = option(1, "Level of the rooms.")
    num_turns: int = option(1000, "Turns to play and record; the last room is finished.")
    num_rooms: int = option(16, "Rooms to play in one and in several processes; 0: none.")
    num_workers: int = option(2, "Processes that play at once.")
    num_threads: int = option(1, "Threads of each process; a tiny model gains by no second.")
    json: bool = option(False, "Print JSON instead of tables.")

    def __post_init__(self) -> None:
        check_range("--num_turns", self.num_turns, at_least=1)
        check_range("--num_workers", self.num_workers, at_least=2)
        if self.num_rooms:
            check_range("--num_rooms", self.num_rooms, at_least=MIN_ROOMS_OF_A_PROCESS * self.num_workers)


@dataclass(frozen=True)
class PlayedRoom:
    """A room that was played: in which process, when (seconds of the machine's clock), and seconds of each stage."""

    process: int
    began: float
    ended: float
    seconds: dict[str, list[float]]

    @property
    def num_turns(self) -> int:
        return len(self.seconds["decide"])


class TimedConsole(RetroConsole):
    """A console that counts its frames, and the time that the emulator takes for them."""

    num_frames, seconds = 0, 0.0

    def step(self, frames: int) -> None:
        began = time.perf_counter()
        super().step(frames)
        self.num_frames, self.seconds = self.num_frames + frames, self.seconds + time.perf_counter() - began


class ExpertPress:
    """A model that decides, and an expert whose button is pressed."""

    def __init__(self, model: CachedPlayer, game: ToyRomEmulator):
        self.name, self._model, self._game = model.name, model, game
        self.start, self.pressed, self.prepare = model.start, model.pressed, model.prepare

    def decide(self, frame: Image.Image | str | Path, *, time: float | None = None) -> ButtonChoice:
        choice = self._model.decide(frame, time=time)
        return ButtonChoice(self._game.world.expert_button(), choice.probabilities)


def load_player(options: SpeedOptions, model_path: str) -> CachedPlayer:
    """Return the model as a player."""
    torch.set_num_threads(options.num_threads)
    view = PlayView(layout=options.layout, window=WindowOptions(num_frames=options.num_frames))
    return CachedPlayer(load_predictor(model_path, layout=options.layout), view)


def play_room(seed: int, player: CachedPlayer, *, level: int, record_to: Path) -> PlayedRoom:
    """Play and record one room."""
    game = ToyRomEmulator(seed, level=level)
    began = time.monotonic()
    with SessionJournal(record_to / f"session_{seed}", goal=game.world.goal, facts={"emulator": game.name}) as journal:
        result = play(
            game,
            ExpertPress(player, game),
            goal=game.world.goal,
            max_turns=MAX_TURNS_OF_A_ROOM,
            journal=journal,
            is_done=lambda: game.world.is_done,
        )
    game.close()
    return PlayedRoom(os.getpid(), began, time.monotonic(), result.seconds)


def measure_stages(options: SpeedOptions, model_path: str, folder: Path) -> list[PlayedRoom]:
    """Play rooms in this process until `num_turns` are recorded; one more room before that warms up."""
    player = load_player(options, model_path)
    play_room(0, player, level=options.level, record_to=folder / "warm_up")
    rooms: list[PlayedRoom] = []
    while sum(room.num_turns for room in rooms) < options.num_turns:
        rooms.append(play_room(len(rooms), player, level=options.level, record_to=folder / "recorded"))
    return rooms


def measure_processes(options: SpeedOptions, model_path: str, folder: Path, *, num_workers: int) -> float:
    """Return turns a second of `num_workers` processes together, from when all have begun until the first has no more.

    The first room of each process warms up.
    """
    rooms = list(
        map_items(
            functools.partial(play_room, level=options.level, record_to=folder),
            range(options.num_rooms),
            num_workers=num_workers,
            initialize=functools.partial(load_player, options, model_path),
            label=f"{num_workers} processes",
            unit="room",
        )
    )
    processes = {room.process for room in rooms}
    began = max(sorted(room.ended for room in rooms if room.process == process)[0] for process in processes)
    ended = min(max(room.ended for room in rooms if room.process == process) for process in processes)
    return sum(turns_between(room, began, ended) for room in rooms) / (ended - began)


def measure_frames(level: int) -> dict[str, float]:
    """Return the frames of a press and the milliseconds that mGBA alone takes for one, in a room of the expert."""
    with tempfile.TemporaryDirectory() as folder:
        rom = Path(folder) / "toy.gba"
        rom.write_bytes(build_rom(0, level))
        console = TimedConsole(read_rom(rom))
    game, world, num_presses = FrameEmulator(console, timing=PressTiming()), ToyWorld(0, level=level), 0
    num_before, seconds_before = console.num_frames, console.seconds
    while not world.is_done:
        button = world.expert_button()
        game.press(button)
        world.press(button)
        num_presses += 1
    game.close()
    num_frames, seconds = console.num_frames - num_before, console.seconds - seconds_before
    return {"frames_of_a_press": num_frames / num_presses, "ms_of_a_frame": 1000 * seconds / num_frames}


def turns_between(room: PlayedRoom, began: float, ended: float) -> float:
    """Return the turns that a room had in a time, as if all its turns took equally long."""
    overlap = min(room.ended, ended) - max(room.began, began)
    return max(0.0, overlap) / (room.ended - room.began) * room.num_turns


def stage_rows(rooms: Sequence[PlayedRoom]) -> list[dict[str, float | str]]:
    """Return, for each stage, milliseconds a turn (mean, median, 95th percentile) and its share of all time."""
    total = sum(sum(room.seconds[stage]) for room in rooms for stage in STAGES)
    rows: list[dict[str, float | str]] = []
    for stage in STAGES:
        seconds = np.array([value for room in rooms for value in room.seconds[stage]])
        middle, high = np.percentile(seconds, (50, 95)) * 1000
        rows.append(
            {"stage": stage, "mean": seconds.mean() * 1000, "p50": middle, "p95": high, "share": seconds.sum() / total}
        )
    return rows


def share_outside(rows: Sequence[dict[str, float | str]], name: str) -> float:
    """Return the share of a turn that is not the model's, by the mean or by the median (p50) of each stage.

    On a machine that others use, too, medians say more: a sync may wait for another program's writes.
    """
    return sum(row[name] for row in rows if row["stage"] not in MODEL_STAGES) / sum(row[name] for row in rows)


def print_tables(result: dict) -> None:
    rows = [
        [row["stage"], *(f"{row[name]:.2f}" for name in ("mean", "p50", "p95")), f"{row['share']:.1%}"]
        for row in result["stages"]
    ]
    print(format_table([["stage, ms a turn", "mean", "p50", "p95", "share"], *rows]))
    outside = result["outside_model"]
    print(f"outside the model: {outside['mean']:.1%} of {result['num_turns']} turns; by medians {outside['p50']:.1%}")
    frames = result["mgba"]
    print(
        f"mGBA alone takes {frames['frames_of_a_press']:.1f} frames of {frames['ms_of_a_frame']:.3f} ms for a press: "
        f"{frames['share']:.1%} of a turn"
    )
    if result["processes"]:
        rows = [[str(number), f"{speed:.1f}"] for number, speed in result["processes"].items()]
        print(format_table([["processes", "turns a second"], *rows]))
        several, single = result["processes"].values()
        print(f"several processes: {several / single:.2f} times one")


def main() -> None:
    (options,) = parse_options(SpeedOptions, description=__doc__)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model_path = options.model_path or str(folder / "tiny")
        if options.model_path is None:
            (folder / "tiny").mkdir()
            make_tiny("gemma3", folder / "tiny")
        # Several processes first: a process that has used OpenMP's threads must not be forked.
        processes = {
            number: measure_processes(options, model_path, folder / str(number), num_workers=number)
            for number in (options.num_workers, 1)
            if options.num_rooms
        }
        rooms = measure_stages(options, model_path, folder)
    rows = stage_rows(rooms)
    mgba = measure_frames(options.level)
    mgba["share"] = mgba["frames_of_a_press"] * mgba["ms_of_a_frame"] / sum(row["mean"] for row in rows)
    result = {
        "processes": processes,
        "stages": rows,
        "outside_model": {name: share_outside(rows, name) for name in ("mean", "p50")},
        "mgba": mgba,
        "num_turns": sum(room.num_turns for room in rooms),
    }
    facts = {"machine": platform.platform(), "cores": os.cpu_count(), "commit": git_commit()}
    if options.json:
        print(json.dumps({**result, **facts, "options": asdict(options), "packages": package_versions()}, indent=2))
    else:
        print_tables(result)
        print(", ".join(f"{key} {value}" for key, value in facts.items()))


if __name__ == "__main__":
    run(main)
