"""Scripts of the project as the steps of a long measurement, which continues where it was stopped."""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pokegemma.battles.policy.card import view_pair
from pokegemma.environment import usable_cores
from pokegemma.errors import PokegemmaError
from pokegemma.outputs import atomic_file
from pokegemma.provenance import PROJECT_ROOT, read_run_record
from pokegemma.tables import format_interval, format_percent

_TRAINING = ("sft_battles", "rl_battles")
"""Scripts that exit with 0 after a signal, with a checkpoint; run.json tells whether they came to their end."""


@dataclass
class Progress:
    """The steps that were done, with their commands and costs; written after each."""

    path: Path
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "Progress":
        return cls(path, json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {})

    def script(
        self, step: str, name: str, *, threads: int = 0, resume: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Run a script of the project, unless this step was done; its output goes to stderr.

        Args:
            resume: flags that may be others when the same step is called again.

        Raises:
            PokegemmaError: it failed or was interrupted, or the step was done with other options.
        """
        words = [name, *_flags(options)]
        if step in self.steps:
            if self.steps[step]["words"] != words:
                raise PokegemmaError(f"{self.path}: {step!r} was done with other options; choose another folder")
            return
        command = [sys.executable, str(PROJECT_ROOT / "scripts" / f"{name}.py"), *words[1:], *_flags(resume or {})]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads or usable_cores()), "HF_HUB_OFFLINE": "1"}
        began, before = time.monotonic(), _children_cpu_s()
        if subprocess.run(command, stdout=sys.stderr, env=environment, cwd=PROJECT_ROOT, check=False).returncode:
            raise PokegemmaError(f"scripts/{name}.py failed; the same command continues")
        if name in _TRAINING and (read_run_record(Path(options["output_dir"])) or {}).get("status") != "completed":
            raise PokegemmaError(f"{options['output_dir']}: training was interrupted; the same command continues")
        seconds, cpu_s = time.monotonic() - began, _children_cpu_s() - before
        self.steps[step] = {"words": words, "seconds": seconds, "cpu_s": cpu_s}
        with atomic_file(self.path) as temporary:
            temporary.write_text(json.dumps(self.steps, indent=2), encoding="utf-8")

    def arena(
        self, step: str, folder: Path, *, player: str, opponents: Sequence[str], **options: Any
    ) -> dict[str, dict[str, Any]]:
        """Let a player, NAME=SOURCE, play opponents in an arena; return its battles with each, as it sees them."""
        name = player.partition("=")[0]
        self.script(
            step,
            "battles_arena",
            threads=1,  # a process for each core plays
            output_dir=folder,
            players=[player, *opponents],
            against=[name],
            **options,
        )
        pairs = json.loads((folder / "arena.json").read_text(encoding="utf-8"))["pairs"]
        return {view["name"]: view for view in (view_pair(pair, name) for pair in pairs)}


def format_rate(view: dict[str, Any]) -> str:
    """Return a player's win rate against another one, with its interval."""
    return f"{format_percent(view['win_rate'])} [{format_interval(view['win_rate_interval'])}]"


def _flags(options: dict[str, Any]) -> list[str]:
    words = []
    for key, value in options.items():
        words += [f"--{key}", *([] if value is True else map(str, value if isinstance(value, list) else [value]))]
    return words


def _children_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
