"""A stand-in for SkyEmu: its HTTP control server as measured and read in its source, with a game of ours behind it.

As a program, with the toy game or a ROM (in stable-retro); it prints its URL and runs until it is ended:

    python -m tests.play.skyemu_server toy:5
    python -m tests.play.skyemu_server game.gba
"""

import dataclasses
import io
import random
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qsl, urlsplit

from PIL import Image, ImageChops
from PIL.PngImagePlugin import PngInfo

from pokegemma.play.emulators.retro_console import RetroConsole
from pokegemma.play.emulators.rom_file import read_rom
from pokegemma.play.toy.world import ToyWorld

BUTTONS = {
    "Up": "up",
    "Down": "down",
    "Left": "left",
    "Right": "right",
    "A": "a",
    "B": "b",
    "Start": "start",
    "Select": "select",
}
INPUTS = ("A", "B", "X", "Y", "Up", "Down", "Left", "Right", "L", "R", "Start", "Select", "Reset Game", "Turbo A")
FAULTS = ("refused", "slow", "late", "reset", "half", "short", "error", "error after", "failed", "text", "black")
"""What can be done to one request: see `SkyEmuServer`."""

_STEP_FRAMES = 16


class Game(Protocol):
    """What the server runs, one frame at a time."""

    def step(self, pressed: Sequence[str]) -> None:
        """Go on by one frame with these buttons pressed."""

    def picture(self) -> Image.Image:
        """Return what this frame shows."""

    def save(self) -> bytes:
        """Return the state."""

    def load(self, state: bytes) -> None:
        """Go back to a state."""


class ToyFrames:
    """A room of the toy game in frames: a step takes 16, in which the old picture slides away."""

    def __init__(self, seed: int, *, level: int = 1):
        self._seed, self._level = seed, level
        self.world = ToyWorld(seed, level=level)
        self.presses: list[str] = []
        self._held: str | None = None
        self._frames_left = 0
        self._before = self.world.render()

    def step(self, pressed: Sequence[str]) -> None:
        """Press a button when it goes down, and a direction again when a step has ended and it is still down."""
        if self._frames_left:
            self._frames_left -= 1
            return
        button = pressed[0] if pressed else None
        if button is not None and (button != self._held or button in ("up", "down", "left", "right")):
            self._before = self.world.render()
            self.presses.append(button)
            if self.world.press(button):
                self._frames_left = _STEP_FRAMES - 1
        self._held = button

    def picture(self) -> Image.Image:
        """Return the room, or how it slides away."""
        if self._frames_left:
            return ImageChops.offset(self._before, 2 * self._frames_left, 0)
        return self.world.render()

    def save(self) -> bytes:
        """Return the presses so far, from which the room can be played again; no step may be under way."""
        return " ".join(self.presses).encode()

    def load(self, state: bytes) -> None:
        """Play the room again."""
        self.__init__(self._seed, level=self._level)
        for button in state.decode().split():
            self.world.press(button)
            self.presses.append(button)


class RomFrames:
    """A ROM in stable-retro."""

    def __init__(self, path: Path):
        self._console = RetroConsole(read_rom(path))

    def step(self, pressed: Sequence[str]) -> None:
        """Go on by one frame."""
        self._console.set_button(pressed[0] if pressed else None)
        self._console.step(1)

    def picture(self) -> Image.Image:
        """Return the latest frame."""
        return self._console.picture()

    def save(self) -> bytes:
        """Return the core's state."""
        return self._console.get_state()

    def load(self, state: bytes) -> None:
        """Go back to a state."""
        self._console.set_state(state)

    def close(self) -> None:
        """End the game."""
        self._console.close()


