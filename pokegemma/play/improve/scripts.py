"""Run the project's scripts as steps whose results are kept, so that a run can be continued."""

import logging
import multiprocessing
import os
import runpy
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path

from pokegemma.environment import detect_hardware
from pokegemma.errors import CheckFailedError
from pokegemma.provenance import PROJECT_ROOT, read_run_record

logger = logging.getLogger(__name__)

SCRIPT_MODULES = ["pokegemma.training.sft", "pokegemma.evaluation.predict", "peft.tuners.lora.bnb", "matplotlib.pyplot"]
"""What most scripts import, which takes a core several seconds: once, before their processes are forked."""


@dataclass(frozen=True)
class ScriptRunner:
    """Run scripts with `num_threads` threads each; the output of each goes to a file in `logs`."""

    logs: Path
    num_threads: int
    _running: set[BaseProcess] = field(default_factory=set)
    _is_stopped: threading.Event = field(default_factory=threading.Event)

    def stop(self) -> None:
        """Let running scripts end as on SIGTERM (training saves a checkpoint), and start no more."""
        self._is_stopped.set()
        for process in list(self._running):
            process.terminate()

    def run(self, script: str, output: Path, **options: object) -> None:
        """Run scripts/`script`.py unless its `output` is there already.

        Args:
            output: the folder that the script makes, whole or not at all; a training run is continued.
            options: its flags; None leaves one out, True is a flag without a value.

        Raises:
            CheckFailedError: the script failed.
        """
        if _is_complete(output):
            return
        name, began = "_".join(output.relative_to(self.logs.parent).parts), time.monotonic()
        if self._is_stopped.is_set():
            raise CheckFailedError(f"{name}: not started, since another step failed or the run was stopped")
        logger.info("%s: %s ...", name, script)
        arguments, log = _flags(options), self.logs / f"{name}.log"
        if any(output.glob("checkpoint-*")):
            arguments.append("--resume_from_checkpoint")
        elif script == "sft_pokemon_gemma3":
            arguments.append("--overwrite")
        process = _process_context().Process(target=_be_script, args=(script, arguments, log, self.num_threads))
        process.start()
        self._running.add(process)
        if self._is_stopped.is_set():  # since `stop` looked at what runs
            process.terminate()
        try:
            process.join()
        finally:
            self._running.discard(process)
            process.kill()
        if process.exitcode != 0:
            raise CheckFailedError(f"scripts/{script}.py ended with status {process.exitcode}; its output is in {log}")
        if not _is_complete(output):
            raise CheckFailedError(f"scripts/{script}.py was interrupted; its output is in {log}")
        logger.info("%s: took %.0f s", name, time.monotonic() - began)


def _process_context() -> BaseContext:
    """Return what starts a step's process: a fork after the imports, or a new Python where a fork could not go on.

    bitsandbytes starts CUDA when it is imported, and a forked process cannot start it again; a fork of a process with
    frameworks of Apple's in it may crash.
    """
    if sys.platform == "darwin" or detect_hardware().usable_gpus:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(SCRIPT_MODULES)
    return context


def _is_complete(output: Path) -> bool:
    record = read_run_record(output) if output.exists() else None
    return record is not None and record.get("status", "completed") == "completed"


def _be_script(script: str, arguments: list[str], log: Path, num_threads: int) -> None:
    """Run a script in this process, with its output in a file."""
    import torch

    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(OMP_NUM_THREADS=str(num_threads), TOKENIZERS_PARALLELISM="false")
    torch.set_num_threads(num_threads)
    path = str(PROJECT_ROOT / "scripts" / f"{script}.py")
    sys.argv = [path, *arguments]
    runpy.run_path(path, run_name="__main__")


def link_sessions(folders: Iterable[Path], runs: Path) -> None:
    """Make `runs` with the sessions of several recordings, without copying their pictures."""
    for number, folder in enumerate(folders):
        for session in sorted(folder.glob("session_*")):
            target = runs / f"session_{number}_{session.name.removeprefix('session_')}"
            for file in sorted(path for path in session.rglob("*") if path.is_file()):
                link = target / file.relative_to(session)
                link.parent.mkdir(parents=True, exist_ok=True)
                if not link.exists():
                    os.link(file, link)


def _flags(options: dict[str, object]) -> list[str]:
    flags = []
    for name, value in options.items():
        if value is not None:
            flags += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return flags
