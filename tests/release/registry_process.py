"""scripts/model_registry.py in processes of its own, forked from a process that has imported MLflow already."""

import contextlib
import os
import pkgutil
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.processes import fork_server, wait_until

Hook = tuple[str, Callable[..., None]]
"""A function, by its dotted name, and what is called with its arguments before each call."""


@contextlib.contextmanager
def started(*words: object, output: Path, hook: Hook | None = None) -> Iterator[BaseProcess]:
    """Start the script with its output in a file; kill it if the block ends before it does."""
    context = fork_server(["scripts.model_registry", "pokegemma.release.registry"])
    process = context.Process(target=_run, args=(list(map(str, words)), output, hook))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def _run(words: list[str], output: Path, hook: Hook | None) -> None:
    from pokegemma.cli import run
    from scripts.model_registry import main

    sys.stdout = sys.stderr = output.open("w", buffering=1)
    sys.argv = ["model_registry.py", *words]
    if hook is not None:
        place, _, name = hook[0].rpartition(".")
        owner, act = pkgutil.resolve_name(place), hook[1]
        function = getattr(owner, name)

        def act_first(*arguments: Any, **named: Any) -> Any:
            act(*arguments)
            return function(*arguments, **named)

        setattr(owner, name, act_first)
    run(main)


def kill_at(number: int) -> Callable[..., None]:
    """Return an action that kills the process at its `number`th call."""
    return partial(_kill_after, [None] * number)


def _kill_after(calls_left: list[None], *arguments: Any) -> None:
    calls_left.pop()
    if not calls_left:
        os.kill(os.getpid(), signal.SIGKILL)


def wait_for(reached: Path, go: Path) -> Callable[..., None]:
    """Return an action that creates the file `reached` and waits until `go` exists."""
    return partial(_wait_for, reached, go)


def _wait_for(reached: Path, go: Path, *arguments: Any) -> None:
    reached.touch()
    wait_until(go.exists)


def touch(file: Path) -> Callable[..., None]:
    """Return an action that creates a file."""
    return partial(_touch, file)


def _touch(file: Path, *arguments: Any) -> None:
    file.touch()
