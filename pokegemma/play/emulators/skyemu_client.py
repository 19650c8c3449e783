"""Requests to SkyEmu's HTTP control server, with the standard library alone.

What is asked again where no usable answer comes, and what is not:

- A picture, the status, the eight buttons, loading a state: asked again. Twice is the same as once.
- A step: asked again where SkyEmu was not reached, or reported a failure. A step that was sent and not answered may
  have been done, so it is asked again only where the picture shows that nothing happened (`SkyEmuConsole.step`).

Each request has a connection of its own: on one that is kept open, a server that has just closed it cannot be told from
one that took the request and stopped.
"""

import http.client
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import quote, urlencode, urlsplit

from pokegemma.errors import PokegemmaError, check_range

logger = logging.getLogger(__name__)

Parsed = TypeVar("Parsed")

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0
_PATIENCE_AFTER_FAILURE_S = 2.0
_FRAMES_PER_SECOND = 60
"""A slow machine's; SkyEmu steps about 225 frames a second."""


@dataclass(frozen=True)
class SkyEmuLimits:
    """How long to wait for one answer, and for how long to ask again before giving up."""

    timeout_s: float = 10.0
    patience_s: float = 30.0

    def __post_init__(self) -> None:
        check_range("timeout_s", self.timeout_s, above=0)
        check_range("patience_s", self.patience_s, at_least=0)


class SkyEmuError(PokegemmaError):
    """SkyEmu gave no usable answer for as long as the limits allow."""


class NoAnswerError(Exception):
    """One request had no usable answer; `may_be_done` is whether SkyEmu may have done what was asked."""

    def __init__(self, message: str, *, may_be_done: bool = True):
        super().__init__(message)
        self.may_be_done = may_be_done


class SkyEmuClient:
    """Asks one SkyEmu.

    Attributes:
        url: of the server, without a slash at its end.
        num_unanswered: requests so far that were sent and not answered.
    """

    def __init__(self, url: str, *, limits: SkyEmuLimits):
        """Raises PokegemmaError where it is not an http URL."""
        try:
            parts = urlsplit(url)
            is_valid = parts.scheme == "http" and parts.hostname and parts.port != 0
        except ValueError:  # of the port
            is_valid = False
        if not is_valid:
            raise PokegemmaError(f"{url}: not an http URL of SkyEmu's control server, such as http://127.0.0.1:8080")
        self.url, self._limits = url.rstrip("/"), limits
        self._host, self._port, self._path = parts.hostname, parts.port or 80, parts.path.rstrip("/")
        self._is_down = False
        self.num_unanswered = 0

    def ask(
        self,
        command: str,
        read: Callable[[bytes], Parsed],
        parameters: dict[str, str | int] | None = None,
        *,
        patience_s: float | None = None,
    ) -> Parsed:
        """Return an answer as `read` reads it; ask again until it is usable. Only for what may be done twice.

        Args:
            read: raises NoAnswerError where the answer is not usable.
            patience_s: instead of the limits' own.

        Raises:
            SkyEmuError: no usable answer came.
        """
        return self._repeat(lambda: read(self._exchange(command, parameters)), command, patience_s)

    def step(self, frames: int) -> bool:
        """Let the game go on; return whether SkyEmu confirmed it. It is not sent again once it may have been done.

        Raises:
            SkyEmuError: SkyEmu cannot be reached, or does not answer afterwards.
        """

        def exchange() -> bool:
            try:
                read_ok(self._exchange("step", {"frames": frames}, extra_s=frames / _FRAMES_PER_SECOND))
            except NoAnswerError as error:
                if not error.may_be_done:
                    raise
                logger.warning("%s: a step of %d frames was not answered (%s)", self.url, frames, error)
                return False
            return True

        is_confirmed = self._repeat(exchange, "step", None)
        if not is_confirmed:
            # SkyEmu does one request at a time, so a step that arrived has been done when this is answered.
            self.ask("ping", read_text)
        return is_confirmed

    def _repeat(self, attempt: Callable[[], Parsed], command: str, patience_s: float | None) -> Parsed:
        patience_s = self._limits.patience_s if patience_s is None else patience_s
        if self._is_down:  # only so long as it takes to see whether it is back: buttons are to be released
            patience_s = min(patience_s, _PATIENCE_AFTER_FAILURE_S)
        end, pause = time.monotonic() + patience_s, _FIRST_PAUSE_S
        while True:
            try:
                result = attempt()
            except NoAnswerError as error:
                if time.monotonic() + pause > end:
                    self._is_down = True
                    raise SkyEmuError(
                        f"{self.url}: no usable answer to /{command} for {patience_s:g} s ({error}); "
                        "is SkyEmu running, with its HTTP control server switched on?"
                    ) from None
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
            else:
                self._is_down = False
                return result

    def _exchange(self, command: str, parameters: dict[str, str | int] | None, *, extra_s: float = 0) -> bytes:
        """Send one request and return the body of its answer; NoAnswerError without one."""
        query = "?" + urlencode(parameters, quote_via=quote) if parameters else ""
        connection = http.client.HTTPConnection(self._host, self._port, timeout=self._limits.timeout_s + extra_s)
        is_sent = False
        try:  # whatever interrupts it: a connection that stays open keeps a server waiting
            connection.connect()
            is_sent = True
            connection.request("GET", f"{self._path}/{command}{query}", headers={"Connection": "close"})
            response = connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException) as error:
            self.num_unanswered += is_sent
            raise NoAnswerError(f"{type(error).__name__}: {error}", may_be_done=is_sent) from None
        finally:
            connection.close()
        if response.status != http.HTTPStatus.OK:
            self.num_unanswered += 1
            raise NoAnswerError(f"HTTP status {response.status}")
        return body


def read_text(body: bytes) -> str:
    """Return an answer's text; SkyEmu ends most with a NUL byte."""
    return body.rstrip(b"\0").decode("utf-8", "replace").strip()


def read_ok(body: bytes) -> None:
    """Check that SkyEmu confirmed: it reports failures as text, with the HTTP status of a success."""
    text = read_text(body)
    if text != "ok":
        raise NoAnswerError(f"answered {text[:60]!r}", may_be_done=not text.lower().startswith("failed"))
