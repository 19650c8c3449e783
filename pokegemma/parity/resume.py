"""What engines have answered, kept until the comparison is whole: after an interruption they are not asked again.

As with the steps of the pipeline, a result counts as long as nothing that it depends on has changed: the engine's
files, what it was asked (samples, pictures, the reference's answers), code, packages, and the device.
"""

import json
import logging
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from pokegemma.engines.questions import shown
from pokegemma.errors import PokegemmaError
from pokegemma.fingerprints import FileHashes, content_hash, hash_folder, hash_of, hash_program
from pokegemma.gemma.loading import default_device
from pokegemma.outputs import atomic_file
from pokegemma.parity.worker import EngineSpec, Measured, Reading, Task

logger = logging.getLogger(__name__)

_WORKER = Path(__file__).with_name("worker.py")
"""All that a process with an engine runs; what judges and reports afterwards may change."""

_FACTS = ("peak_memory_bytes", "peak_gpu_memory_bytes", "engine", "weights")
_ARRAYS = {"log_probabilities": np.float32, "likeliest": np.int64, "buttons": np.float32}


class FinishedEngines:
    """Results of engines as files of a folder, one an engine: what it depends on, and its readings."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._hashes = FileHashes()

    @classmethod
    def beside(cls, output_dir: Path) -> "FinishedEngines":
        """Keep them in a hidden folder beside the output, which has its name only when it is whole."""
        output_dir = output_dir.absolute()
        return cls(output_dir.with_name(f".{output_dir.name}.finished"))

    def take_or_keep(self, spec: EngineSpec, task: Task, ask: Callable[[], Measured]) -> Measured:
        """Return what the engine has answered to the same, or else ask it and keep its answers."""
        depends_on = self._dependencies(spec, task)
        if depends_on is None:
            return ask()
        file = self.folder / f"{_place(spec)}.json"
        if file.is_file():
            measured = _read(file, depends_on, name=spec.name)
            if measured is not None:
                return measured
        measured = ask()
        if self._dependencies(spec, task) == depends_on:  # else it may have read either
            _write(file, measured, depends_on)
        return measured

    def _dependencies(self, spec: EngineSpec, task: Task) -> dict[str, str] | None:
        """Return None where something is not there or cannot be read: the engine says what that means to it."""
        try:
            return dependencies(spec, task, self._hashes)
        except (PokegemmaError, metadata.PackageNotFoundError):
            return None

    def remove(self) -> None:
        """Forget all."""
        shutil.rmtree(self.folder, ignore_errors=True)


def dependencies(spec: EngineSpec, task: Task, hashes: FileHashes) -> dict[str, str]:
    """Return a hash of each thing that an engine's answers depend on, by what a person would call it.

    Raises:
        PokegemmaError: a file of the engine or a picture cannot be read, or a sample has no picture for this layout.
        PackageNotFoundError: llama-cpp-python is not installed.
    """
    pictures = {name for example in task.examples for name in shown(example, task.layout)[1]}
    samples = [shown(example, task.layout)[0] for example in task.examples]
    if spec.kind == "llama.cpp":
        files = hash_of([hashes.of(file) for file in spec.files])
        # Its version does not tell whether it was compiled for a GPU; RECORD has the SHA-256 of its libraries.
        build = metadata.distribution("llama-cpp-python").read_text("RECORD")
    else:
        files, build = content_hash(hash_folder(spec.path, hashes)), None
    questions = [task.layout, task.size_px, task.prefix, task.branches, task.max_new_tokens, task.num_context]
    return {
        "its files": files,
        "samples": hash_of(samples),
        "pictures": hash_of({name: hashes.of(task.dataset_folder / name) for name in sorted(pictures)}),
        "the reference's answers": hash_of(task.answers),
        "options": hash_of(questions),
        **hash_program(_WORKER, hashes),
        "device": hash_of([platform.machine(), str(spec.device or default_device()), build]),
    }


def _place(spec: EngineSpec) -> str:
    """Return a file name for an engine. What it is called depends on what else is compared, where it lies does not."""
    paths = [str(path.absolute()) for path in (spec.path, spec.mmproj) if path is not None]
    return hash_of([spec.kind, paths, spec.dtype, spec.device, spec.image_attention])[:16]


def _write(file: Path, measured: Measured, depends_on: dict[str, str]) -> None:
    record = {
        "depends_on": depends_on,
        **{name: getattr(measured, name) for name in _FACTS},
        "readings": [
            {field.name: _plain(getattr(reading, field.name)) for field in fields(reading)}
            for reading in measured.readings
        ],
    }
    with atomic_file(file) as temporary, temporary.open("w", encoding="utf-8") as stream:
        json.dump(record, stream)
        stream.flush()
        os.fsync(stream.fileno())  # a power failure must not leave the name without the bytes


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def _read(file: Path, depends_on: dict[str, str], *, name: str) -> Measured | None:
    """Return what was kept; None where what it depends on has changed. Either is said in a line."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        then = record["depends_on"]
        readings = tuple(map(_reading, record["readings"]))
        measured = Measured(readings, **{name: record[name] for name in _FACTS})
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s: asked again, its kept answers in %s are damaged (%s)", name, file, error)
        return None
    if changed := sorted(key for key in {*depends_on, *then} if depends_on.get(key) != then.get(key)):
        logger.info("%s: asked again, %s changed since the interruption", name, ", ".join(changed))
        return None
    logger.info("%s: its %d answers from before the interruption are taken up", name, len(readings))
    return measured


def _reading(record: dict[str, Any]) -> Reading:
    values = {
        name: np.array(value, _ARRAYS[name]) if name in _ARRAYS and value is not None else value
        for name, value in record.items()
    }
    for name in ("tokens", "prompt"):
        values[name] = tuple(values[name])
    return Reading(**values)
