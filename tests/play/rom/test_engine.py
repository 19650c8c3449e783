"""The engine of the toy ROM: how long a step takes, what a tap does, and what is in the memory."""

import itertools
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from pokegemma.play.rom import build
from pokegemma.play.toy.rooms import neighbour
from pokegemma.play.toy.world import ToyWorld
from tests.play.rom.rom_console import RomConsole

COMPILER_VERSION = "12.2.1"
START = (11, 11)
"""Of room 5 on level 3, where the player looks up. Two cells below are free, the other three directions are blocked."""

Open = Callable[..., RomConsole]


def compiler_version() -> str | None:
    if shutil.which("arm-none-eabi-gcc") is None:
        return None
    command = ["arm-none-eabi-gcc", "-dumpversion"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def open_console(tmp_path: Path) -> Iterator[Open]:
    pytest.importorskip("stable_retro", reason="needs stable-retro (./init.sh --with play)")
    consoles: list[RomConsole] = []

    def start(*, seed: int = 5, level: int = 3) -> RomConsole:
        consoles.clear()
        consoles.append(RomConsole(tmp_path, seed=seed, level=level))
        return consoles[0]

    yield start
    consoles.clear()


@pytest.mark.skipif(
    compiler_version() != COMPILER_VERSION, reason=f"needs arm-none-eabi-gcc {COMPILER_VERSION} (Debian 12)"
)
def test_the_engine_is_what_the_compiler_makes_of_its_source(tmp_path: Path) -> None:
    script = Path(build.__file__).with_name("compile_engine.sh")
    subprocess.run([script, tmp_path / "engine.bin"], check=True)
    assert (tmp_path / "engine.bin").read_bytes() == build.ENGINE.read_bytes()


def test_a_room_begins_as_in_python(open_console: Open) -> None:
    room, state = ToyWorld(5, level=3).room, open_console().state()
    assert (state.player, state.facing) == (room.start, room.heading) == (START, "up")
    assert (state.situation, state.num_unread_signs, state.is_done, state.is_busy) == ("navigation", 4, False, False)


@pytest.mark.parametrize("num_frames", [1, 4, 8])
def test_a_tap_only_turns_the_player(open_console: Open, num_frames: int) -> None:
    console = open_console()
    console.hold("down", num_frames)
    assert (console.state().facing, console.state().player) == ("down", START)


@pytest.mark.parametrize("num_frames", [9, 12, 16])
def test_a_press_turns_the_player_and_moves_it_by_one_cell(open_console: Open, num_frames: int) -> None:
    console = open_console()
    console.hold("down", num_frames)
    assert (console.state().facing, console.state().player) == ("down", neighbour(START, "down"))


@pytest.mark.parametrize(("num_frames", "num_cells"), [(2, 1), (16, 1), (20, 2)])
def test_a_player_who_looks_ahead_walks_at_once(open_console: Open, num_frames: int, num_cells: int) -> None:
    console = open_console()
    console.hold("down", 4)
    console.hold("down", num_frames)
    assert console.state().player == (11, 11 + num_cells)


def test_a_blocked_player_turns_and_stays(open_console: Open) -> None:
    console = open_console()
    console.hold("left", 12)
    assert (console.state().facing, console.state().player) == ("left", START)


def test_a_step_takes_16_frames_and_no_picture_is_half_drawn(open_console: Open) -> None:
    console = open_console()
    console.hold("down", 4)
    screens, is_busy = [console.screen()], []
    for frame in range(24):
        console.run(1, "down" if frame < 12 else None)
        screens.append(console.screen())
        is_busy.append(console.state().is_busy)
    assert is_busy == [True] * 15 + [False] * 9
    moves = [pair for pair in itertools.pairwise(screens) if (pair[0] != pair[1]).any()]
    assert (screens[2] != screens[0]).any()  # a press is seen within two frames
    assert len(moves) == 8  # four pixels, every other frame
    for before, after in moves:
        is_ground = np.ones((160, 240), bool)
        is_ground[60:100, 104:136] = False  # the player
        moved = np.where(is_ground[:-4, :, None], before[4:], after[:-4])
        assert (after[:-4] == moved).all()


def test_a_menu_slides_in_and_no_picture_is_half_drawn(open_console: Open) -> None:
    console = open_console()
    before, edges = console.screen(), []
    for frame in range(20):
        console.run(1, "start" if frame < 12 else None)
        columns = np.flatnonzero((console.screen() != before).any(axis=(0, 2)))
        edges.append(int(columns.min()) if len(columns) else None)
    first = edges.index(230)
    assert edges[first : first + 8] == [230, 216, 202, 188, 174, 160, 146, 132]
    assert set(edges[first + 7 :]) == {132}


@pytest.mark.parametrize("level", [2, 5, 6])
def test_the_memory_follows_the_rules(open_console: Open, level: int) -> None:
    console, world = open_console(seed=1, level=level), ToyWorld(1, level=level)
    seen = set()
    while not world.is_done:
        button = world.expert_button()
        world.press(button)
        console.hold(button, 12)
        state = console.state()
        assert (state.facing, state.situation, state.is_done) == (world.facing, world.situation, world.is_done)
        seen.add(state.situation)
    assert {"navigation", "sign", "dialogue", "bell", "menu", "done"} <= seen
    assert (state.player, state.num_unread_signs) == (world.room.door, 0)
