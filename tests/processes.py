"""What tests need of processes: a script called without starting one, a port for a server, waiting for a condition."""

import contextlib
import importlib
import io
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from unittest import mock

DEADLINE_S = 300
"""How long to wait for what takes a second or two: a busy machine is many times slower."""


def call_script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run scripts/`name`.py in this process; return its exit status and what it printed, as subprocess.run does.

    A new process would spend seconds on imports. Start one where it is what is tested (signals, launchers, Ray).
    """
    from pokegemma.cli import run  # not above: workers that import this module need no torch

    command = [f"scripts/{name}.py", *map(str, arguments)]
    output, errors, handler = io.StringIO(), io.StringIO(), signal.getsignal(signal.SIGTERM)
    with (
        mock.patch.dict(os.environ),  # scripts change it for the processes that they start
        mock.patch.object(sys, "argv", command),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        try:
            run(importlib.import_module(f"scripts.{name}").main)
        except SystemExit as ended:
            status = ended.code or 0
        finally:
            signal.signal(signal.SIGTERM, handler)
    return subprocess.CompletedProcess(command, status, output.getvalue(), errors.getvalue())


def free_port() -> int:
    """Return a port that nobody listens on, below those that systems hand out for outgoing connections.

    One that the system chose (port 0) could be given to somebody else before the server that it is for has started.
    """
    while True:
        port = random.SystemRandom().randrange(12_000, 30_000)
        with socket.socket() as server, contextlib.suppress(OSError):
            server.bind(("127.0.0.1", port))
            return port


def wait_until(condition: Callable[[], object], *, timeout_s: float = DEADLINE_S) -> object:
    """Wait for a condition; return its last value."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return value
