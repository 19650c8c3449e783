"""Run a step as a script in its own process, unless nothing that it depends on has changed since it last ran."""

import contextlib
import json
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
from pokegemma.fingerprints import CARD_FILE, FileHashes, hash_of
from pokegemma.outputs import atomic_file, file_lock
from pokegemma.provenance import PROJECT_ROOT, package_versions

RECORD_FILE = "pipeline.json"
_LOCK_FILE = ".pipeline.lock"


@dataclass(frozen=True)
class Step:
    """A script, what it reads and what it writes.

    Attributes:
        script: its file in scripts/ and, where it has commands, the command.
        flags: values by name, None for a flag that is left out. Values that are paths are not part of the settings:
            moving a file does not change the result.
        inputs: a hash of each thing that the script reads, by name.
        outputs: the files and folders that it writes.
        why_result_is_missing: returns why a result outside `outputs` (a version in the registry) is missing, or None.
        measurement: the file with the result of a check. If the script wrote it, exit status 1 means that a limit was
            exceeded, which the gates judge.
    """

    name: str
    script: Sequence[str]
    flags: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    outputs: Sequence[Path] = ()
    why_result_is_missing: Callable[[], str | None] = lambda: None
    measurement: Path | None = None

    def command_line(self) -> list[str]:
        """Return the words of the command line."""
        script, *words = self.script
        for name, value in self.flags.items():
            if value is not None:
                words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        return [sys.executable, str(PROJECT_ROOT / "scripts" / script), *words]

    def dependencies(self) -> dict[str, str]:
        """Return a hash of each thing that the result depends on, by name."""
        settings = {
            name: value
            for name, value in self.flags.items()
            if not any(isinstance(item, Path) for item in (value if isinstance(value, list) else [value]))
        }
        versions = hash_of(package_versions())
        return {**self.inputs, "settings": hash_of([self.script, settings]), "package versions": versions}

    def hash_outputs(self, hashes: FileHashes) -> str:
        """Return one hash of all files that the step wrote; the pipeline itself writes the model card."""
        files = {}
        for output in self.outputs:
            for path in sorted(output.rglob("*")) if output.is_dir() else [output]:
                inside = path.relative_to(output)
                is_hidden = any(part.startswith(".") for part in inside.parts)  # .DS_Store of a file manager
                if path.is_file() and path.name != CARD_FILE and not is_hidden:
                    files[f"{output.name}/{inside}"] = hashes.of(path)
        return hash_of(files)


