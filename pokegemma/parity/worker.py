"""Ask an engine in a separate process, so that its memory can be measured and its crash ends nothing else.

Nothing here loads torch, which llama.cpp and MLX do not need and whose memory would be counted as theirs.
"""

import contextlib
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from pokegemma.engines.engine import Engine
from pokegemma.engines.questions import Question
from pokegemma.errors import PokegemmaError
from pokegemma.parity.engine_spec import EngineFailedError, EngineSpec
from pokegemma.parity.task import Measured, Reading, Task

_EXIT_TIMEOUT_S = 20
_EXTRAS = {"llama_cpp": "gguf", "mlx": "mlx", "mlx_vlm": "mlx"}


def load_engine(spec: EngineSpec, *, num_context: int) -> Engine:
    """Load an engine; only llama.cpp needs `num_context`, since its memory grows with it.

    Raises:
        PokegemmaError: its files are damaged or missing.
        ModuleNotFoundError: its package is not installed.
    """
    if spec.kind == "transformers":
        from pokegemma.engines.transformers_engine import TransformersEngine

        return TransformersEngine(spec.path, dtype=spec.dtype, device=spec.device, image_attention=spec.image_attention)
    if spec.kind == "llama.cpp":
        from pokegemma.engines.llama_cpp_engine import LlamaCppEngine

        return LlamaCppEngine(spec.path, spec.mmproj, num_context=num_context)
    from pokegemma.engines.mlx_engine import MlxEngine

    return MlxEngine(spec.path)


def take_reading(engine: Engine, task: Task, number: int) -> Reading:
    """Ask an engine for one decision of a task."""
    return ask_engine(
        engine,
        task.question(number),
        prefix=task.prefix,
        branches=task.branches,
        max_new_tokens=task.max_new_tokens,
        answer=None if task.answers is None else task.answers[number],
    )


def ask_engine(
    engine: Engine,
    question: Question,
    *,
    prefix: tuple[int, ...],
    branches: tuple[tuple[int, ...], ...],
    max_new_tokens: int,
    answer: tuple[int, ...] | None = None,
) -> Reading:
    """Ask an engine one question, and for the log-probabilities of the answers that `prefix` and `branches` stand for.

    The answer is written first, so that its seconds include the prompt, which no earlier reading has cached.

    Args:
        answer: tokens to read; None: the engine's own.

    Raises:
        PokegemmaError: a token is not in its vocabulary, or it returns NaN.
    """
    began = time.perf_counter()
    tokens = tuple(engine.write(question, max_new_tokens=max_new_tokens))
    seconds = time.perf_counter() - began
    answer = tokens if answer is None else answer
    continuations = [(*prefix, *branch) for branch in branches]
    # An engine that writes nothing has no answer to read.
    rows = engine.read(question, [*continuations, answer] if answer else continuations)
    vocabulary = rows[0].shape[-1]
    beyond = [token for row in (*continuations, answer) for token in row if token >= vocabulary]
    if beyond:
        raise PokegemmaError(f"token {beyond[0]} is not among its {vocabulary}: not the reference's vocabulary")
    start = len(prefix)
    buttons = [
        row[np.arange(start, start + len(branch)), list(branch)].sum()
        for row, branch in zip(rows, branches, strict=False)
    ]
    answer_rows = rows[-1] if answer else np.zeros((0, vocabulary), np.float32)
    log_probabilities = answer_rows[np.arange(len(answer)), list(answer)]
    if not (np.isfinite(buttons).all() and np.isfinite(log_probabilities).all()):
        raise PokegemmaError(f"{question.id}: NaN or infinity instead of log-probabilities")
    return Reading(
        text=engine.text(tokens),
        seconds=seconds,
        tokens=tokens,
        prompt=tuple(engine.prompt_tokens(question)),
        log_probabilities=log_probabilities,
        likeliest=answer_rows.argmax(-1),
        buttons=np.array(buttons, np.float32),
    )


def peak_memory_bytes() -> int:
    """Return the peak memory of this process."""
    status = Path("/proc/self/status")
    if status.is_file():  # on Linux, getrusage includes the parent's peak
        line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def _peak_gpu_memory_bytes() -> int | None:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    return torch.cuda.max_memory_allocated()


def _serve(connection: Connection, spec: EngineSpec, task: Task, log: Path) -> None:
    """Send a `Reading` for each question, then a `Measured` without readings; or the message of a user's mistake."""
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)  # llama.cpp writes there past Python
        os.dup2(file.fileno(), 2)
    try:
        engine = load_engine(spec, num_context=task.num_context)
        engine.write(task.question(len(task.examples) - 1), max_new_tokens=2)  # a warm-up
        for number in range(len(task.examples)):
            connection.send(take_reading(engine, task, number))
    except PokegemmaError as error:
        connection.send(str(error))
        return
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        connection.send(f"{error.name} is not installed; ./init.sh --with {_EXTRAS[error.name]} adds it")
        return
    connection.send(Measured((), peak_memory_bytes(), _peak_gpu_memory_bytes(), engine.name, engine.weights))


def measure(
    spec: EngineSpec, task: Task, *, timeout_s: float, on_reading: Callable[[], None] = lambda: None
) -> Measured:
    """Ask an engine all questions in a process that is started for it.

    Args:
        timeout_s: limit for each answer; the first one includes loading the model.

    Raises:
        EngineFailedError: it did not answer all of them.
    """
    with tempfile.TemporaryDirectory() as folder, _started(spec, task, Path(folder) / "log") as (process, connection):
        readings = []
        while True:
            if not connection.poll(timeout_s):
                raise EngineFailedError(f"no answer within {timeout_s:g} s")
            try:
                message = connection.recv()
            except EOFError:
                process.join()
                raise EngineFailedError(_last_line(process.exitcode, Path(folder) / "log")) from None
            if isinstance(message, str):
                raise EngineFailedError(message)
            if isinstance(message, Measured):
                return replace(message, readings=tuple(readings))
            readings.append(message)
            on_reading()


@contextlib.contextmanager
def _started(
    spec: EngineSpec, task: Task, log: Path
) -> Iterator[tuple[multiprocessing.process.BaseProcess, Connection]]:
    context = multiprocessing.get_context("spawn")  # a forked process would start with this process's memory
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(sender, spec, task, log), daemon=True)
    process.start()
    sender.close()  # now the child's end of file is ours
    try:
        yield process, receiver
    finally:
        receiver.close()
        process.join(timeout=_EXIT_TIMEOUT_S)  # if killed at once, it would leave semaphores behind
        if process.is_alive():
            process.kill()
            process.join()


def _last_line(exit_code: int | None, log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    last = next((line for line in reversed(lines) if line), "no output")
    died = f"killed by {signal.Signals(-exit_code).name}" if exit_code and exit_code < 0 else f"exit {exit_code}"
    return f"{died}: {last[:300]}"
