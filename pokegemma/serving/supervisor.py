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
from typing import IO

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


def _copy_lines(source: IO[bytes], sink: IO[bytes], last_lines: collections.deque[bytes]) -> None:
    for line in source:
        last_lines.append(line)
        with contextlib.suppress(OSError, ValueError):  # full or closed: the child must not block
            sink.write(line)
            sink.flush()


@contextlib.contextmanager
def _collect_signals() -> Iterator[list[int]]:
    """Yield a list that gets each SIGINT and SIGTERM: the first stops the server, the second kills it."""
    received: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, frame: received.append(number)) for number in numbers]
    try:
        yield received
    finally:
        for number, handler in zip(numbers, before, strict=True):
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


def _end(process: subprocess.Popen, *, received: list[int], stop_timeout_s: float) -> None:
    """Send SIGTERM to a child and all that it started, wait, then kill; a second signal kills at once."""
    try:
        child = psutil.Process(process.pid)
        family = [child, *child.children(recursive=True)]
    except psutil.NoSuchProcess:
        family = []
    # The group also contains processes whose parent has ended.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGTERM)
    num_signals, end = len(received), time.monotonic() + stop_timeout_s
    while time.monotonic() < end and len(received) <= num_signals:
        process.poll()  # collects it; otherwise it stays a zombie
        if not any(map(_is_alive, family)):
            break
        time.sleep(_POLL_S / 2)
    else:
        logger.warning("the server did not stop in time and is killed")
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _describe_end(status: int, *, is_ready: bool) -> str:
    how = f"was killed by signal {-status}" if status < 0 else f"ended with exit status {status}"
    return f"{how} {'after' if is_ready else 'before'} it was ready"


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
            received = stack.enter_context(_collect_signals())
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
        lines: collections.deque[bytes] = collections.deque(maxlen=_LAST_LINES)
        copier = threading.Thread(target=_copy_lines, args=(process.stdout, sink, lines), daemon=True)
        copier.start()
        stack.callback(copier.join, timeout=2)  # not for ever: a process that the child left may hold its output
        stack.callback(_end, process, received=received, stop_timeout_s=stop_timeout_s)
        end = time.monotonic() + ready_timeout_s
        is_ready = False
        while not received:
            if process.poll() is not None:
                copier.join(timeout=2)
                last = [line.decode(errors="replace").strip() for line in list(lines) if line.strip()]
                if log_file is not None and last:
                    logger.error("%s", "\n".join(last))
                how, last_line = _describe_end(process.returncode, is_ready=is_ready), last[-1] if last else "none"
                raise CheckFailedError(f"the {launch.engine} server {how}; its last line: {last_line}")
            if not is_ready and _answers(launch):
                is_ready = True
                on_ready()
            if not is_ready and time.monotonic() > end:
                raise CheckFailedError(
                    f"the {launch.engine} server was not ready within {ready_timeout_s:g} s (--ready_timeout_s)"
                )
            time.sleep(_POLL_S)
