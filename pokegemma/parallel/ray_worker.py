"""The work of a Ray worker: check its machine, then apply a function to items."""

import functools
import hashlib
import importlib.metadata
import pickle
import socket
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pokegemma.errors import PokegemmaError


@dataclass(frozen=True)
class Job:
    """What a worker does: `function(item, state)`, where `state` is what `initialize()` made once in each worker."""

    function: Callable[[Any, Any], Any]
    initialize: Callable[[], Any] | None
    folders: dict[Path, frozenset[str]]
    versions: dict[str, str]

    def check_machine(self) -> None:
        """Check that this machine has the same code and sees the same folders as the one that made the job.

        Raises:
            PokegemmaError: it does not.
        """
        for name, version in code_versions().items():
            if version != self.versions[name]:
                raise PokegemmaError(
                    f"Ray worker on {socket.gethostname()}: {name} is {version} there and {self.versions[name]} here; "
                    "install the same version on all machines, or the results differ"
                )
        for folder, names in self.folders.items():
            if not names <= list_names(folder):
                raise PokegemmaError(
                    f"Ray worker on {socket.gethostname()} does not see the files of {folder}; put input and output "
                    "on storage that all machines share, under the same paths"
                )


@dataclass(frozen=True)
class WorkerFailure:
    """An error as the result of an item: an error that was raised Ray would wrap, and try the item again."""

    error: PokegemmaError | OSError


class RayWorker:
    """A process of Ray that does a `Job`, item by item."""

    def __init__(self, job: Job) -> None:
        self.job, self.state, self.failure = job, None, None
        try:
            job.check_machine()
            self.state = job.initialize() if job.initialize else None
        except (PokegemmaError, OSError) as error:
            self.failure = WorkerFailure(error)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        result: Any = self.failure
        if result is None:
            try:
                result = self.job.function(pickle.loads(row["item"]), self.state)
            except (PokegemmaError, OSError) as error:
                result = WorkerFailure(error)
        return {"index": row["index"], "result": pickle.dumps(result)}


def list_names(folder: Path) -> frozenset[str]:
    """Return the names in a folder; none if it cannot be read."""
    try:
        return frozenset(path.name for path in folder.iterdir())
    except OSError:
        return frozenset()


@functools.cache
def code_versions() -> dict[str, str]:
    """Return the versions of what the bytes of a result depend on; torch is not loaded for it."""
    package, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    libraries = {name: importlib.metadata.version(name) for name in ("pillow", "numpy", "torch", "transformers")}
    return {"pokegemma": digest.hexdigest()[:12], **libraries, "zlib": zlib.ZLIB_RUNTIME_VERSION}