@dataclasses.dataclass
class SkyEmuState:
    """SkyEmu without its network: what the requests change and read."""

    game: Game | None
    rom_path: str = "/roms/toy.gba"
    inputs: dict[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(INPUTS, 0.0))
    shown: Image.Image = dataclasses.field(default_factory=lambda: Image.new("RGB", (240, 160)))
    steps: list[tuple[int, tuple[str, ...]]] = dataclasses.field(default_factory=list)
    """Each step that was done: its frames, and the buttons that were pressed in it."""

    @property
    def pressed(self) -> list[str]:
        """The buttons that are pressed now."""
        return [button for name, button in BUTTONS.items() if self.inputs[name]]

    def answer(self, command: str, parameters: Sequence[tuple[str, str]]) -> tuple[str, bytes] | None:
        """Do what a request asks; return type and body of the answer, None where there is no such command."""
        respond = getattr(self, f"_{command.removeprefix('/')}", None)
        return None if respond is None else respond(parameters)

    def _ping(self, parameters: Sequence[tuple[str, str]]) -> tuple[str, bytes]:
        return _text("pong")

    def _run(self, parameters: Sequence[tuple[str, str]]) -> tuple[str, bytes]:
        return _text("ok")  # without a window, nothing goes on

    def _step(self, parameters: Sequence[tuple[str, str]]) -> tuple[str, bytes]:
        num_frames = 1
        for name, value in parameters:
            if name == "frames":
                num_frames = int(value) if value.isdecimal() else 0
        for _ in range(num_frames if self.game else 0):
            self.shown = self.game.picture()  # one frame behind
            self.game.step(self.pressed)
        self.steps.append((num_frames, tuple(self.pressed)))
        return _text("ok")

    def _input(self, parameters: Sequence[tuple[str, str]]) -> tuple[str, bytes]:
        for name, value in parameters:
            if name in self.inputs:
                self.inputs[name] = float(value)
        return _text("ok")

    def _status(self, parameters: Sequence[tuple[str, str]]) -> tuple[str, bytes]:
        paths = f'  "rom-path": "{self.rom_path}",\n  "save-path": "{self.rom_path}.sav",\n' if self.game else ""
        inputs = ",\n".join(f'    "{name}": {value:f}' for name, value in self.inputs.items())
        text = (
            '{\n  "emulator": "SkyEmu (0abc05931c3f)",\n  "run-mode": "PAUSE",\n'
            f'  "rom-loaded" : {str(self.game is not None).lower()},\n{paths}'
            '  "rewind-info" : {\n    "entries-used" : 0,\n    "capacity" : 1048576,\n    "percent_full" : 0.0\n  },\n'
            f'  "inputs": {{\n{inputs}\n  }}\n}}'
        )
        return "application/json", text.encode()

    def _screen(self, parameters: Sequence[tuple[str, str]]) -> tuple[str, bytes]:
        if self.game is None:
            return _text("Failed (no ROM loaded)")
        options = dict(parameters)
        if options.get("embed_state") == "1":
            return "image/png", self._state_png()
        if options.get("format") in ("bmp", "BMP"):
            return "image/bmp", encode_bmp(self.shown)
        encoded = io.BytesIO()
        self.shown.convert("RGBA").save(encoded, "PNG")
        return "image/png", encoded.getvalue()

    def _save(self, parameters: Sequence[tuple[str, str]]) -> tuple[str, bytes]:
        try:
            Path(dict(parameters)["path"]).write_bytes(self._state_png())
        except (KeyError, OSError):
            return _text("failed")
        return _text("ok")

    def _load(self, parameters: Sequence[tuple[str, str]]) -> tuple[str, bytes]:
        try:
            with Image.open(dict(parameters)["path"]) as picture:
                self.game.load(bytes.fromhex(picture.text["state"]))
        except (KeyError, OSError, AttributeError):
            return _text("failed")
        return _text("ok")

    def _state_png(self) -> bytes:
        """Return the screen, enlarged, with the state in it; SkyEmu puts it into the pixels."""
        text = PngInfo()
        text.add_text("state", self.game.save().hex(), zip=True)
        encoded = io.BytesIO()
        self.shown.convert("RGBA").resize((480, 320)).save(encoded, "PNG", pnginfo=text)
        return encoded.getvalue()


def _text(text: str) -> tuple[str, bytes]:
    return "text/html", text.encode() + b"\0"


def encode_bmp(picture: Image.Image) -> bytes:
    """Return a picture as SkyEmu encodes it: RGBA, a header of version 4, bottom row first."""
    width, height = picture.size
    pixels = picture.convert("RGBA").transpose(Image.Transpose.FLIP_TOP_BOTTOM).tobytes("raw", "BGRA")
    head = struct.pack("<2sIHHI", b"BM", 14 + 108 + len(pixels), 0, 0, 14 + 108)
    info = struct.pack("<IiiHHIIiiII", 108, width, height, 1, 32, 3, 0, 0, 0, 0, 0)
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    return head + (info + masks).ljust(108, b"\0") + pixels


