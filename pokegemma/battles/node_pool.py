"""Several node processes: the one with the fewest battles gets the next, and one that dies is replaced."""

import contextlib
import selectors
import time
from dataclasses import dataclass
from typing import Any

from pokegemma.battles.node_process import NodeProcess


@dataclass(frozen=True)
class DeadProcess:
    """A process that died, or was ended because it was silent: why, and the battles that were in it, sorted."""

    reason: str
    battles: tuple[str, ...]


class NodePool:
    """Node processes, each at a place of its own, 0 to `num_processes` - 1; a place may be empty."""

    def __init__(self, num_processes: int) -> None:
        """Start nothing yet: `find_place` starts a process."""
        self._processes: list[NodeProcess | None] = [None] * num_processes
        self._left_at = time.monotonic()

    def __getitem__(self, place: int) -> NodeProcess | None:
        return self._processes[place]

    @property
    def running(self) -> list[NodeProcess]:
        """The running processes."""
        return [process for process in self._processes if process is not None]

    def close(self) -> None:
        """End all processes."""
        for process in self.running:
            process.kill()
        self._processes = [None] * len(self._processes)

    def find_place(self) -> int:
        """Return the place of the process with the fewest battles, which is started if it does not run.

        Raises:
            PokegemmaError: Node.js or its packages are not installed.
        """
        counts = [0 if process is None else len(process.battles) for process in self._processes]
        place = counts.index(min(counts))
        if self._processes[place] is None:
            self._processes[place] = NodeProcess()
        return place

    def wait(self, timeout_s: float) -> tuple[list[dict[str, Any]], list[DeadProcess]]:
        """Write and read until at least one process has sent something or died; return the replies and the deaths.

        A process that is silent for `timeout_s` while it owes a reply is ended. Time between two calls does not count:
        nothing is written or read in it.
        """
        for process in self.running:
            process.excuse(time.monotonic() - self._left_at)
        replies: list[dict[str, Any]] = []
        dead: list[DeadProcess] = []
        for place, mask in self._select(timeout_s):
            process = self._processes[place]
            if process is None:  # its other pipe was handled before
                continue
            if mask & selectors.EVENT_WRITE:
                with contextlib.suppress(BrokenPipeError):  # its output ends as well
                    process.write()
                continue
            sent = process.read()
            if sent is None:
                dead.append(self._end(place, "died"))
            replies += sent or ()
        for place, process in enumerate(self._processes):
            if process is not None and process.patience_s(timeout_s) < 0:
                dead.append(self._end(place, f"sent nothing for {timeout_s:g} s"))
        self._left_at = time.monotonic()
        return replies, dead

    def _select(self, timeout_s: float) -> list[tuple[int, int]]:
        """Wait until a pipe is ready or a process has been silent too long; return places, and what is ready there."""
        with selectors.DefaultSelector() as selector:
            for place, process in enumerate(self._processes):
                if process is None:
                    continue
                selector.register(process.output, selectors.EVENT_READ, place)
                if process.has_unsent:
                    selector.register(process.input, selectors.EVENT_WRITE, place)
            patience_s = min((process.patience_s(timeout_s) for process in self.running), default=0.0)
            return [(key.data, mask) for key, mask in selector.select(max(0.0, patience_s) + 0.01)]

    def _end(self, place: int, what: str) -> DeadProcess:
        process = self._processes[place]
        self._processes[place] = None
        reason = f"the node process {process.pid} {what} ({process.kill()})"
        return DeadProcess(reason, tuple(sorted(process.battles)))
