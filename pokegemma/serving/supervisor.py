"""Start an engine's server as a child process, wait until it is ready, and stop it with all that it started."""

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
from typing import IO, NoReturn

import psutil

from pokegemma.errors import CheckFailedError, PokegemmaError, check_range
from pokegemma.serving.client import ServerError, list_models, request
from pokegemma.serving.engine_command_lines import Launch

logger = logging.getLogger(__name__)

_POLL_S = 0.2
_PROBE_TIMEOUT_S = 5.0
_LAST_LINES = 20

_END_GROUP_AT_END_OF_INPUT = """read -r line
kill -s TERM -- "-$0"
for second in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15; do sleep 1; kill -s 0 -- "-$0" || exit; done
kill -s KILL -- "-$0"
"""
"""A script of sh; $0 is the number of the group."""


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
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as uvicorn does
            probe.bind(address)
    except UnicodeError as error:  # an empty label, or one too long
        raise PokegemmaError(f"--host {host}: not the name or address of a machine") from error
    except OSError as error:
        raise PokegemmaError(f"--host {host} --port {port} cannot be listened on: {error.strerror or error}") from error


class _Output:
    """Copy the output of a child to `sink`, and keep its last lines."""

    def __init__(self, source: IO[bytes], sink: IO[bytes]) -> None:
        self._lines: collections.deque[bytes] = collections.deque(maxlen=_LAST_LINES)
        self._source, self._sink = source, sink
        self._thread = threading.Thread(target=self._copy, daemon=True)
        self._thread.start()

    def _copy(self) -> None:
        for line in self._source:
            self._lines.append(line)
            with contextlib.suppress(OSError, ValueError):  # full or closed: the child must not block
                self._sink.write(line)
                self._sink.flush()

    def finish(self) -> None:
        """Wait up to two seconds for the rest, after the child has ended; a process that it left may hold its end."""
        self._thread.join(timeout=2)

    def last_lines(self) -> list[str]:
        """Return the last lines that are not blank, after the child has ended."""
        self.finish()
        lines = [line.decode(errors="replace").strip() for line in list(self._lines)]
        return [line for line in lines if line]


class _Stop:
    """Count SIGINT and SIGTERM: the first stops the server, the second kills it."""

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


def _answers(launch: Launch) -> bool:
    try:
        if launch.ready_path == "/v1/models":
            return launch.model in list_models(launch.url, timeout_s=_PROBE_TIMEOUT_S)
        request("GET", launch.url + launch.ready_path, timeout_s=_PROBE_TIMEOUT_S)
    except ServerError:
        return False
    return True


@contextlib.contextmanager
def _watch_over(process: subprocess.Popen) -> Iterator[None]:
    """End a child with its group even if this process is killed: a pipe to a shell ends with this process."""
    watcher = subprocess.Popen(
        ["/bin/sh", "-c", _END_GROUP_AT_END_OF_INPUT, str(process.pid)],
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
    """Send SIGTERM to a child and all that it started, wait, then kill; a second signal kills at once."""
    try:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        family = []
    # The group also contains processes whose parent has ended.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGTERM)
    num_signals, end = stop.count, time.monotonic() + stop_timeout_s
    while time.monotonic() < end and stop.count <= num_signals:
        process.poll()  # collects it; otherwise it stays a zombie
        if not _alive(family):
            break
        time.sleep(_POLL_S / 2)
    else:
        logger.warning("the server did not stop in time and is killed")
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    for survivor in _alive(family):
        with contextlib.suppress(psutil.NoSuchProcess):
            survivor.kill()
    process.wait()


def _alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    alive = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                alive.append(process)
    return alive


def _raise_ended(
    launch: Launch, process: subprocess.Popen, output: _Output, *, is_ready: bool, log_file: Path | None
) -> NoReturn:
    status, lines = process.wait(), output.last_lines()
    if log_file is not None:
        for line in lines:
            logger.error("%s", line)
    how = f"was killed by signal {-status}" if status < 0 else f"ended with exit status {status}"
    when = "after it was ready" if is_ready else "before it was ready"
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
        PokegemmaError: it cannot be started: a package is missing, or the address is taken.
        CheckFailedError: it ended by itself, or was not ready in time. None of its processes is left.
    """
    check_range("--ready_timeout_s", ready_timeout_s, above=0)
    if launch.missing:
        raise PokegemmaError(f"{launch.engine}: {launch.missing}")
    _check_address(launch.host, launch.port)
    with contextlib.ExitStack() as stack:
        try:
            # Unbuffered: a full disk raises at once, not at the end.
            sink = sys.stderr.buffer if log_file is None else stack.enter_context(open(log_file, "ab", buffering=0))
            stop = stack.enter_context(_stop_signals())
            process = subprocess.Popen(
                launch.command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that Ctrl-C reaches this process alone
            )
        except OSError as error:
            raise PokegemmaError(f"{error.filename}: {error.strerror}") from error
        stack.enter_context(_watch_over(process))
        output = _Output(process.stdout, sink)
        stack.callback(output.finish)
        stack.callback(_end, process, stop=stop, stop_timeout_s=stop_timeout_s)
        end = time.monotonic() + ready_timeout_s
        is_ready = False
        while not stop.count:
            if process.poll() is not None:
                _raise_ended(launch, process, output, is_ready=is_ready, log_file=log_file)
            if not is_ready and _answers(launch):
                is_ready = True
                on_ready()
            if not is_ready and time.monotonic() > end:
                raise CheckFailedError(
                    f"the {launch.engine} server was not ready within {ready_timeout_s:g} s (--ready_timeout_s)"
                )
            time.sleep(_POLL_S)
