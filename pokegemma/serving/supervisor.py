"""Start an engine's server as a child process, tell when it is ready, and stop it with all that it started."""

import collections
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import IO

import psutil

from pokegemma.errors import CheckFailedError, PokegemmaError
from pokegemma.serving.client import ServerError, list_models, request
from pokegemma.serving.commands import Launch

logger = logging.getLogger(__name__)

_POLL_S = 0.2
_PROBE_TIMEOUT_S = 5.0
_LAST_LINES = 20

_WATCH = """read -r line
kill -s TERM -- "-$0"
for second in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15; do sleep 1; kill -s 0 -- "-$0" || exit; done
kill -s KILL -- "-$0"
"""
"""Of sh: when its input ends, end a group of processes."""


def _check_address(host: str, port: int) -> None:
    """Refuse an address that cannot be listened on.

    Raises:
        PokegemmaError: the port is taken, or the host is not one of this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as uvicorn does: one just stopped is no taker
            probe.bind(address)
    except UnicodeError as error:  # an empty label, or one too long
        raise PokegemmaError(f"--host {host}: not the name or address of a machine") from error
    except OSError as error:
        raise PokegemmaError(f"--host {host} --port {port} cannot be listened on: {error.strerror or error}") from error


class _Output:
    """Copy what a child writes to `sink`, and keep its last lines."""

    def __init__(self, source: IO[bytes], sink: IO[bytes]) -> None:
        self._lines: collections.deque[bytes] = collections.deque(maxlen=_LAST_LINES)
        self._source, self._sink = source, sink
        self._thread = threading.Thread(target=self._copy, daemon=True)
        self._thread.start()

    def _copy(self) -> None:
        for line in self._source:
            self._lines.append(line)
            with contextlib.suppress(OSError, ValueError):  # full or closed: the child must not block on us
                self._sink.write(line)
                self._sink.flush()

    def finish(self) -> None:
        """Wait for the rest, after the child has ended: but not for ever, a stray grandchild may hold its end."""
        self._thread.join(timeout=2)

    def last_lines(self) -> list[str]:
        """Return the last lines that are not blank, after the child has ended."""
        self.finish()
        lines = [line.decode(errors="replace").strip() for line in list(self._lines)]
        return [line for line in lines if line]


class _Stop:
    """Count SIGINT and SIGTERM: the first asks for a clean end, the second for a quick one."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.count += 1


@contextlib.contextmanager
def _stop_signals() -> Iterator[_Stop]:
    stop = _Stop()
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_ready(launch: Launch) -> bool:
    try:
        if launch.ready_path == "/v1/models":
            return launch.model in list_models(launch.url, timeout_s=_PROBE_TIMEOUT_S)
        request("GET", launch.url + launch.ready_path, timeout_s=_PROBE_TIMEOUT_S)
    except ServerError:
        return False
    return True


@contextlib.contextmanager
def _watch_over(process: subprocess.Popen) -> Iterator[None]:
    """End a child with its group also if this process is killed or loses its terminal, and cannot do it itself."""
    watcher = subprocess.Popen(
        ["/bin/sh", "-c", _WATCH, str(process.pid)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        watcher.kill()  # before its input ends
        watcher.communicate()


def _end(process: subprocess.Popen, *, stop: _Stop, stop_timeout_s: float) -> None:
    """End a child and all that it started: ask, wait, then kill; a second signal kills at once."""
    try:
        everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        everyone = []
    # Its own session: also what has lost its parent meanwhile is in this group.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGTERM)
    asked, end = stop.count, time.monotonic() + stop_timeout_s
    while time.monotonic() < end and stop.count <= asked:
        process.poll()  # else it stays a zombie
        if not _alive(everyone):
            break
        time.sleep(_POLL_S / 2)
    else:
        logger.warning("the server did not end by itself: killing it")
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    for one in _alive(everyone):
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()


def _alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    alive = []
    for one in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if one.status() != psutil.STATUS_ZOMBIE:
                alive.append(one)
    return alive


def _ended(launch: Launch, process: subprocess.Popen, output: _Output, when: str, log_file: Path | None) -> None:
    status = process.wait()
    how = f"was killed by signal {-status}" if status < 0 else f"ended with exit status {status}"
    lines = output.last_lines()
    if log_file is not None:
        for line in lines:
            logger.error("%s", line)
    raise CheckFailedError(f"the {launch.engine} server {how} {when}; its last line: {lines[-1] if lines else 'none'}")


def serve(
    launch: Launch,
    *,
    on_ready: Callable[[], None],
    ready_timeout_s: float,
    stop_timeout_s: float = 15.0,
    log_file: Path | None = None,
) -> None:
    """Run a server until SIGINT or SIGTERM; its output goes to stderr, or is appended to `log_file`.

    `on_ready` is called once, when the server answers.

    Raises:
        PokegemmaError: it cannot be started: a package is missing, the address is taken, or there is no time.
        CheckFailedError: it ended by itself, or did not become ready in time; nothing of it is left.
    """
    if not ready_timeout_s > 0:
        raise PokegemmaError(f"--ready_timeout_s: {ready_timeout_s} is not above 0")
    if launch.missing:
        raise PokegemmaError(f"{launch.engine}: {launch.missing}")
    _check_address(launch.host, launch.port)
    with contextlib.ExitStack() as stack:
        try:
            sink: IO[bytes] = sys.stderr.buffer
            if log_file is not None:  # unbuffered: what a full disk does not take is not tried again at the end
                sink = stack.enter_context(open(log_file, "ab", buffering=0))
            stop = stack.enter_context(_stop_signals())
            process = subprocess.Popen(
                launch.command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches us alone, and we end it in order
            )
        except OSError as error:
            raise PokegemmaError(f"{error.filename}: {error.strerror}") from error
        stack.enter_context(_watch_over(process))
        output = _Output(process.stdout, sink)
        stack.callback(output.finish)
        stack.callback(_end, process, stop=stop, stop_timeout_s=stop_timeout_s)
        end = time.monotonic() + ready_timeout_s
        while not stop.count and not _is_ready(launch):
            if process.poll() is not None:
                _ended(launch, process, output, "before it was ready", log_file)
            if time.monotonic() > end:
                raise CheckFailedError(
                    f"the {launch.engine} server was not ready within {ready_timeout_s:g} s (--ready_timeout_s)"
                )
            time.sleep(_POLL_S)
        if not stop.count:
            on_ready()
        while not stop.count:
            if process.poll() is not None:
                _ended(launch, process, output, "after it was ready", log_file)
            time.sleep(_POLL_S)
