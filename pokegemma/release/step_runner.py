"""Steps that run as scripts of their own: resumable, and left out where nothing they depend on has changed.

A step depends on its settings, on the content of its inputs, on the code that its script can import and on the versions
of packages. Their hashes, and those of the files it wrote, are kept in pipeline.json, written after every step.
"""

import contextlib
import fcntl
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pokegemma.errors import CheckFailedError, PokegemmaError
from pokegemma.fingerprints import CARD_FILE, FileHashes, hash_of, hash_program
from pokegemma.outputs import atomic_file
from pokegemma.provenance import PROJECT_ROOT

logger = logging.getLogger(__name__)

STATE_FILE = "pipeline.json"
_LOCK_FILE = ".pipeline.lock"


@dataclass(frozen=True)
class Gate:
    """A measured value and what is asked of it; `option` is the flag that moves the limit."""

    option: str
    what: str
    value: float | None
    limit: float
    at_least: bool = True

    @property
    def holds(self) -> bool:
        """Whether the value is there and on the right side of the limit; NaN never is."""
        if self.value is None:
            return False
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        value = "not measured" if self.value is None else f"{self.value:.4g}"
        return f"{self.what} {value}, {self.option} {self.limit:.4g} ({'at least' if self.at_least else 'at most'})"


@dataclass(frozen=True)
class Step:
    """One script with what it reads and writes.

    `paths` are flags whose values say where files lie, `settings` those that change the result. `inputs` returns a hash
    of each thing the script reads; `outputs` are the files and folders that it makes. `gates` are read off the outputs.
    `lost` says why a result that is not among the outputs is no longer there.
    """

    name: str
    script: str
    paths: Mapping[str, Sequence[Path]]
    settings: Sequence[str]
    inputs: Callable[[FileHashes], Mapping[str, str]]
    outputs: Sequence[Path]
    after: Sequence[str] = ()
    command_words: Sequence[str] = ()  # before the flags
    gates: Callable[[], Sequence[Gate]] = tuple
    lost: Callable[[FileHashes], str | None] = lambda hashes: None
    measures: Path | None = None  # a file that, written anew, makes exit status 1 a matter for `gates`

    def command(self) -> list[str]:
        """Return the command line."""
        flags = [word for flag, values in self.paths.items() for word in (flag, *map(str, values))]
        return [
            sys.executable,
            str(PROJECT_ROOT / "scripts" / self.script),
            *self.command_words,
            *flags,
            *self.settings,
        ]

    def dependencies(self, hashes: FileHashes) -> dict[str, str]:
        """Return a hash of each thing that the result depends on, by what a person would call it."""
        return {**self.inputs(hashes), "settings": hash_of(list(self.settings)), **hash_program(self.script, hashes)}

    def written(self, hashes: FileHashes, *, root: Path) -> dict[str, str]:
        """Return {path from `root`: hash} of every file that the step made; the model card is not its own."""
        files = [
            path
            for output in self.outputs
            for path in (sorted(output.rglob("*")) if output.is_dir() else [output])
            if path.is_file() and path.name != CARD_FILE
        ]
        return {path.relative_to(root).as_posix(): hashes.of(path) for path in files}


