"""The user's own SkyEmu, played over its HTTP control server."""

import atexit
import io
import logging
import re
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pokegemma.errors import PokegemmaError
from pokegemma.play.emulators.skyemu_client import NoAnswerError, SkyEmuClient, SkyEmuError, SkyEmuLimits, read_ok

logger = logging.getLogger(__name__)

_NAMES = {
    "up": "Up",
    "down": "Down",
    "left": "Left",
    "right": "Right",
    "a": "A",
    "b": "B",
    "start": "Start",
    "select": "Select",
}
"""SkyEmu's names of the buttons; it ignores others without a word."""

_CONNECT_PATIENCE_S = 3.0
_LOAD_PATIENCE_S = 2.0
_MAX_RELEASES, _MAX_STEPS = 10, 10
_PICTURE_FORMATS = ("BMP", "PNG")


@dataclass(frozen=True)
class SkyEmuStatus:
    """What SkyEmu reports: itself with its commit, the ROM's path (None: no game), and the names that are pressed."""

    emulator: str
    rom_path: str | None
    pressed: frozenset[str]


class SkyEmuConsole:
    """A `Console` that is another program; it must stay paused, and goes on only by steps."""

    core = "SkyEmu"

    def __init__(self, url: str, *, limits: SkyEmuLimits | None = None):
        """Connect to the SkyEmu at `url`.

        Raises:
            PokegemmaError: nothing answers there, it is not SkyEmu, or no game is open in it.
        """
        self._client = SkyEmuClient(url, limits=limits or SkyEmuLimits())
        status = self._client.ask("status", read_status, patience_s=_CONNECT_PATIENCE_S)
        if status.rom_path is None:
            raise PokegemmaError(f"{url}: no game is open in SkyEmu; open a ROM in it first")
        self.name = status.emulator
        self.game = re.split(r"[/\\]", status.rom_path)[-1]
        self._picture: Image.Image | None = None  # None: a step was made since the latest
        self._num_unanswered = 0
        self.frame_size = self.picture().size
        # Pressed buttons stay pressed when this program ends, also where nobody calls close().
        atexit.register(self._release_at_exit)

    def set_button(self, button: str | None) -> None:
        """Press one button and release the others; None releases all."""
        inputs = {name: int(key == button) for key, name in _NAMES.items()}
        self._client.ask("input", read_ok, inputs)
        if button is None and self._client.num_unanswered > self._num_unanswered:
            self._confirm_release()

    def _confirm_release(self) -> None:
        """Look whether no button is pressed: a request that was not answered in time may have been done last."""
        for _ in range(_MAX_RELEASES):
            pressed = self._client.ask("status", read_status).pressed
            if not pressed:
                self._num_unanswered = self._client.num_unanswered
                return
            self._client.ask("input", read_ok, dict.fromkeys(_NAMES.values(), 0))
        raise SkyEmuError(f"{self._client.url}: {', '.join(sorted(pressed))} stays pressed; does another program play?")

    def step(self, frames: int) -> None:
        """Go on by one or more frames.

        A step that was not answered is repeated only where the picture is still what it was before: then either nothing
        was done, or nothing that can be seen. A button that is held stays held meanwhile, so that the game sees one
        press, at worst a longer one. Where the picture before is not known, the step is not repeated.
        """
        before, self._picture = self._picture, None
        for _ in range(_MAX_STEPS):
            if self._client.step(frames) or before is None:
                return
            after = self.picture()
            if after.getbbox() is None:  # black may be no picture of the game, until the next step
                any(self._client.step(1) for _ in range(_MAX_STEPS))  # until one is confirmed
                after = self.picture()
            self._picture = None
            if after.tobytes() != before.tobytes():
                return
        raise SkyEmuError(f"{self._client.url}: {_MAX_STEPS} steps were not answered, and the picture stays the same")

    def picture(self) -> Image.Image:
        """Return the latest frame. BMP takes SkyEmu a fifth of the time of PNG."""
        self._picture = self._client.ask("screen", decode_screen, {"format": "bmp"})
        return self._picture.copy()

    def pixels(self) -> bytes:
        """Return the bytes of the latest frame."""
        return self.picture().tobytes()

    def get_state(self) -> bytes:
        """Return SkyEmu's state: a PNG of the screen, enlarged, that contains the state. It comes over the network."""

        def read(body: bytes) -> bytes:
            if min(decode_screen(body).size) <= min(self.frame_size):
                raise SkyEmuError(f"{self._client.url}: returns pictures without a state; this SkyEmu is too old")
            return body

        return self._client.ask("screen", read, {"format": "png", "embed_state": 1})

    def set_state(self, data: bytes) -> None:
        """Go back to a state: SkyEmu reads it from a file, so it must see this machine's disk."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "state.png"
            path.write_bytes(data)
            Path(folder).chmod(0o755)  # SkyEmu may run as another user
            try:
                self._client.ask("load", read_ok, {"path": str(path)}, patience_s=_LOAD_PATIENCE_S)
            except SkyEmuError as error:
                raise PokegemmaError(
                    f"SkyEmu could not load the state from {path}; does it run on this machine? ({error})"
                ) from None
        self._picture = None

    def close(self) -> None:
        """Forget SkyEmu, which goes on; `FrameEmulator` has released the buttons."""
        atexit.unregister(self._release_at_exit)

    def _release_at_exit(self) -> None:
        try:
            self.set_button(None)
        except SkyEmuError as error:
            logger.warning("the buttons could not be released: %s", error)


def read_status(body: bytes) -> SkyEmuStatus:
    """Read /status. It is JSON, but the ROM's path is not escaped in it, and on Windows contains backslashes."""
    text = body.rstrip(b"\0").decode("utf-8", "replace")
    emulator = re.search(r'"emulator": *"(SkyEmu.*)"', text)
    pressed = {name: re.search(rf'"{name}": *([\d.]+)', text) for name in _NAMES.values()}
    if emulator is None or None in pressed.values():
        raise NoAnswerError(f"not SkyEmu: its status begins with {text[:60]!r}")
    rom_path = re.search(r'"rom-path": *"(.*)"', text)
    return SkyEmuStatus(
        emulator=emulator[1],
        rom_path=rom_path[1] if rom_path else None,
        pressed=frozenset(name for name, value in pressed.items() if float(value[1])),
    )


def decode_screen(body: bytes) -> Image.Image:
    """Return a picture, RGB. SkyEmu answers with text where it has none, and a connection may end in the middle."""
    try:
        with Image.open(io.BytesIO(body), formats=_PICTURE_FORMATS) as picture:
            return picture.convert("RGB")
    except (OSError, SyntaxError, ValueError, struct.error) as error:
        reason = repr(body[:60].rstrip(b"\0").decode("ascii", "replace")) if body[:6].lower() == b"failed" else error
        raise NoAnswerError(f"no whole picture: {reason}") from None
