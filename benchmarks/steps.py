"""Scripts of the project as the steps of a long measurement, which continues where it was stopped."""

import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pokegemma.environment import usable_cores
from pokegemma.errors import PokegemmaError
from pokegemma.outputs import atomic_file
from pokegemma.provenance import PROJECT_ROOT


@dataclass
class Progress:
    """The steps that were done, with their costs; written after each."""

    path: Path
    steps: dict[str, dict[str, float]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "Progress":
        return cls(path, json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {})

    def script(self, step: str, name: str, *, threads: int = 0, **options: Any) -> None:
        """Run a script of the project, unless this step was done; its output goes to stderr.

        Raises:
            PokegemmaError: it failed.
        """
        if step in self.steps:
            return
        words = [sys.executable, str(PROJECT_ROOT / "scripts" / f"{name}.py")]
        for key, value in options.items():
            words += [f"--{key}", *([] if value is True else map(str, value if isinstance(value, list) else [value]))]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads or usable_cores()), "HF_HUB_OFFLINE": "1"}
        began, before = time.monotonic(), _children_cpu_s()
        if subprocess.run(words, stdout=sys.stderr, env=environment, cwd=PROJECT_ROOT, check=False).returncode:
            raise PokegemmaError(f"scripts/{name}.py failed; the same command continues")
        self.steps[step] = {"seconds": time.monotonic() - began, "cpu_s": _children_cpu_s() - before}
        with atomic_file(self.path) as temporary:
            temporary.write_text(json.dumps(self.steps, indent=2), encoding="utf-8")


def _children_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
