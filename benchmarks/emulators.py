"""Time each emulator, the library alone and through our interface, in one run.

    python benchmarks/emulators.py

A frame is a step and a picture of it as Pillow's Image. A press holds 12 frames and waits for a still picture. The
games are our own: the toy game's ROM, and the small ROM of the tests. SkyEmu is the stand-in of the tests with the toy
game, so its row shows what the client costs. `--skyemu_url` times a real one; it presses buttons in the open game.
"""

import io
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the games of the tests

from pokegemma import cli
from pokegemma.errors import check_ranges
from pokegemma.options import option
from pokegemma.play.emulators.emulator import PressTiming
from pokegemma.play.emulators.frames import FrameEmulator
from pokegemma.play.emulators.open import open_emulator
from pokegemma.play.emulators.pyboy_console import PyBoyConsole
from pokegemma.play.emulators.rom_file import read_rom
from pokegemma.play.rom.build import build_rom
from pokegemma.provenance import git_commit, package_versions
from pokegemma.tables import format_table
from tests.play.homebrew import write_roms
from tests.play.skyemu_server import SkyEmuServer, SkyEmuState, ToyFrames

BUTTONS = ("up", "left", "down", "right")


@dataclass(frozen=True)
class BenchmarkOptions:
    """How much is timed."""

    num_frames: int = option(600, "frames in each timing")
    num_presses: int = option(40, "presses in each timing")
    repeats: int = option(5, "how often each is timed")
    skyemu_url: str | None = option(None, "also time a SkyEmu that runs, such as your own")
    json: bool = option(False, "print the result as JSON")

    def __post_init__(self) -> None:
        check_ranges(self, "num_frames", "num_presses", "repeats", at_least=1)


@contextmanager
def retro_frames(path: Path) -> Iterator[Callable[[], object]]:
    """Yield a function that makes one frame with stable-retro alone."""
    import stable_retro

    emulator = stable_retro.RetroEmulator(str(path))

    def frame() -> object:
        emulator.step()
        return Image.fromarray(emulator.get_screen())

    yield frame


@contextmanager
def pyboy_frames(path: Path) -> Iterator[Callable[[], object]]:
    """Yield a function that makes one frame with PyBoy alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pyboy import PyBoy

    pyboy = PyBoy(io.BytesIO(path.read_bytes()), window="null", sound_emulated=False)
    pyboy.set_emulation_speed(0)

    def frame() -> object:
        pyboy.tick(1, True, False)
        return pyboy.screen.image.copy()

    yield frame
    pyboy.stop(save=False)


def per_second(work: Callable[[], object], count: int) -> float:
    """Return how often `work` can be done in a second, from doing it `count` times."""
    start = time.perf_counter()
    for _ in range(count):
        work()
    return count / (time.perf_counter() - start)


def time_library(library: Callable[[], Any], options: BenchmarkOptions) -> float:
    """Return frames a second; the emulator ends with this function, since stable-retro has one at a time."""
    with library() as frame:
        return per_second(frame, options.num_frames)


def time_ours(game: FrameEmulator, options: BenchmarkOptions) -> tuple[float, float]:
    """Return frames with their picture, and presses, a second."""

    def frame() -> None:
        game.advance(1)
        game.screen()

    presses = iter(BUTTONS * options.num_presses)
    frames_per_s = per_second(frame, options.num_frames)
    return frames_per_s, per_second(lambda: game.press(next(presses)), options.num_presses)


def measure(folder: Path, options: BenchmarkOptions) -> dict[str, dict[str, list[float]]]:
    """Return what was timed of each emulator, in turns."""
    roms, timing = write_roms(folder), PressTiming()
    (folder / "toy.gba").write_bytes(build_rom(5))
    with SkyEmuServer(SkyEmuState(ToyFrames(5))) as server:
        games: dict[str, tuple[Callable[[], Any], Callable[[], Any] | None]] = {
            "mGBA (stable-retro)": (
                lambda: open_emulator(str(folder / "toy.gba"), timing=timing),
                lambda: retro_frames(folder / "toy.gba"),
            ),
            "Gambatte (stable-retro)": (
                lambda: open_emulator(str(roms["GB"]), timing=timing),
                lambda: retro_frames(roms["GB"]),
            ),
            "PyBoy": (
                lambda: FrameEmulator(PyBoyConsole(read_rom(roms["GB"])), timing=timing),
                lambda: pyboy_frames(roms["GB"]),
            ),
            "SkyEmu's stand-in": (lambda: open_emulator(server.url, timing=timing), None),
            "toy game in Python": (lambda: open_emulator("toy", timing=timing), None),
        }
        if options.skyemu_url is not None:
            games["SkyEmu"] = lambda: open_emulator(options.skyemu_url, timing=timing), None
        rates: dict[str, dict[str, list[float]]] = {name: {"library": [], "ours": [], "presses": []} for name in games}
        for _ in tqdm(range(options.repeats), desc="repeats"):
            for name, (start, library) in games.items():
                if library is not None:
                    rates[name]["library"].append(time_library(library, options))
                game = start()
                frames_per_s, presses_per_s = time_ours(game, options)
                game.close()
                rates[name]["ours"].append(frames_per_s)
                rates[name]["presses"].append(presses_per_s)
    return rates


def main() -> None:
    (options,) = cli.parse_options(BenchmarkOptions, description=__doc__)
    with tempfile.TemporaryDirectory() as folder:
        rates = measure(Path(folder), options)
    medians = {
        name: {key: statistics.median(values) for key, values in row.items() if values} for name, row in rates.items()
    }
    result = {
        "per_second": {name: {key: round(value, 1) for key, value in row.items()} for name, row in medians.items()},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "versions": {name: package_versions()[name] for name in ("python", "pillow")},
        "git_commit": git_commit(),
    }
    if options.json:
        json.dump(result, sys.stdout, indent=2)
        print()
        return
    rows = [
        [
            name,
            f"{row['library']:,.0f}" if "library" in row else "",
            f"{row['ours']:,.0f}",
            f"{row['ours'] / row['library']:.2f}" if "library" in row else "",
            f"{row['presses']:,.0f}",
        ]
        for name, row in medians.items()
    ]
    print(format_table([["frames/s with picture", "library", "ours", "ratio", "presses/s"], *rows]))
    print(*(f"{name}: {result[name]}" for name in ("machine", "load_average", "versions", "git_commit")), sep="\n")


if __name__ == "__main__":
    cli.run(main)
