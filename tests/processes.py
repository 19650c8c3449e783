"""What tests need of processes: a script called without one, a port, waiting for what happens instead of for a time."""

import contextlib
import gc
import importlib
import io
import logging
import multiprocessing
import multiprocessing.forkserver
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest

WAIT_S = 300
"""How long anything may take that takes seconds here: a busy machine is many times slower. Only a failure waits."""


def call_script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run scripts/`name`.py in this process; return its exit status and what it printed, as subprocess.run does.

    A new process would spend seconds on imports. Start one where it is what is tested (signals, launchers, Ray).
    """
    from pokegemma.cli import run  # not above: workers that import this module need no torch

    command = [f"scripts/{name}.py", *map(str, arguments)]
    handler = signal.getsignal(signal.SIGTERM)
    output, errors = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    with (
        _logging_untouched(),
        mock.patch.dict(os.environ),  # scripts change it for the processes that they start
        mock.patch.object(sys, "argv", command),
        mock.patch.object(gc, "freeze"),  # the models of earlier tests would stay in memory
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        try:
            run(importlib.import_module(f"scripts.{name}").main)
        except SystemExit as ended:
            status = ended.code or 0
        finally:
            signal.signal(signal.SIGTERM, handler)
    printed = [stream.buffer.getvalue().decode() for stream in (output, errors)]
    return subprocess.CompletedProcess(command, status, *printed)


def fork_server(modules: list[str]) -> ForkServerContext:
    """Return what starts processes that have imported `modules`.

    A process has one fork server, which imports what it was told when it was started: one with other imports is ended.
    """
    server = multiprocessing.forkserver._forkserver
    if server._preload_modules != modules:
        server._stop()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(modules)
    return context


@contextlib.contextmanager
def _logging_untouched() -> Iterator[None]:
    """Take pytest's handlers away, with which a script would log nothing to stderr; then put all back as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers.clear()
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def run_with_small_disk(folder: Path, size_kib: int, script: str) -> subprocess.CompletedProcess[str]:
    """Run a bash script that alone sees a new disk of `size_kib` in `folder`; skip the test where that is forbidden."""
    unshare = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    mount = f"mount -t tmpfs -o size={size_kib}k tmpfs {shlex.quote(str(folder))}"
    if shutil.which("unshare") is None or subprocess.run([*unshare, "bash", "-c", mount], check=False).returncode:
        pytest.skip("mounting a small disk needs root or user namespaces (unshare --mount)")
    command = [*unshare, "bash", "-c", f"{mount} && {script}"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=WAIT_S)


def free_port() -> int:
    """Return a port that nobody listens on, below those that systems hand out for outgoing connections.

    One that the system chose (port 0) could be given to somebody else before the server that it is for has started.
    """
    while True:
        port = random.SystemRandom().randrange(12_000, 30_000)
        with socket.socket() as server, contextlib.suppress(OSError):
            server.bind(("127.0.0.1", port))
            return port


def is_listening(port: int) -> bool:
    """Return whether a server of this machine accepts connections at a port."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def wait_until(condition: Callable[[], object], process: subprocess.Popen | None = None) -> None:
    """Return when a condition holds; fail where it never does, or `process` ended before."""
    end = time.monotonic() + WAIT_S
    while not condition():
        if process is not None and process.poll() is not None:
            printed = process.stderr.read() if process.stderr else "stderr was not kept"
            pytest.fail(f"ended with exit status {process.returncode}: {printed[-2000:]}")
        assert time.monotonic() < end, f"waited {WAIT_S} s"
        time.sleep(0.02)


def is_running(process: psutil.Process | int) -> bool:
    """Return whether a process runs. A zombie does not; in a container nobody may ever collect it."""
    try:
        process = psutil.Process(process) if isinstance(process, int) else process
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextlib.contextmanager
def killed_after(process: subprocess.Popen) -> Iterator[subprocess.Popen]:
    """Kill a process with all that it started where a test that failed left it running."""
    try:
        yield process
    finally:
        if process.poll() is None:
            for one in psutil.Process(process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
            process.kill()
            process.wait()


def take_sigint() -> None:
    """Undo, as `preexec_fn`, that what a shell starts with "&" ignores SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_until_ended(processes: Iterable[psutil.Process | int]) -> None:
    """Return when none of the processes runs any more; kill those that do not end, and fail."""
    processes = list(processes)
    try:
        wait_until(lambda: not any(map(is_running, processes)))
    finally:
        for process in filter(is_running, processes):
            (psutil.Process(process) if isinstance(process, int) else process).kill()


def run_in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function of a module returns in a new Python, or raise its error, as for a script of its own.

    Ray needs it: under load, a process that had connected to it several times ended without a message, and once one
    that had just begun (Ray 2.60). So a process that dies is tried again, once.
    """
    with contextlib.suppress(BrokenProcessPool):
        return _run_in_new_process(function, *arguments)
    return _run_in_new_process(function, *arguments)


def _run_in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()
