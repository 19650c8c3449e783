"""Run the project's scripts as steps whose results are kept, so that a run can be continued."""

import json
import logging
import multiprocessing
import os
import runpy
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

from pokegemma.environment import detect_hardware
from pokegemma.errors import CheckFailedError, PokegemmaError
from pokegemma.outputs import atomic_file
from pokegemma.provenance import PROJECT_ROOT, read_run_record

logger = logging.getLogger(__name__)

SCRIPT_MODULES = ["pokegemma.training.sft", "pokegemma.evaluation.predict", "peft.tuners.lora.bnb", "matplotlib.pyplot"]
"""What most scripts import, which takes a core several seconds: once, before their processes are forked."""

OPTIONS_FILE = "options.json"
_TRAINING = ("sft_", "rl_")
"""What the names of scripts begin with that write checkpoints and take --overwrite."""

Outcome = TypeVar("Outcome")


def has_completed(output: Path) -> bool:
    """Return whether the run.json of a folder does not record a run that was stopped."""
    record = read_run_record(output) if output.exists() else None
    return record is not None and record.get("status", "completed") in ("complete", "completed")


@dataclass(frozen=True)
class ScriptRunner:
    """Run scripts with `num_threads` threads each; the output of each goes to a file in `logs`.

    Attributes:
        modules: what the scripts import, imported once before their processes are forked.
    """

    logs: Path
    num_threads: int
    modules: Sequence[str] = tuple(SCRIPT_MODULES)
    _running: set[BaseProcess] = field(default_factory=set)
    _is_stopped: threading.Event = field(default_factory=threading.Event)

    def stop(self) -> None:
        """Let running scripts end as on SIGTERM (training saves a checkpoint), and start no more."""
        self._is_stopped.set()
        for process in list(self._running):
            process.terminate()

    def run_all(self, functions: Sequence[Callable[[], Outcome]], *, num_parallel: int = 1) -> list[Outcome]:
        """Call functions that run scripts, `num_parallel` at once, and return their results.

        When one fails, or a signal ends this process, running scripts end as in `stop` before the error is raised.
        """
        with ThreadPoolExecutor(num_parallel) as executor:
            futures = [executor.submit(function) for function in functions]
            try:
                return [future.result() for future in futures]
            except BaseException:
                self.stop()
                executor.shutdown(cancel_futures=True)
                raise

    def run(
        self, script: str, output: Path, *, is_complete: Callable[[Path], bool] = has_completed, **options: object
    ) -> None:
        """Run scripts/`script`.py unless its `output` is there already.

        Args:
            output: the folder that the script makes; a script that was interrupted continues in it.
            is_complete: whether the output is what the script writes to its end.
            options: its flags; None leaves one out, True is a flag without a value, a list has several values.

        Raises:
            CheckFailedError: the script failed.
        """
        if is_complete(output):
            return
        name, began = "_".join(output.relative_to(self.logs.parent).parts), time.monotonic()
        if self._is_stopped.is_set():
            raise CheckFailedError(f"{name}: not started, since another step failed or the run was stopped")
        logger.info("%s: %s ...", name, script)
        arguments, log = _flags(options), self.logs / f"{name}.log"
        if any(output.glob("checkpoint-*")):
            arguments.append("--resume_from_checkpoint")
        elif script.startswith(_TRAINING):
            arguments.append("--overwrite")
        process = _process_context(self.modules).Process(
            target=_be_script, args=(script, arguments, log, self.num_threads)
        )
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
        if not is_complete(output):
            raise CheckFailedError(f"scripts/{script}.py was interrupted; its output is in {log}")
        logger.info("%s: took %.0f s", name, time.monotonic() - began)


def _process_context(modules: Sequence[str]) -> BaseContext:
    """Return what starts a step's process: a fork after the imports, or a new Python where a fork could not go on.

    bitsandbytes starts CUDA when it is imported, and a forked process cannot start it again; a fork of a process with
    frameworks of Apple's in it may crash.
    """
    if sys.platform == "darwin" or detect_hardware().usable_gpus:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(modules))
    return context


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


def keep_options(folder: Path, options: Mapping[str, Any], *, inputs: Mapping[str, str] | None = None) -> None:
    """Write the options of a run of several scripts into its folder, or compare them with those of an earlier call.

    Args:
        options: values as JSON takes them.
        inputs: a hash of what each of some flags names.

    Raises:
        PokegemmaError: the folder contains a run with other options or inputs, or something else.
    """
    path = folder / OPTIONS_FILE
    values = {**options, "inputs": dict(inputs or {})}
    if not path.exists():
        if folder.exists() and any(folder.iterdir()):
            raise PokegemmaError(f"{folder} contains files that are not from this script; choose another --output_dir")
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    changed = [
        f"--{name} was {before.get(name)}, is {value}" for name, value in options.items() if before.get(name) != value
    ]
    known = before.get("inputs", {})
    changed += [f"what {flag} names has changed" for flag in values["inputs"] if known.get(flag) != inputs[flag]]
    if changed:
        raise PokegemmaError(
            f"{folder} contains a run with other options: {', '.join(changed)}; choose another --output_dir"
        )


def _flags(options: dict[str, object]) -> list[str]:
    flags = []
    for name, value in options.items():
        if value is not None:
            texts = [] if value is True else map(str, value if isinstance(value, list | tuple) else [value])
            flags += [f"--{name}", *texts]
    return flags
