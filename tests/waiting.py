"""Wait for a condition instead of a time, as long as a slow and busy machine may need; for tests of processes."""

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator

import psutil

WAIT_S = 240
"""How long anything may take that takes seconds here. Only a test that fails waits for it."""


def wait_until(condition: Callable[[], object], process: subprocess.Popen | None = None) -> None:
    """Return when a condition holds; fail where it never does, or `process` ended before."""
    end = time.monotonic() + WAIT_S
    while not condition():
        assert process is None or process.poll() is None, f"ended with exit status {process.returncode}"
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


def wait_until_ended(processes: Iterable[psutil.Process | int]) -> None:
    """Return when none of the processes runs any more; kill those that do not end, and fail."""
    processes = list(processes)
    try:
        wait_until(lambda: not any(map(is_running, processes)))
    finally:
        for process in filter(is_running, processes):
            (psutil.Process(process) if isinstance(process, int) else process).kill()
