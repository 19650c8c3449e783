"""A connection to a Pokémon Showdown server: log in, send commands, receive the lines of rooms.

The protocol is https://github.com/smogon/pokemon-showdown/blob/master/PROTOCOL.md.
"""

import json
import re
import time
from dataclasses import dataclass
from types import TracebackType

import httpx2

from pokegemma.errors import PokegemmaError, one_line

try:
    from websockets.exceptions import WebSocketException
    from websockets.sync.client import connect
except ImportError as error:
    raise PokegemmaError(f"battles need {error.name}: ./init.sh --with battles") from error

_LOGIN_URL = "https://play.pokemonshowdown.com/action.php"
"""Where every server that checks passwords sends its users to."""

_LOGIN_TIMEOUT_S = 30.0


def simplify_name(name: str) -> str:
    """Return a user's name as Pokémon Showdown compares it: letters and digits, lower-case."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


@dataclass(frozen=True)
class RoomLines:
    """Lines of one message; `room` is "" outside rooms."""

    room: str
    lines: tuple[str, ...]


class ShowdownConnection:
    """A connection, logged in; use it as a context manager.

    Attributes:
        user_name: of the account.
    """

    def __init__(self, url: str, *, user_name: str, password: str | None = None) -> None:
        """Connect and log in.

        Args:
            url: ws://127.0.0.1:8000/showdown/websocket.
            password: None for a server that asks for none, as our own.

        Raises:
            PokegemmaError: the server cannot be reached, or refuses the name or the password.
        """
        self.user_name, self._url = user_name, url
        try:
            self._socket = connect(url, max_size=None, open_timeout=_LOGIN_TIMEOUT_S)
        except (OSError, WebSocketException, ValueError) as error:  # also of the URL itself
            raise PokegemmaError(f"{url} cannot be reached: {one_line(error)}") from error
        try:
            self._log_in(password)
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> "ShowdownConnection":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def send(self, text: str, *, room: str = "") -> None:
        """Send a command such as "/accept ann", or what is said in a room.

        Raises:
            PokegemmaError: the connection is lost.
        """
        try:
            self._socket.send(f"{room}|{text}")
        except (OSError, WebSocketException) as error:
            raise PokegemmaError(f"the connection to {self._url} was lost: {one_line(error)}") from error

    def receive(self, *, timeout_s: float | None = None) -> RoomLines | None:
        """Return the next message; None where none came within the time.

        Raises:
            PokegemmaError: the connection is lost.
        """
        try:
            text = self._socket.recv(timeout=timeout_s)
        except TimeoutError:
            return None
        except (OSError, WebSocketException) as error:
            raise PokegemmaError(f"the connection to {self._url} was lost: {one_line(error)}") from error
        lines = str(text).split("\n")
        room = lines.pop(0)[1:] if lines[0].startswith(">") else ""
        return RoomLines(room, tuple(lines))

    def _log_in(self, password: str | None) -> None:
        end = time.monotonic() + _LOGIN_TIMEOUT_S
        while (left_s := end - time.monotonic()) > 0:
            message = self.receive(timeout_s=left_s)
            for line in message.lines if message else ():
                kind, *words = line.split("|")[1:] or [""]
                if kind == "challstr":
                    assertion = "" if password is None else self._fetch_assertion(password, "|".join(words))
                    self.send(f"/trn {self.user_name},0,{assertion}")
                elif kind == "nametaken":
                    raise PokegemmaError(f"{self._url} refuses the name {self.user_name!r}: {words[-1]}")
                elif kind == "updateuser" and words[1] == "1":
                    self.user_name = words[0][1:].removesuffix("@!")  # the server leaves out some characters
                    return
        raise PokegemmaError(f"{self._url}: not logged in as {self.user_name!r} within {_LOGIN_TIMEOUT_S:g} s")

    def _fetch_assertion(self, password: str, challenge: str) -> str:
        """Return what proves to a server that the password is right; the server itself never gets the password."""
        form = {"act": "login", "name": self.user_name, "pass": password, "challstr": challenge}
        try:
            answer = httpx2.post(_LOGIN_URL, data=form, timeout=_LOGIN_TIMEOUT_S).text
            found = json.loads(answer.removeprefix("]"))
        except (httpx2.HTTPError, ValueError) as error:
            raise PokegemmaError(f"{_LOGIN_URL}: {one_line(error)}") from error
        if not found.get("actionsuccess") or not found.get("assertion"):
            raise PokegemmaError(f"{_LOGIN_URL}: the name {self.user_name!r} and the password do not fit")
        return found["assertion"]