class SkyEmuServer:
    """The stand-in on a free port of this machine, in a thread; one request at a time, in the order in which they came.

    `planned` are faults of the next requests of their paths; of all others, the fraction `faults` has one of FAULTS.
    The connection is refused for a while; the answer, or what is asked for, comes after the client's timeout; the
    connection is reset after the request, or ends in the middle of the answer; half a picture comes as a whole answer;
    an error with status 500 comes before or after what was asked has been done; "failed", or text where a picture was
    asked for, comes with status 200; the screen is black until the next step.
    """

    def __init__(self, state: SkyEmuState, *, faults: float = 0, seed: int = 0, delay_s: float = 0.1):
        self.state, self.faults, self.delay_s = state, faults, delay_s
        self.num_faults: Counter[str] = Counter()
        self.planned: list[tuple[str, str]] = []
        self._rng = random.Random(seed)
        self._server = self._listen(0)
        self._port = self._server.server_address[1]
        self._is_closing = False
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """The URL of the server."""
        return f"http://127.0.0.1:{self._port}"

    def close(self) -> None:
        """Stop at once, as a program that is ended."""
        self._is_closing = True
        with socket.socket() as wake:
            wake.connect_ex(("127.0.0.1", self._port))
        self._thread.join()
        self._server.server_close()

    def __enter__(self) -> "SkyEmuServer":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _listen(self, port: int) -> HTTPServer:
        standin = self

        class Handler(BaseHTTPRequestHandler):
            timeout = 0.5  # a client that was ended while it connected sends nothing; SkyEmu has threads for the others
            wbufsize = -1  # head and body in one packet: the second of two small ones waits for an acknowledgement

            def do_GET(self) -> None:
                standin._handle(self)

            def log_message(self, *arguments: Any) -> None:
                pass

        return _QuietServer(("127.0.0.1", port), Handler)

    def _serve(self) -> None:
        while not self._is_closing:
            self._server.handle_request()

    def _handle(self, request: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(request.path)
        parameters = parse_qsl(parts.query, keep_blank_values=True)
        fault = self._rng.choice(FAULTS) if self._rng.random() < self.faults else None
        if self.planned and self.planned[0][0] == parts.path:
            _, fault = self.planned.pop(0)
        if fault in ("half", "text") and parts.path != "/screen":
            fault = "short"
        if fault is not None:
            self.num_faults[fault] += 1
        if fault in ("late", "error", "failed"):  # nothing is done, or not yet
            time.sleep(self.delay_s if fault == "late" else 0)
            if fault != "late":
                self._send(request, 500 if fault == "error" else 200, *_text("failed"))
                return
        answer = self.state.answer(parts.path, parameters)
        if answer is None:
            self._send(request, 404, "text/html", b"")
            return
        kind, body = answer
        if fault == "slow":
            time.sleep(self.delay_s)
        elif fault == "reset":
            request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            request.connection.close()
            return
        elif fault == "refused":
            self._refuse_for_a_while()
        elif fault == "black":
            self.state.shown = Image.new("RGB", self.state.shown.size)
        elif fault == "half":
            body = body[: self._rng.randrange(len(body))]
        elif fault == "text":
            kind, body = _text("Failed (no ROM loaded)")
        size = len(body)
        if fault == "short":
            body = body[: self._rng.randrange(len(body))]
        self._send(request, 500 if fault == "error after" else 200, kind, body, size=size)

    def _refuse_for_a_while(self) -> None:
        """Close the port, so that the next connection is refused, and open it again."""
        self._server.server_close()
        time.sleep(self.delay_s / 2)
        self._server = self._listen(self._port)

    def _send(
        self, request: BaseHTTPRequestHandler, status: int, kind: str, body: bytes, *, size: int | None = None
    ) -> None:
        request.close_connection = True
        try:
            request.send_response(status)
            request.send_header("Content-Type", kind)
            request.send_header("Content-Length", str(len(body) if size is None else size))
            request.end_headers()
            request.wfile.write(body)
            request.wfile.flush()
        except OSError:
            pass  # the client has gone


class _QuietServer(HTTPServer):
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report only what is not a client that has gone."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


def main() -> None:
    """Serve the game that the command line names."""
    (game,) = sys.argv[1:]
    kind, _, seed = game.partition(":")
    state = SkyEmuState(ToyFrames(int(seed)) if kind == "toy" else RomFrames(Path(game)), rom_path=game)
    server = SkyEmuServer(state)
    print(server.url, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