@dataclass
class State:
    """pipeline.json: {"steps": {name: {"depends_on", "wrote", "seconds", ...}}, "file_hashes": FileHashes.known}."""

    path: Path
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)
    hashes: FileHashes = field(default_factory=FileHashes)

    @classmethod
    def read(cls, output_dir: Path) -> "State":
        """Return the state of an earlier run, or an empty one.

        Raises:
            PokegemmaError: the folder holds something else, or the file is damaged.
        """
        path = output_dir / STATE_FILE
        if not path.is_file():
            if output_dir.is_dir() and any(path.name != _LOCK_FILE for path in output_dir.iterdir()):
                raise PokegemmaError(f"{output_dir} holds something else than a pipeline's results; choose another")
            return cls(path)
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            return cls(path, dict(record["steps"]), FileHashes(record["file_hashes"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PokegemmaError(f"{path} is damaged ({error}); delete it, and every step is done again") from error

    def write(self) -> None:
        """Write the file, whole or not at all."""
        record = {"steps": self.steps, "file_hashes": self.hashes.known}
        with atomic_file(self.path) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    def why(self, step: Step) -> str | None:
        """Return why a step has to run, or None where its result is there and nothing it depends on has changed."""
        earlier = self.steps.get(step.name)
        if earlier is None:
            return "not done yet"
        now, then = step.dependencies(self.hashes), earlier["depends_on"]
        if changed := sorted(name for name in {*now, *then} if now.get(name) != then.get(name)):
            return f"{', '.join(changed)} changed"
        for name, digest in earlier["wrote"].items():
            if not (self.path.parent / name).is_file():
                return f"{name} is gone"
            if self.hashes.of(self.path.parent / name) != digest:
                return f"{name} was changed"
        return step.lost(self.hashes)


@contextlib.contextmanager
def locked(output_dir: Path) -> Iterator[int]:
    """Hold a folder for this process and the steps it starts; yield the lock's descriptor, for them to inherit.

    A step that outlives a killed pipeline still holds it.

    Raises:
        PokegemmaError: somebody else holds it, or it cannot be written to.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        lock = open(output_dir / _LOCK_FILE, "a+", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise PokegemmaError(f"--output_dir {output_dir} cannot be written to: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise PokegemmaError(
                f"{output_dir}: another pipeline, or a step of one that was killed, still runs "
                f"(process {lock.read()}); wait for it, or end it"
            ) from error
        _write_holder(lock.fileno(), os.getpid())
        yield lock.fileno()


def _write_holder(lock: int, pid: int) -> None:
    os.ftruncate(lock, 0)
    os.write(lock, str(pid).encode())


def run_step(step: Step, state: State, *, lock: int) -> None:
    """Run a step's script, with its output on stderr and in logs/NAME.log, and record what it did.

    Raises:
        PokegemmaError: the script ended with the exit status of a user's mistake; the message is the script's.
        CheckFailedError: it failed in another way.
    """
    state.steps.pop(step.name, None)
    state.write()
    output_dir = state.path.parent
    for output in step.outputs:  # what a killed process left under a temporary name
        for left in output.parent.glob(f".{output.name}.*"):
            if left.suffix in (".part", ".old"):
                shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink()
    log = output_dir / "logs" / f"{step.name}.log"
    log.parent.mkdir(exist_ok=True)
    started = time.monotonic()
    depends_on = step.dependencies(state.hashes)
    before = _identity(step.measures)
    status = _run(step.command(), log, lock)
    measured = _identity(step.measures) not in (None, before)  # a traceback is exit status 1, too, and writes nothing
    if status and not (status == 1 and measured):
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if "error: " in line]
        said = lines[-1].partition("error: ")[2] if lines else f"exit status {status}"
        if status < 0:
            said = f"killed by signal {-status}" + (" (out of memory?)" if status == -9 else "")
        kind = PokegemmaError if status == 2 else CheckFailedError
        raise kind(f"{step.name} failed: {said} (all of its output: {log})")
    state.steps[step.name] = {
        "depends_on": depends_on,
        "wrote": step.written(state.hashes, root=output_dir),
        "seconds": round(time.monotonic() - started, 1),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    state.write()


def _identity(path: Path | None) -> tuple[int, int] | None:
    if path is None or not path.is_file():
        return None
    facts = path.stat()
    return facts.st_ino, facts.st_mtime_ns


def _run(command: Sequence[str], log: Path, lock: int) -> int:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with open(log, "wb") as file:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=(lock,),
        )
        _write_holder(lock, child.pid)
        try:
            while piece := child.stdout.read1():
                file.write(piece)
                file.flush()
                sys.stderr.buffer.write(piece)
                sys.stderr.flush()
            return child.wait()
        finally:  # Ctrl-C or SIGTERM: the child, too, gets the time to remove what it has half written
            if child.poll() is None:
                child.terminate()
                try:
                    child.wait(timeout=30)
                except subprocess.TimeoutExpired:
                    child.kill()
                    child.wait()
            child.stdout.close()
            _write_holder(lock, os.getpid())


def check_gates(name: str, gates: Sequence[Gate]) -> None:
    """Log each gate.

    Raises:
        CheckFailedError: one or more do not hold; the message has value and limit of each.
    """
    for gate in gates:
        logger.info("  %s: %s: %s", name, gate, "passed" if gate.holds else "FAILED")
    if failed := [str(gate) for gate in gates if not gate.holds]:
        raise CheckFailedError(f"the gate of {name} failed: {'; '.join(failed)}")
