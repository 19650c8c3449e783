"""Run a step as a script in its own process, unless nothing that it depends on has changed since it last ran."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pokegemma.errors import CheckFailedError, PokegemmaError
from pokegemma.fingerprints import CARD_FILE, FileHashes, hash_of
from pokegemma.outputs import file_lock, write_if_changed
from pokegemma.provenance import PROJECT_ROOT, package_versions
from pokegemma.release.measurements import read_json

RECORD_FILE, _LOCK_FILE = "pipeline.json", ".pipeline.lock"
_STOP_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Step:
    """A script, what it reads and what it writes.

    Attributes:
        command: a file in scripts/ and the words that never change.
        output: the file or folder that it writes.
        paths: flags that name files. Their values are not compared: moving a file does not change the result.
        settings: the other flags. A flag that is None is left out.
        inputs: all that the script reads, by name; a path stands for the contents of this file or folder.
        is_check: if the script wrote its output, exit status 1 means that a limit was exceeded, which the gates judge.
        why_result_is_missing: returns why a result outside `output` (a version in the registry) is missing, or None.
    """

    name: str
    command: str
    output: Path
    paths: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Any] = field(default_factory=dict)
    is_check: bool = False
    why_result_is_missing: Callable[[], str | None] = lambda: None

    def words(self) -> list[str]:
        """Return the words of the command line."""
        words = [sys.executable, *self.command.split()]
        words[1] = str(PROJECT_ROOT / "scripts" / words[1])
        for name, value in {**self.paths, **self.settings}.items():
            if value is not None:
                words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        return words

    def dependencies(self, hashes: FileHashes) -> dict[str, str]:
        """Return a hash of each thing that the result depends on, by name."""
        inputs = {name: hash_contents(value, hashes) for name, value in self.inputs.items()}
        settings, versions = hash_of([self.command, self.settings]), hash_of(package_versions())
        return {**inputs, "settings": settings, "package versions": versions}


def hash_contents(value: Any, hashes: FileHashes) -> str:
    """Hash a value, in which each path stands for the contents of its file or folder.

    Hidden files (.DS_Store of a file manager) and the model card, which the pipeline itself writes, do not count.
    """
    if isinstance(value, Path) and value.is_dir():
        names = [path.relative_to(value) for path in sorted(value.rglob("*")) if path.is_file()]
        visible = [name for name in names if not any(part.startswith(".") for part in name.parts)]
        value = {name.as_posix(): value / name for name in visible if name.name != CARD_FILE}
    if isinstance(value, Path):
        return hashes.of(value)
    if isinstance(value, Mapping):
        value = {name: hash_contents(item, hashes) for name, item in value.items()}
    return hash_of(value)


class StepRunner:
    """Runs steps in an output folder; pipeline.json has {step: {"depends_on", "wrote", "seconds"}} of the last runs."""

    def __init__(self, output_dir: Path, *, lock: int | None = None) -> None:
        """Read pipeline.json. `lock` is a descriptor that the scripts inherit.

        Raises:
            PokegemmaError: the folder contains something else, or the file is damaged.
        """
        self._output_dir, self._lock = output_dir, lock
        self._hashes = FileHashes()
        self.record: dict[str, Any] = {}
        if (output_dir / RECORD_FILE).is_file():
            self.record = read_json(output_dir / RECORD_FILE)
        elif output_dir.is_dir() and any(output_dir.iterdir()) and not (output_dir / _LOCK_FILE).is_file():
            raise PokegemmaError(f"{output_dir} contains files that are not from a pipeline; choose another folder")

    def reason_to_run(self, step: Step) -> str | None:
        """Return why a step has to run; None if its result exists and nothing that it depends on has changed."""
        if step.name not in self.record:
            return "not done yet"
        now, then = step.dependencies(self._hashes), self.record[step.name]["depends_on"]
        if changed := sorted(name for name in {*now, *then} if now.get(name) != then.get(name)):
            return f"{', '.join(changed)} changed"
        if not step.output.exists():
            return f"{step.output.name} is missing"
        if hash_contents(step.output, self._hashes) != self.record[step.name]["wrote"]:
            return f"{step.output.name} was changed"
        return step.why_result_is_missing()

    def run(self, step: Step) -> None:
        """Run a step's script, with its output on stderr and in logs/NAME.log, and record the result.

        Raises:
            PokegemmaError: the script exited with the status of a user's mistake; the message is the script's.
            CheckFailedError: it failed in another way.
        """
        log = self._output_dir / "logs" / f"{step.name}.log"
        log.parent.mkdir(exist_ok=True)
        depends_on, started, before = step.dependencies(self._hashes), time.monotonic(), _time_written(step.output)
        status = _run_script(step.words(), log, self._lock)
        # A traceback also exits with 1, and writes nothing.
        is_measured = step.is_check and status == 1 and _time_written(step.output) not in (None, before)
        if status and not is_measured:
            error_type = PokegemmaError if status == 2 else CheckFailedError
            raise error_type(f"{step.name} failed: {_describe_failure(status, log)} (all of its output: {log})")
        self.record[step.name] = {
            "depends_on": depends_on,
            "wrote": hash_contents(step.output, self._hashes),
            "seconds": round(time.monotonic() - started, 1),
        }
        write_if_changed(self._output_dir / RECORD_FILE, json.dumps(self.record, indent=1))


@contextlib.contextmanager
def lock_folder(output_dir: Path) -> Iterator[StepRunner]:
    """Lock a folder for this process and the scripts that it starts; yield what runs them.

    So a script that outlives a killed pipeline still holds the lock.

    Raises:
        PokegemmaError: another process holds the lock, or the folder is not writable or contains something else.
    """
    StepRunner(output_dir)  # refuses a folder with something else before a lock file is written there
    with contextlib.ExitStack() as stack:
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(file_lock(output_dir / _LOCK_FILE, wait=False))
        except BlockingIOError as error:
            raise PokegemmaError(
                f"{output_dir}: another pipeline, or a step of a killed one, still runs in this folder; "
                "wait for it or stop it"
            ) from error
        except OSError as error:
            raise PokegemmaError(f"--output_dir {output_dir} is not writable: {error.strerror}") from error
        yield StepRunner(output_dir, lock=lock.fileno())


def _time_written(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


def _describe_failure(status: int, log: Path) -> str:
    if status < 0:
        return f"killed by signal {-status}" + (" (out of memory?)" if status == -9 else "")
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if "error: " in line]
    return lines[-1].partition("error: ")[2] if lines else f"exit status {status}"


def _run_script(words: Sequence[str], log: Path, lock: int) -> int:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with open(log, "wb") as file, subprocess.Popen(words, env=environment, pass_fds=(lock,), **pipes) as child:
        try:
            while piece := child.stdout.read1():
                file.write(piece)
                file.flush()
                sys.stderr.buffer.write(piece)
                sys.stderr.flush()
            return child.wait()
        finally:
            if child.poll() is None:  # after Ctrl-C or SIGTERM: it has time to remove its temporary files
                child.terminate()
                try:
                    child.wait(timeout=_STOP_TIMEOUT_S)
                except subprocess.TimeoutExpired:
                    child.kill()
