"""Run the project's scripts as steps whose results are kept, so that a run can be continued."""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pokegemma.errors import CheckFailedError
from pokegemma.provenance import PROJECT_ROOT, read_run_record

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScriptRunner:
    """Run scripts with `num_threads` threads each; the output of each goes to a file in `logs`."""

    logs: Path
    num_threads: int

    def run(self, script: str, output: Path, **options: object) -> None:
        """Run scripts/`script`.py unless its `output` is there already.

        Args:
            output: the folder that the script makes, whole or not at all; a training run is continued.
            options: its flags; None leaves one out, True is a flag without a value.

        Raises:
            CheckFailedError: the script failed.
        """
        record = read_run_record(output) if output.exists() else None
        if record is not None and record.get("status", "completed") == "completed":
            return
        name, began = "_".join(output.relative_to(self.logs.parent).parts), time.monotonic()
        logger.info("%s: %s ...", name, script)
        command = [sys.executable, str(PROJECT_ROOT / "scripts" / f"{script}.py"), *_flags(options)]
        if record is not None and any(output.glob("checkpoint-*")):
            command.append("--resume_from_checkpoint")
        elif script == "sft_pokemon_gemma3":
            command.append("--overwrite")
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.num_threads), "TOKENIZERS_PARALLELISM": "false"}
        log = self.logs / f"{name}.log"
        with open(log, "ab") as file:
            status = subprocess.run(command, stdout=file, stderr=file, env=environment, check=False).returncode
        if status != 0:
            raise CheckFailedError(f"scripts/{script}.py ended with status {status}; its output is in {log}")
        logger.info("%s: took %.0f s", name, time.monotonic() - began)


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