@dataclass
class PipelineRecord:
    """pipeline.json: {"steps": {name: {"depends_on", "wrote", "seconds", ...}}, "file_hashes": FileHashes.known}."""

    path: Path
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)
    hashes: FileHashes = field(default_factory=FileHashes)

    @classmethod
    def read(cls, output_dir: Path) -> "PipelineRecord":
        """Return the record of an earlier run, or an empty one.

        Raises:
            PokegemmaError: the folder contains something else, or the file is damaged.
        """
        path = output_dir / RECORD_FILE
        if not path.is_file():
            if output_dir.is_dir() and any(path.name != _LOCK_FILE for path in output_dir.iterdir()):
                raise PokegemmaError(f"{output_dir} contains files that are not from a pipeline; choose another folder")
            return cls(path)
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            return cls(path, dict(record["steps"]), FileHashes(record["file_hashes"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PokegemmaError(f"{path} is damaged ({error}); choose another folder") from error

    def write(self) -> None:
        """Write the file, whole or not at all."""
        record = {"steps": self.steps, "file_hashes": self.hashes.known}
        with atomic_file(self.path) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    def reason_to_run(self, step: Step) -> str | None:
        """Return why a step has to run; None if its result exists and nothing that it depends on has changed."""
        earlier = self.steps.get(step.name)
        if earlier is None:
            return "not done yet"
        now, then = step.dependencies(), earlier["depends_on"]
        if changed := sorted(name for name in {*now, *then} if now.get(name) != then.get(name)):
            return f"{', '.join(changed)} changed"
        if missing := [output.name for output in step.outputs if not output.exists()]:
            return f"{missing[0]} is missing"
        if step.hash_outputs(self.hashes) != earlier["wrote"]:
            return f"{', '.join(output.name for output in step.outputs)} was changed"
        return step.why_result_is_missing()


@contextlib.contextmanager
def lock_folder(output_dir: Path) -> Iterator[int]:
    """Lock a folder for this process and its steps; yield the lock's descriptor, which the steps inherit.

    So a step that outlives a killed pipeline still holds the lock.

    Raises:
        PokegemmaError: another process holds the lock, or the folder is not writable.
    """
    path = output_dir / _LOCK_FILE
    with contextlib.ExitStack() as stack:
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(file_lock(path, wait=False)).fileno()
        except BlockingIOError as error:
            holder = path.read_text(encoding="utf-8")
            raise PokegemmaError(
                f"{output_dir}: another pipeline, or a step of a killed one, still runs in this folder "
                f"(process {holder}); wait for it or stop it"
            ) from error
        except OSError as error:
            raise PokegemmaError(f"--output_dir {output_dir} is not writable: {error.strerror}") from error
        _write_process_id(lock, os.getpid())
        yield lock


def _write_process_id(lock: int, process_id: int) -> None:
    os.ftruncate(lock, 0)
    os.write(lock, str(process_id).encode())


def run_step(step: Step, record: PipelineRecord, *, lock: int) -> None:
    """Run a step's script, with its output on stderr and in logs/NAME.log, and record the result.

    Raises:
        PokegemmaError: the script exited with the status of a user's mistake; the message is the script's.
        CheckFailedError: it failed in another way.
    """
    record.steps.pop(step.name, None)
    record.write()
    output_dir = record.path.parent
    for output in step.outputs:  # files that a killed process left under a temporary name
        for path in output.parent.glob(f".{output.name}.*"):
            if path.suffix in (".part", ".old"):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
    log = output_dir / "logs" / f"{step.name}.log"
    log.parent.mkdir(exist_ok=True)
    started, before = time.monotonic(), _identify(step.measurement)
    status = _run_script(step.command_line(), log, lock)
    # A traceback also exits with 1, and writes nothing.
    has_measured = _identify(step.measurement) not in (None, before)
    if status and not (status == 1 and has_measured):
        error_type = PokegemmaError if status == 2 else CheckFailedError
        raise error_type(f"{step.name} failed: {_describe_failure(status, log)} (all of its output: {log})")
    record.steps[step.name] = {
        "depends_on": step.dependencies(),
        "wrote": step.hash_outputs(record.hashes),
        "seconds": round(time.monotonic() - started, 1),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    record.write()


def _identify(file: Path | None) -> tuple[int, int] | None:
    """Return what changes if a file is written again, None if there is no file."""
    if file is None or not file.is_file():
        return None
    facts = file.stat()
    return facts.st_ino, facts.st_mtime_ns


def _describe_failure(status: int, log: Path) -> str:
    if status < 0:
        return f"killed by signal {-status}" + (" (out of memory?)" if status == -9 else "")
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if "error: " in line]
    return lines[-1].partition("error: ")[2] if lines else f"exit status {status}"


def _run_script(words: Sequence[str], log: Path, lock: int) -> int:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with open(log, "wb") as file, subprocess.Popen(words, env=environment, pass_fds=(lock,), **pipes) as child:
        _write_process_id(lock, child.pid)
        try:
            while piece := child.stdout.read1():
                file.write(piece)
                file.flush()
                sys.stderr.buffer.write(piece)
                sys.stderr.flush()
            return child.wait()
        finally:  # after Ctrl-C or SIGTERM, give the script time to remove its temporary files
            if child.poll() is None:
                child.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(timeout=30)
                child.kill()
            _write_process_id(lock, os.getpid())
