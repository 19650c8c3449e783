"""Put questions to an engine in a process of its own, whose memory is the engine's and whose crash is its own.

Nothing here loads torch: under llama.cpp and MLX the process would hold it for nothing.
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
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

import numpy as np

from pokegemma.data.prompts import Layout
from pokegemma.data.samples import Sample
from pokegemma.data.trajectories import Trajectory
from pokegemma.engines.engine import Engine
from pokegemma.engines.questions import Question, build_questions
from pokegemma.errors import PokegemmaError

_EXIT_TIMEOUT_S = 20
_SPARE_TOKENS = 256
_EXTRAS = {"llama_cpp": "gguf", "mlx": "mlx", "mlx_vlm": "mlx"}


class EngineFailedError(PokegemmaError):
    """An engine could not be loaded, or died; the message is its own last words."""


@dataclass(frozen=True)
class EngineSpec:
    """Which engine, and what of: a checkpoint or MLX folder, or a GGUF file with its mmproj file.

    `dtype`, `device` and `image_attention` are transformers' alone.
    """

    kind: Literal["transformers", "llama.cpp", "mlx"]
    name: str
    path: Path
    mmproj: Path | None = None
    dtype: str = "auto"
    device: str | None = None
    image_attention: str | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """What holds its weights."""
        if self.kind == "llama.cpp":
            return (self.path,) if self.mmproj is None else (self.path, self.mmproj)
        return tuple(sorted(self.path.glob("*.safetensors")))


@dataclass(frozen=True)
class Task:
    """What every engine is asked: these decisions, and the buttons as continuations.

    `prefix` and `branches` as in `ButtonTokens`. `answers`: tokens to read, one answer a decision; None: the engine's
    own. `num_context`: tokens that llama.cpp keeps room for, see `context_for`.
    """

    examples: tuple[Sample | Trajectory, ...]
    layout: Layout
    dataset_folder: Path
    size_px: int
    prefix: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...]
    max_new_tokens: int
    answers: tuple[tuple[int, ...], ...] | None = None
    num_context: int = 8192

    def question(self, number: int) -> Question:
        """Return a decision as a question; the pictures are read here, one question's at a time."""
        (question,) = build_questions(
            self.examples[number : number + 1],
            layout=self.layout,
            dataset_folder=self.dataset_folder,
            size_px=self.size_px,
        )
        return question


@dataclass(frozen=True)
class Reading:
    """What an engine says to one question. What a server does not tell is None.

    Attributes:
        text: the greedy answer, written in `seconds` from the pictures in memory to its last token.
        tokens: of this answer.
        prompt: tokens of the prompt, `SOFT_TOKEN` for those of pictures.
        log_probabilities: (length,) of the tokens of the reference's answer.
        likeliest: (length,) the likeliest token at each place of the reference's answer.
        buttons: (8,) log-probability of each of `BUTTONS`, after what all answers begin with.
    """

    text: str
    seconds: float
    tokens: tuple[int, ...] | None = None
    prompt: tuple[int, ...] | None = None
    log_probabilities: np.ndarray | None = None
    likeliest: np.ndarray | None = None
    buttons: np.ndarray | None = None


@dataclass(frozen=True)
class Measured:
    """All readings of an engine, and the most memory that its process and, under CUDA, its GPU held.

    `engine` and `weights` are what the loaded engine says of itself; None where it was not loaded here.
    """

    readings: tuple[Reading, ...]
    peak_memory_bytes: int | None = None
    peak_gpu_memory_bytes: int | None = None
    engine: str | None = None
    weights: str | None = None


