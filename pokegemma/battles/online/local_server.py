"""Pokémon Showdown's server on this machine, a child of this process."""

import contextlib
import logging
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

from pokegemma.battles.node_process import find_node
from pokegemma.errors import CheckFailedError, PokegemmaError

logger = logging.getLogger(__name__)

SERVER_FOLDER = Path(__file__).parents[1] / "node_server"
SHOWDOWN_FOLDER = Path(sys.prefix) / "share" / "pokegemma-showdown"
"""Where ./init.sh --with showdown installs node_modules, by the lock file in `SERVER_FOLDER`."""

_HOST = "127.0.0.1"
_READY_S, _END_S, _POLL_S = 120.0, 10.0, 0.1


class LocalServer:
    """A server that accepts connections of this machine only, and ends with the block, or with this process.

    It asks for no passwords, and sends nothing anywhere.

    Attributes:
        url: for `ShowdownConnection`.
        page: to open in a browser; the page comes from play.pokemonshowdown.com, and connects to this server.
    """

    def __init__(self, port: int, *, num_children: int = 0) -> None:
        """Start nothing yet.

        Args:
            num_children: processes that the server starts for each of its tasks; 0: it does all of them itself.

        Raises:
            PokegemmaError: the server or Node.js is not installed.
        """
        if not (SHOWDOWN_FOLDER / "node_modules" / "pokemon-showdown").is_dir():
            raise PokegemmaError(
                f"{SHOWDOWN_FOLDER} does not contain Pokémon Showdown's server: ./init.sh --with showdown"
            )
        script = str(SERVER_FOLDER / "server.cjs")
        self._command = [find_node(), script, str(SHOWDOWN_FOLDER), str(port), str(num_children)]
        self._port = port
        self.url = f"ws://{_HOST}:{port}/showdown/websocket"
        self.page = f"http://play.pokemonshowdown.com/~~{_HOST}:{port}"
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "LocalServer":
        """Start the server, and wait until it accepts connections.

        Raises:
            PokegemmaError: something listens at the port already.
            CheckFailedError: it ended, or was not ready in time.
        """
        if self._accepts():
            raise PokegemmaError(f"--port {self._port}: another program listens there; choose another port")
        with contextlib.ExitStack() as stack:
            output = stack.enter_context(tempfile.TemporaryFile())
            process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            stack.callback(_end, process)
            self.pid = process.pid
            end = time.monotonic() + _READY_S
            while not self._accepts():
                if process.poll() is not None or time.monotonic() > end:
                    how = "not ready in time" if process.poll() is None else f"exit status {process.returncode}"
                    raise CheckFailedError(f"Pokémon Showdown's server: {how}: {_read_error(output)}")
                time.sleep(_POLL_S)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _accepts(self) -> bool:
        with socket.socket() as client:
            return client.connect_ex((_HOST, self._port)) == 0


def _read_error(output: IO[bytes]) -> str:
    """Return the first line that names an error, else the last."""
    output.seek(0)
    lines = [line.strip() for line in output.read().decode(errors="replace").splitlines() if line.strip()]
    return next((line for line in lines if "Error" in line), lines[-1] if lines else "it printed nothing")


def _end(process: subprocess.Popen) -> None:
    process.stdin.close()
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        logger.warning("Pokémon Showdown's server did not end in time and is killed")
        process.kill()
        process.wait()
