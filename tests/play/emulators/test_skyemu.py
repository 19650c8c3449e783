"""SkyEmu over HTTP, with a stand-in that speaks its protocol and fails as it does."""

import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pokegemma.data.prompts import BUTTONS
from pokegemma.errors import PokegemmaError
from pokegemma.play.emulators import skyemu_console
from pokegemma.play.emulators.emulator import PressTiming
from pokegemma.play.emulators.frames import FrameEmulator
from pokegemma.play.emulators.open import open_emulator
from pokegemma.play.emulators.retro_console import has_stable_retro
from pokegemma.play.emulators.skyemu_client import NoAnswerError, SkyEmuClient, SkyEmuError, SkyEmuLimits, read_ok
from pokegemma.play.emulators.skyemu_console import SkyEmuConsole, decode_screen, read_status
from pokegemma.play.emulators.toy import ToyEmulator
from pokegemma.provenance import PROJECT_ROOT
from tests.play.homebrew import read_screen, write_roms
from tests.play.skyemu_server import BUTTONS as SKYEMU_BUTTONS
from tests.play.skyemu_server import FAULTS, RomFrames, SkyEmuServer, SkyEmuState, ToyFrames, encode_bmp
from tests.processes import free_port, killed_after, take_sigint

LIMITS = SkyEmuLimits(timeout_s=0.05, patience_s=20)
DELAY_S = 0.1
"""Of an answer that comes too late for LIMITS."""


@pytest.fixture
def server() -> Iterator[SkyEmuServer]:
    """Return a stand-in that runs room 5 of the toy game."""
    with SkyEmuServer(SkyEmuState(ToyFrames(5)), delay_s=DELAY_S) as server:
        yield server


@pytest.fixture
def game(server: SkyEmuServer) -> Iterator[FrameEmulator]:
    """Return the emulator that plays the stand-in."""
    emulator = FrameEmulator(SkyEmuConsole(server.url, limits=LIMITS), timing=PressTiming())
    yield emulator
    emulator.close()


def test_the_expert_sees_the_screens_of_the_toy_game_in_python(server: SkyEmuServer) -> None:
    game, toy = open_emulator(server.url, timing=PressTiming()), ToyEmulator(5)
    assert (game.frame_size, game.name) == ((240, 160), "SkyEmu (0abc05931c3f)")
    while not toy.world.is_done:
        assert game.screen().tobytes() == toy.screen().tobytes()
        button = toy.world.expert_button()
        game.press(button)
        toy.press(button)
    game.close()
    assert server.state.game.world.is_done


def test_all_buttons_have_a_name_that_skyemu_knows(game: FrameEmulator, server: SkyEmuServer) -> None:
    for button in BUTTONS:
        game.press(button)
    assert [pressed for frames, pressed in server.state.steps if frames == 12] == [(button,) for button in BUTTONS]


def test_buttons_that_are_pressed_are_released_on_connect(server: SkyEmuServer) -> None:
    server.state.inputs.update(dict.fromkeys(SKYEMU_BUTTONS, 1.0))
    game = open_emulator(server.url, timing=PressTiming())
    assert server.state.pressed == []
    assert {pressed for _, pressed in server.state.steps} == {()}
    game.close()


def test_the_first_black_picture_is_never_seen(server: SkyEmuServer) -> None:
    assert server.state.shown.getbbox() is None
    game = open_emulator(server.url, timing=PressTiming())
    assert game.screen().tobytes() == ToyEmulator(5).screen().tobytes()
    game.close()


def test_buttons_are_released_where_a_press_is_interrupted(
    game: FrameEmulator, server: SkyEmuServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(console: SkyEmuConsole, frames: int) -> None:
        assert server.state.pressed == ["up"]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SkyEmuConsole, "step", interrupt)
        game.press("up")
    assert server.state.pressed == []


PLAY_FOR_EVER = """
import sys, time
from pokegemma.cli import run
from pokegemma.play.emulators.emulator import PressTiming
from pokegemma.play.emulators.open import open_emulator

def main():
    game = open_emulator(sys.argv[1], timing=PressTiming(hold_frames=1, max_wait_frames=4))
    game._console.set_button("up")
    print("pressed", flush=True)
    if sys.argv[2] == "leave":
        return
    time.sleep(600)

run(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, "leave"])
def test_buttons_are_released_where_the_program_ends(how: signal.Signals | str, server: SkyEmuServer) -> None:
    process = start(PLAY_FOR_EVER, server.url, str(how))
    with killed_after(process):
        assert process.stdout.readline() == "pressed\n"
        if isinstance(how, signal.Signals):
            assert server.state.pressed == ["up"]
            process.send_signal(how)
        _, stderr = process.communicate()
    assert server.state.pressed == []
    assert "Traceback" not in stderr


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, cwd=PROJECT_ROOT, stdout=pipe, stderr=pipe, text=True, preexec_fn=take_sigint)


PLAY_ON = """
import sys
from contextlib import closing
from pokegemma.cli import run
from pokegemma.play.emulators.emulator import PressTiming
from pokegemma.play.emulators.open import open_emulator