def context_for(task: Task, reference: Measured) -> int:
    """Return how many tokens the longest prompt and all that is read or written after it take, rounded up.

    An export whose prompts are a little longer than the reference's is to be found out by its prompts, not by its
    context: hence the spare tokens. llama.cpp itself rounds up to 256.
    """
    prompt = max(len(reading.prompt) for reading in reference.readings)
    buttons = max(len(task.prefix) + len(branch) for branch in task.branches)
    needed = prompt + max(task.max_new_tokens, buttons) + _SPARE_TOKENS
    return -(-needed // 256) * 256


def load_engine(spec: EngineSpec, *, num_context: int) -> Engine:
    """Load an engine; `num_context` is for llama.cpp, whose memory grows with it.

    Raises:
        PokegemmaError: its files are at fault, or its package is not installed.
    """
    if spec.kind == "transformers":
        from pokegemma.engines.transformers_engine import TransformersEngine

        return TransformersEngine(spec.path, dtype=spec.dtype, device=spec.device, image_attention=spec.image_attention)
    if spec.kind == "llama.cpp":
        from pokegemma.engines.llama_cpp_engine import LlamaCppEngine

        return LlamaCppEngine(spec.path, spec.mmproj, num_context=num_context)
    from pokegemma.engines.mlx_engine import MlxEngine

    return MlxEngine(spec.path)


def read_decision(engine: Engine, task: Task, number: int) -> Reading:
    """Ask an engine one question; written first, so that no reading has processed the prompt for it already."""
    question = task.question(number)
    began = time.perf_counter()
    tokens = tuple(engine.write(question, max_new_tokens=task.max_new_tokens))
    seconds = time.perf_counter() - began
    answer = tokens if task.answers is None else task.answers[number]
    continuations = [(*task.prefix, *branch) for branch in task.branches]
    # An engine that writes nothing has no answer to read.
    rows = engine.read(question, [*continuations, answer] if answer else continuations)
    vocabulary = rows[0].shape[-1]
    beyond = [token for row in (*continuations, answer) for token in row if token >= vocabulary]
    if beyond:
        raise PokegemmaError(f"token {beyond[0]} is not among its {vocabulary}: not the reference's vocabulary")
    start = len(task.prefix)
    buttons = [
        row[np.arange(start, start + len(branch)), list(branch)].sum()
        for row, branch in zip(rows, task.branches, strict=False)
    ]
    said = rows[-1] if answer else np.zeros((0, vocabulary), np.float32)
    told = said[np.arange(len(answer)), list(answer)]
    if not (np.isfinite(buttons).all() and np.isfinite(told).all()):
        raise PokegemmaError(f"{question.id}: it gives NaN or infinity instead of log-probabilities")
    return Reading(
        text=engine.text(tokens),
        seconds=seconds,
        tokens=tokens,
        prompt=tuple(engine.prompt_tokens(question)),
        log_probabilities=told,
        likeliest=said.argmax(-1),
        buttons=np.array(buttons, np.float32),
    )


def peak_memory_bytes() -> int:
    """Return the most memory this process has held."""
    status = Path("/proc/self/status")
    if status.is_file():  # what getrusage tells holds the parent's peak, too, on Linux
        line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def _peak_gpu_memory_bytes() -> int | None:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    return torch.cuda.max_memory_allocated()


def _serve(connection: Connection, spec: EngineSpec, task: Task, log: Path) -> None:
    """Send a `Reading` for each question, then a `Measured` without them; a message instead where the user erred."""
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)  # llama.cpp writes there past Python
        os.dup2(file.fileno(), 2)
    try:
        engine = load_engine(spec, num_context=task.num_context)
        engine.write(task.question(len(task.examples) - 1), max_new_tokens=2)  # a warm-up
        for number in range(len(task.examples)):
            connection.send(read_decision(engine, task, number))
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
    """Ask an engine all questions, in a process that is started for it and ends with it.

    Args:
        timeout_s: for each answer; the first one's includes loading the model.

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
                raise EngineFailedError(_last_words(process.exitcode, Path(folder) / "log")) from None
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
    context = multiprocessing.get_context("spawn")  # a fork would begin with this process's memory
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(sender, spec, task, log), daemon=True)
    process.start()
    sender.close()  # the child's is the only one now: its end is our end of file
    try:
        yield process, receiver
    finally:
        receiver.close()
        process.join(timeout=_EXIT_TIMEOUT_S)  # killed at once, it would leave semaphores for others to clean up
        if process.is_alive():
            process.kill()
            process.join()


def _last_words(exit_code: int | None, log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    last = next((line for line in reversed(lines) if line), "it said nothing")
    died = f"killed by {signal.Signals(-exit_code).name}" if exit_code and exit_code < 0 else f"exit {exit_code}"
    return f"{died}: {last[:300]}"
