"""A small game of our own in the real emulators: mGBA and Gambatte of stable-retro, and PyBoy."""

import multiprocessing
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from pokegemma.data.prompts import BUTTONS
from pokegemma.errors import PokegemmaError
from pokegemma.play.emulators.emulator import PressTiming
from pokegemma.play.emulators.frames import FrameEmulator
from pokegemma.play.emulators.open import open_emulator
from pokegemma.play.emulators.pyboy_console import PyBoyConsole, has_pyboy
from pokegemma.play.emulators.retro_console import RetroConsole, has_stable_retro
from pokegemma.play.emulators.rom_file import read_rom
from pokegemma.play.emulators.state_file import read_state
from tests.play.homebrew import BUTTON_NUMBERS, build_gba_rom, read_screen, write_roms

needs_retro = pytest.mark.skipif(not has_stable_retro(), reason="needs stable-retro (./init.sh --with play)")
needs_pyboy = pytest.mark.skipif(not has_pyboy(), reason="needs PyBoy (./init.sh --with pyboy)")
CONSOLES = {
    "mGBA": (RetroConsole, "GBA"),
    "Gambatte, GB": (RetroConsole, "GB"),
    "Gambatte, GBC": (RetroConsole, "GBC"),
    "PyBoy, GB": (PyBoyConsole, "GB"),
    "PyBoy, GBC": (PyBoyConsole, "GBC"),
}
Start = Callable[..., FrameEmulator]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Return a function that starts the game in one of CONSOLES; what it started is closed at the end."""
    started = []

    def start_console(name: str, **timing: int) -> FrameEmulator:
        console, system = CONSOLES[name]
        rom = read_rom(write_roms(tmp_path)[system])
        started.append(FrameEmulator(console(rom), timing=PressTiming(**timing)))
        return started[-1]

    yield start_console
    for emulator in started:
        emulator.close()


every_console = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs_pyboy if "PyBoy" in name else needs_retro) for name in CONSOLES]
)


@every_console
def test_each_button_changes_the_picture(name: str, start: Start) -> None:
    game = start(name)
    assert read_screen(game.screen()) == (BUTTON_NUMBERS[None], 0, 0)
    seen = []
    for button in BUTTONS:
        game.press(button)
        seen.append(read_screen(game.screen()))
    walked = (1, 2, 3, 4, 4, 4, 4, 4)
    assert seen == [(BUTTON_NUMBERS[button], 0, tiles) for button, tiles in zip(BUTTONS, walked, strict=True)]
    assert (game.screen().mode, game.screen().size) == ("RGB", game.frame_size)


@every_console
def test_a_loaded_state_is_the_same_game_bit_for_bit(name: str, start: Start) -> None:
    game = start(name)
    for button in ("up", "a", "left"):
        game.press(button)
    state, screen = game.save(), game.screen().tobytes()

    def play_on() -> list[bytes]:
        screens = []
        for button in ("left", "left", "down", "start", "select"):
            game.press(button)
            screens.append(game.screen().tobytes())
        return screens

    after = play_on()
    game.load(state)
    assert game.screen().tobytes() == screen, "at once, though the core still shows the old picture"
    assert play_on() == after
    assert len(set(after)) == len(after)


@every_console
@pytest.mark.parametrize(
    ("hold", "tiles_walked"),
    [(4, 0), (8, 0), (12, 1), (16, 1), (27, 2)],
)
def test_a_tap_turns_and_a_press_walks_one_tile(name: str, hold: int, tiles_walked: int, start: Start) -> None:
    game = start(name, hold_frames=hold)
    game.press("left")
    assert read_screen(game.screen()) == (BUTTON_NUMBERS["left"], 0, tiles_walked)


@every_console
def test_a_press_waits_until_the_walk_has_ended(name: str, start: Start) -> None:
    game = start(name)
    game.press("left")
    game.press("left")
    screen = game.screen().tobytes()
    game.advance(30)
    assert game.screen().tobytes() == screen


@every_console
def test_the_wait_is_bounded_where_the_picture_never_stays_still(name: str, start: Start) -> None:
    game = start(name, hold_frames=12, still_frames=1, max_wait_frames=5)
    game.press("left")
    _, left_in_tile, _ = read_screen(game.screen())
    assert left_in_tile in range(4, 12), "12 + 5 frames after the press, of which 9 turned the player"
    game.advance(20)
    assert read_screen(game.screen()) == (BUTTON_NUMBERS["left"], 0, 1)


@every_console
def test_no_button_stays_pressed(name: str, start: Start) -> None:
    game = start(name, hold_frames=30)
    game.press("left")
    walked = read_screen(game.screen())
    game.advance(120)
    assert read_screen(game.screen()) == walked


@every_console
def test_screens_are_copies(name: str, start: Start) -> None:
    game = start(name)
    screen = game.screen()
    before = screen.tobytes()
    game.press("left")
    assert screen.tobytes() == before
    screen.paste((1, 2, 3), (0, 0, *screen.size))
    assert read_screen(game.screen()) == (BUTTON_NUMBERS["left"], 0, 1)


@every_console
def test_an_unknown_button_is_refused(name: str, start: Start) -> None:
    with pytest.raises(ValueError, match="jump"):
        start(name).press("jump")


@every_console
def test_a_state_of_another_game_or_emulator_is_refused(name: str, start: Start) -> None:
    from pokegemma.play.emulators.toy import ToyEmulator

    game = start(name)
    console = game._console
    other = replace(read_state(game.save(), core=console.core, game=console.game), game="0" * 64).to_bytes()
    screen = game.screen().tobytes()
    for state, words in ((other, "another game"), (ToyEmulator(1).save(), "another emulator"), (b"x", "not a saved")):
        with pytest.raises(PokegemmaError, match=words):
            game.load(state)
    assert game.screen().tobytes() == screen


@every_console
def test_nothing_is_written_next_to_the_rom(name: str, start: Start, tmp_path: Path) -> None:
    game = start(name)
    game.press("a")
    game.close()
    game.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["game.gb", "game.gba", "game.gbc"]


@needs_retro
def test_a_second_game_in_a_process_is_refused_until_the_first_is_closed(start: Start, tmp_path: Path) -> None:
    first = start("mGBA")
    with pytest.raises(PokegemmaError, match=r"one game in a process, and .*game\.gba is running"):
        start("Gambatte, GB")
    first.press("a")
    first.close()
    second = start("Gambatte, GB")
    second.press("a")
    assert read_screen(second.screen())[0] == BUTTON_NUMBERS["a"]


@needs_retro
def test_a_game_that_was_dropped_makes_place_for_another(tmp_path: Path) -> None:
    path = write_roms(tmp_path)["GBA"]
    for _ in range(3):
        game = open_emulator(str(path), timing=PressTiming())
        game.press("a")
        del game
    open_emulator(str(path), timing=PressTiming()).close()


def press_in_new_process(path: Path, button: str) -> tuple[int, int, int]:
    game = open_emulator(str(path), timing=PressTiming())
    game.press(button)
    screen = read_screen(game.screen())
    game.close()
    return screen


@needs_retro
def test_games_run_side_by_side_in_processes(tmp_path: Path) -> None:
    paths = write_roms(tmp_path)
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(press_in_new_process, paths[system], "up") for system in ("GBA", "GB")]
        assert [future.result() for future in futures] == [(BUTTON_NUMBERS["up"], 0, 1)] * 2


@needs_retro
def test_the_name_states_emulator_version_and_core(start: Start) -> None:
    assert re.fullmatch(r"stable-retro 1\.\d+\.\d+ \(mGBA\)", start("mGBA").name)


@needs_retro
def test_a_rom_is_found_by_any_name(tmp_path: Path) -> None:
    path = tmp_path / "Spiel ü.GBA"
    path.write_bytes(build_gba_rom())
    game = open_emulator(str(path), timing=PressTiming())
    assert game.frame_size == (240, 160)
    game.close()


@needs_pyboy
def test_two_games_in_pyboy_do_not_disturb_each_other(start: Start) -> None:
    first, second = start("PyBoy, GB"), start("PyBoy, GBC")
    first.press("a")
    second.press("b")
    assert (read_screen(first.screen())[0], read_screen(second.screen())[0]) == (1, 2)


@needs_pyboy
def test_a_state_with_a_held_button_is_released_in_pyboy(start: Start, tmp_path: Path) -> None:
    game = start("PyBoy, GB", hold_frames=12)
    console = game._console
    console.set_button("left")
    console.step(2)
    held = console.get_state()
    console.set_button(None)
    console.set_state(held)
    console.step(60)
    assert read_screen(console.picture())[2] <= 1


@pytest.mark.parametrize(
    ("machine", "name", "words"),
    [
        ("x86_64", "GBA", r"\./init\.sh --with play, or pip install"),
        ("x86_64", "GB", r"\./init\.sh --with play, or pip install"),
        ("aarch64", "GBA", "open the game in SkyEmu"),
        ("aarch64", "GBC", r"\./init\.sh --with pyboy, or pip install"),
    ],
)
def test_without_an_emulator_the_error_names_the_command(
    machine: str, name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for has in ("has_stable_retro", "has_pyboy"):
        monkeypatch.setattr(f"pokegemma.play.emulators.open.{has}", lambda: False)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("platform.machine", lambda: machine)
    with pytest.raises(PokegemmaError, match=words):
        open_emulator(str(write_roms(tmp_path)[name]), timing=PressTiming())


@needs_pyboy
def test_pyboy_plays_where_stable_retro_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pokegemma.play.emulators.open.has_stable_retro", lambda: False)
    game = open_emulator(str(write_roms(tmp_path)["GB"]), timing=PressTiming())
    assert game.name.startswith("PyBoy 2.")
    game.close()
