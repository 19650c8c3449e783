"""Keep the readings of finished engines until a comparison is complete, so that an interrupted one continues."""

import json
import logging
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from pokegemma.engines.questions import shown
from pokegemma.errors import PokegemmaError
from pokegemma.fingerprints import FileHashes, hash_folder, hash_of
from pokegemma.gemma.loading import default_device
from pokegemma.outputs import atomic_file
from pokegemma.parity.engine_spec import EngineSpec
from pokegemma.parity.task import Measured, Reading, Task
from pokegemma.provenance import package_versions

logger = logging.getLogger(__name__)

_ARRAY_TYPES = {"log_probabilities": np.float32, "likeliest": np.int64, "buttons": np.float32}


class FinishedEngines:
    """A folder with one file for each finished engine, named after the hash of all that its readings depend on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._hashes = FileHashes()

    @classmethod
    def next_to(cls, output_dir: Path) -> "FinishedEngines":
        """Use a hidden folder next to the output, which itself exists only when it is complete."""
        output_dir = output_dir.absolute()
        return cls(output_dir.with_name(f".{output_dir.name}.finished"))

    def reuse_or_ask(self, spec: EngineSpec, task: Task, ask: Callable[[], Measured]) -> Measured:
        """Return the engine's kept readings if nothing that they depend on has changed; else ask it and keep them."""
        key = self._key(spec, task)
        if key is None:
            return ask()
        file = self.folder / f"{key}.json"
        if file.is_file() and (measured := _read(file)) is not None:
            logger.info("%s: %d answers from before the interruption are reused", spec.name, len(measured.readings))
            return measured
        measured = ask()
        if self._key(spec, task) == key:  # its files are still those that it was started with
            with atomic_file(file) as temporary:
                temporary.write_text(json.dumps(asdict(measured), default=np.ndarray.tolist), encoding="utf-8")
        return measured

    def _key(self, spec: EngineSpec, task: Task) -> str | None:
        """Return None where a file is missing or cannot be read, which the engine itself reports."""
        try:
            return hash_of(_dependencies(spec, task, self._hashes))
        except PokegemmaError:
            return None

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _dependencies(spec: EngineSpec, task: Task, hashes: FileHashes) -> list[Any]:
    texts, pictures = zip(*(shown(example, task.layout) for example in task.examples), strict=True)
    if spec.kind == "llama.cpp":
        files: Any = [hashes.of(file) for file in spec.files]
    else:
        files = hash_folder(spec.path, hashes)
    return [
        [spec.kind, str(spec.path.absolute()), spec.dtype, str(spec.device or default_device()), spec.image_attention],
        files,
        texts,
        {name: hashes.of(task.dataset_folder / name) for names in pictures for name in names},
        [task.layout, task.size_px, task.prefix, task.branches, task.max_new_tokens, task.num_context, task.answers],
        [package_versions(), platform.machine(), _hash_llama_cpp_files() if spec.kind == "llama.cpp" else None],
    ]


def _hash_llama_cpp_files() -> str | None:
    """Hash llama-cpp-python's list of its files: the version does not show whether it was compiled for a GPU."""
    try:
        return hash_of(metadata.distribution("llama-cpp-python").read_text("RECORD"))
    except metadata.PackageNotFoundError:
        return None


def _read(file: Path) -> Measured | None:
    """Return the readings in a file, None where it is damaged, as by a power failure."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        readings = tuple(_read_reading(one) for one in record.pop("readings"))
        return Measured(readings, **record)
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s is damaged (%s), so the engine is asked again", file, error)
        return None


def _read_reading(record: dict[str, Any]) -> Reading:
    values = {field.name: record[field.name] for field in fields(Reading)}
    for name, dtype in _ARRAY_TYPES.items():
        values[name] = None if values[name] is None else np.array(values[name], dtype)
    for name in ("tokens", "prompt"):
        values[name] = tuple(values[name])
    return Reading(**values)
