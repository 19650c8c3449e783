"""One node process that plays battles (node/simulator.cjs): commands in, one reply a command out, never blocking."""

import collections
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pokegemma.errors import PokegemmaError

NODE_FOLDER = Path(__file__).parent / "node"
MODULES_FOLDER = Path(sys.prefix) / "share" / "pokegemma-simulator"
"""Where ./init.sh --with battles installs node_modules, by the lock file in `NODE_FOLDER`."""

OLDEST_NODE = 20
_CHUNK_BYTES = 1 << 20
_START_S = 60.0
"""How long a process may take for its first reply, in seconds: it reads 54 MB of packages."""


@functools.cache
def find_node() -> str:
    """Return the path of Node.js, where it and the simulator's packages are installed.

    Raises:
        PokegemmaError: one of them is missing or too old.
    """
    if not (MODULES_FOLDER / "node_modules" / "@pkmn" / "sim").is_dir():
        raise PokegemmaError(
            f"{MODULES_FOLDER} does not contain Pokémon Showdown's simulator: ./init.sh --with battles"
        )
    node = shutil.which("node")
    if node is None:
        raise PokegemmaError(f"battles need Node.js {OLDEST_NODE} or newer; no node was found on PATH")
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=False).stdout.strip()
    if not version.startswith("v") or int(version[1:].partition(".")[0]) < OLDEST_NODE:
        raise PokegemmaError(f"battles need Node.js {OLDEST_NODE} or newer; {node} is {version or 'not running'}")
    return node


class NodeProcess:
    """A running node process with the battles in it.

    Nothing here waits: `send` keeps what the pipe does not take yet, `write` and `read` are for when it is ready. Both
    ends waiting for each other with full pipes would be a deadlock.

    Attributes:
        battles: identities of the battles in flight here.
    """

    def __init__(self) -> None:
        """Start the process.

        Raises:
            PokegemmaError: Node.js or its packages are not installed.
        """
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed in `kill`)
        command = [find_node(), str(NODE_FOLDER / "simulator.cjs"), str(MODULES_FOLDER)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, bufsize=0
        )
        self.pid = self._process.pid
        self.input, self.output = self._process.stdin, self._process.stdout
        for pipe in (self.input, self.output):
            os.set_blocking(pipe.fileno(), False)
        self.battles: set[str] = set()
        self._unsent: collections.deque[bytes] = collections.deque()
        self._unread = b""
        self._num_owed = 0
        self._has_replied = False
        self._heard_at = time.monotonic()

    @property
    def has_unsent(self) -> bool:
        return bool(self._unsent)

    def patience_s(self, limit_s: float) -> float:
        """Return how many more seconds to wait for a reply; below 0 the process counts as stuck.

        Args:
            limit_s: how long it may send nothing while it owes a reply. Its first reply may take longer.
        """
        limit_s = limit_s if self._has_replied else max(limit_s, _START_S)
        return limit_s - (time.monotonic() - self._heard_at if self._num_owed else 0.0)

    def excuse(self, seconds: float) -> None:
        """Do not count the last seconds, in which nobody wrote to the process or read from it."""
        self._heard_at = min(self._heard_at + seconds, time.monotonic())

    def send(self, command: dict[str, Any]) -> None:
        """Queue a command, for `write`."""
        if not self._num_owed:
            self._heard_at = time.monotonic()
        self._num_owed += 1
        self._unsent.append(json.dumps(command).encode() + b"\n")

    def write(self) -> None:
        """Write what is queued, as much as the pipe takes.

        Raises:
            BrokenPipeError: the process is dead.
        """
        data = b"".join(self._unsent)
        self._unsent.clear()
        try:
            written = os.write(self.input.fileno(), data) if data else 0
        except BlockingIOError:
            written = 0
        if data[written:]:
            self._unsent.append(data[written:])

    def read(self) -> list[dict[str, Any]] | None:
        """Return the replies that have arrived; None where the process has closed its output, for it is dead."""
        import orjson

        try:
            data = os.read(self.output.fileno(), _CHUNK_BYTES)
        except BlockingIOError:
            return []
        if not data:
            return None
        *lines, self._unread = (self._unread + data).split(b"\n")
        self._num_owed -= len(lines)
        self._has_replied |= bool(lines)
        self._heard_at = time.monotonic()
        return [orjson.loads(line) for line in lines]

    def kill(self) -> str:
        """End the process; return how it ended: its exit status and the last line of its stderr."""
        died_before = self._process.poll() is not None
        self._process.kill()
        status = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in lines if "Error" in line), "")
        for file in (self.input, self.output, self._errors):
            file.close()
        return f"exit status {status}{last and ': '}{last}" if died_before else "ended here"