def main():
    with closing(open_emulator(sys.argv[1], timing=PressTiming())) as game:
        print("plays", flush=True)
        while True:
            for button in ("up", "left", "a"):
                game.press(button)

run(main)
"""


@pytest.mark.slow
def test_buttons_are_released_at_whatever_moment_a_player_is_ended(server: SkyEmuServer) -> None:
    rng = random.Random(5)
    for how in [signal.SIGTERM, signal.SIGINT] * 5:
        process = start(PLAY_ON, server.url)
        with killed_after(process):
            assert process.stdout.readline() == "plays\n"
            time.sleep(rng.uniform(0, 0.3))
            process.send_signal(how)
            _, stderr = process.communicate()
        assert server.state.pressed == []
        assert "Traceback" not in stderr
        assert "could not be released" not in stderr


@pytest.mark.parametrize("command", ["/step", "/input", "/screen"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_press_is_felt_once_whatever_fails(
    command: str, fault: str, game: FrameEmulator, server: SkyEmuServer
) -> None:
    world = server.state.game.world
    button = world.expert_button()
    server.planned = [(command, fault), (command, fault)]
    game.press(button)
    assert server.planned == []
    assert server.state.game.presses == [button]
    assert server.state.pressed == []
    assert game.screen().tobytes() == world.render().tobytes()
    held = [frames for frames, pressed in server.state.steps if pressed]
    assert held in ([12], [12, 12], [12, 12, 12]), "repeated only without release, so that the game sees one press"


@pytest.mark.parametrize("button", ["up", "select"])
@pytest.mark.parametrize("step", ["error", "reset"])  # not done, done
def test_a_press_is_felt_once_where_a_step_is_not_answered_and_the_next_picture_is_black(
    step: str, button: str, game: FrameEmulator, server: SkyEmuServer
) -> None:
    world = server.state.game.world
    button = world.expert_button() if button == "up" else button
    server.planned = [("/step", step), ("/ping", "black")]
    game.press(button)
    assert server.planned == []
    assert server.state.game.presses == [button]
    assert server.state.pressed == []
    assert game.screen().tobytes() == world.render().tobytes()


def test_a_skyemu_that_ended_is_reported_in_one_line(game: FrameEmulator, server: SkyEmuServer) -> None:
    client = game._console._client
    client._limits = SkyEmuLimits(timeout_s=0.1, patience_s=0.2)
    server.close()
    with pytest.raises(SkyEmuError, match=rf"{server.url}: no usable answer to /input for 0\.2 s .*is SkyEmu running"):
        game.press("up")
    game.close()  # does not raise, and does not wait long


def test_a_skyemu_that_never_steps_is_reported(game: FrameEmulator, server: SkyEmuServer) -> None:
    server.planned = [("/step", "error")] * 30
    with pytest.raises(SkyEmuError, match="10 steps were not answered, and the picture stays the same"):
        game.press("up")
    assert server.state.pressed == []


def test_a_skyemu_that_comes_back_is_played_on(game: FrameEmulator, server: SkyEmuServer) -> None:
    server.planned = [("/input", "refused"), ("/step", "refused"), ("/screen", "refused")]
    button = server.state.game.world.expert_button()
    game.press(button)
    assert server.state.game.presses == [button]


def test_a_state_comes_back_as_bytes_and_loads(game: FrameEmulator, server: SkyEmuServer) -> None:
    world = server.state.game.world
    for _ in range(5):
        game.press(world.expert_button())
    state, screen = game.save(), game.screen().tobytes()
    for _ in range(4):
        game.press(server.state.game.world.expert_button())
    after = server.state.game.presses[5:]
    game.load(state)
    assert game.screen().tobytes() == screen
    for _ in range(4):
        game.press(server.state.game.world.expert_button())
    assert server.state.game.presses[5:] == after


def test_a_state_that_skyemu_cannot_read_is_reported(
    game: FrameEmulator, server: SkyEmuServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(skyemu_console, "_LOAD_PATIENCE_S", 0.2)
    state = game.save()
    server.planned = [("/load", "failed")] * 20
    with pytest.raises(PokegemmaError, match="does it run on this machine"):
        game.load(state)


def test_a_state_of_another_rom_is_refused(game: FrameEmulator) -> None:
    other_server = SkyEmuServer(SkyEmuState(ToyFrames(6), rom_path="/roms/other.gba"))
    with other_server:
        other = open_emulator(other_server.url, timing=PressTiming())
        with pytest.raises(PokegemmaError, match=r"another game: toy\.gba, and this is other\.gba"):
            other.load(game.save())
        other.close()


@pytest.mark.skipif(not has_stable_retro(), reason="needs stable-retro (./init.sh --with play)")
def test_a_rom_behind_it_is_the_same_as_in_the_emulator(tmp_path: Path) -> None:
    rom = write_roms(tmp_path)["GBA"]
    buttons = ("up", "up", "a", "left", "start", "left", "down")

    def play(game: FrameEmulator) -> list[tuple[int, int, int]]:
        screens = []
        for button in buttons:
            game.press(button)
            screens.append(read_screen(game.screen()))
        game.close()
        return screens

    frames = RomFrames(rom)
    with SkyEmuServer(SkyEmuState(frames, rom_path=str(rom))) as server:
        over_http = play(open_emulator(server.url, timing=PressTiming()))
    frames.close()
    assert over_http == play(open_emulator(str(rom), timing=PressTiming()))


def test_the_stand_in_runs_as_a_program() -> None:
    command = [sys.executable, "-m", "tests.play.skyemu_server", "toy:7"]
    process = subprocess.Popen(command, cwd=PROJECT_ROOT, stdout=subprocess.PIPE, text=True)
    with killed_after(process):
        game = open_emulator(process.stdout.readline().strip(), timing=PressTiming())
        assert game.screen().tobytes() == ToyEmulator(7).screen().tobytes()
        game.close()


def test_nothing_that_listens_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skyemu_console, "_CONNECT_PATIENCE_S", 0.2)
    url = f"http://127.0.0.1:{free_port()}"
    expected = rf"{url}: no usable answer to /status for 0\.2 s .*refused.*is SkyEmu running"
    with pytest.raises(PokegemmaError, match=expected):
        open_emulator(url, timing=PressTiming())


@pytest.mark.parametrize("url", ["https://127.0.0.1:8080", "http://", "http://host:port", "ftp://host", "http://[1"])
def test_another_url_is_refused(url: str) -> None:
    with pytest.raises(PokegemmaError, match="not an http URL"):
        open_emulator(url, timing=PressTiming())


def test_a_skyemu_without_a_game_is_refused() -> None:
    with (
        SkyEmuServer(SkyEmuState(None)) as server,
        pytest.raises(PokegemmaError, match="no game is open in SkyEmu"),
    ):
        open_emulator(server.url, timing=PressTiming())


def test_another_server_is_refused(monkeypatch: pytest.MonkeyPatch, server: SkyEmuServer) -> None:
    monkeypatch.setattr(skyemu_console, "_CONNECT_PATIENCE_S", 0.2)
    monkeypatch.setattr(SkyEmuState, "_status", lambda state, parameters: ("text/html", b"<html>hello"))
    with pytest.raises(PokegemmaError, match="not SkyEmu: its status begins with '<html>hello'"):
        open_emulator(server.url, timing=PressTiming())


def test_the_status_is_read_whatever_the_path_of_the_rom() -> None:
    state = SkyEmuState(ToyFrames(1), rom_path='C:\\Users\\x\\"Rot" é.gba')
    state.inputs["Start"] = 1.0
    _, body = state.answer("/status", [])
    status = read_status(body)
    assert status.rom_path == 'C:\\Users\\x\\"Rot" é.gba'
    assert status.pressed == {"Start"}
    assert read_status(SkyEmuState(None).answer("/status", [])[1]).rom_path is None


def test_a_picture_is_read_whole_or_not_at_all() -> None:
    picture = ToyEmulator(3).screen()
    encoded = encode_bmp(picture)
    assert decode_screen(encoded).tobytes() == picture.tobytes()
    png = SkyEmuState(ToyFrames(1), shown=picture).answer("/screen", [("format", "png")])[1]
    assert decode_screen(png).tobytes() == picture.tobytes()
    for whole in (encoded, png):
        for size in (0, 1, 10, 40, 100, 1000, len(whole) // 2, len(whole) - 100):
            with pytest.raises(NoAnswerError):
                decode_screen(whole[:size])


@pytest.mark.parametrize(
    ("body", "may_be_done"),
    [(b"failed\0", False), (b"Failed (no ROM loaded)\0", False), (b"pong\0", True), (b"", True)],
)
def test_other_texts_than_ok_are_no_answer(body: bytes, may_be_done: bool) -> None:
    with pytest.raises(NoAnswerError) as refused:
        read_ok(body)
    assert refused.value.may_be_done is may_be_done
    read_ok(b"ok\0")
    read_ok(b"ok")


def test_a_step_that_was_not_answered_is_not_repeated_where_nothing_can_be_compared(server: SkyEmuServer) -> None:
    client = SkyEmuClient(server.url, limits=LIMITS)
    server.planned = [("/step", "reset")]
    assert client.step(7) is False
    assert client.step(2) is True
    assert [frames for frames, _ in server.state.steps] == [7, 2]


def test_the_stand_in_ignores_what_skyemu_ignores(server: SkyEmuServer) -> None:
    assert server.state.answer("/input", [("Up", "1"), ("Jump", "1")]) == ("text/html", b"ok\0")
    assert server.state.pressed == ["up"]
    assert server.state.answer("/step", [("frames", "abc")]) == ("text/html", b"ok\0")
    assert server.state.answer("/run", []) == ("text/html", b"ok\0")
    assert server.state.game.presses == []
    assert server.state.answer("/save", [("path", "/no/such/folder/state.png")]) == ("text/html", b"failed\0")
    assert SkyEmuState(None).answer("/screen", []) == ("text/html", b"Failed (no ROM loaded)\0")
    assert server.state.answer("/nothing", []) is None
