"""Measure on one NVIDIA GPU what docs/hardware.md estimates, in at most 8 minutes; started by benchmarks/on_gpu.sh.

    benchmarks/on_gpu.sh

Gemma-3-4B's real shape with random weights, and no network: steps of training next to stock TRL, peak memory next to
the estimate, the search for a batch size, decisions with their floor, and checks that need a GPU. Each part has a share
of the time and processes of its own. A part that fails loses nothing that was measured; the exit status is then 1.
"""

import atexit
import functools
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

if __name__ == "__main__":  # a script has only its own folder on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu_parts.part_process import PartResult, run_part
from benchmarks.gpu_parts.plan import LIMIT_S, PARTS, REHEARSAL_LIMIT_S, RESERVE_S, Part, Run
from pokegemma import cli
from pokegemma.environment import detect_hardware
from pokegemma.errors import CheckFailedError, PokegemmaError
from pokegemma.options import option
from pokegemma.provenance import git_commit, package_versions, write_record

logger = logging.getLogger("on_gpu")


@dataclass(frozen=True)
class GpuOptions:
    """What is measured, and where the result goes."""

    output: str = option("benchmarks/on_gpu.json", "JSON file to write")
    overwrite: bool = option(False, "replace the output")
    rehearse: bool = option(False, "run the same code with tiny shapes on the CPU; its figures mean nothing")
    parts: list[str] = option(
        [part.name for part in PARTS], "only these parts, and those that they need", choices=[p.name for p in PARTS]
    )
    wheels: str | None = option(None, "folder with wheels of missing packages, for on_gpu.sh")
    commit: str | None = option(None, "commit of this code; default: that of the git checkout")


def main() -> None:
    (options,) = cli.parse_options(GpuOptions, description=__doc__)
    if site := os.environ.get("ON_GPU_SITE"):
        atexit.register(shutil.rmtree, site, ignore_errors=True)
    began = time.monotonic() - (time.time() - float(os.environ.get("ON_GPU_BEGAN", time.time())))
    ends = began + (REHEARSAL_LIMIT_S if options.rehearse else LIMIT_S) - RESERVE_S
    parts = with_needed(options.parts)
    report = Report(options, parts)
    with tempfile.TemporaryDirectory(prefix="pokegemma_gpu_", ignore_cleanup_errors=True) as temporary:
        run = Run(Path(temporary), options.rehearse)
        for number, part in enumerate(parts):
            # What a part leaves of its time is shared by those after it, and what it lacks it cannot take from them.
            share = part.share_s / sum(later.share_s for later in parts[number:])
            limit_s = max(0.0, share * (ends - time.monotonic()))
            report.save(part, run_part(part, run, limit_s=limit_s, on_row=functools.partial(report.add_rows, part)))
            report.print_end(part)
    report.require_success()


def with_needed(names: Sequence[str]) -> list[Part]:
    """Return the parts of these names and those whose units they need, in the order of `PARTS`."""
    needed = {unit for part in PARTS if part.name in names for unit in part.needs}
    return [part for part in PARTS if part.name in names or needed.intersection(part.units)]


class Report:
    """The result of a run, in a file that is whole at any time."""

    def __init__(self, options: GpuOptions, parts: Sequence[Part]) -> None:
        """Check the options, and print what this machine has.

        Raises:
            PokegemmaError: the output exists, there is no GPU, or the commit is not known.
        """
        self._options, self._output, self._hardware = options, Path(options.output), detect_hardware()
        self._commit = options.commit or git_commit()
        self._results = {
            part.name: PartResult("skipped", "not reached" if part in parts else "not chosen") for part in PARTS
        }
        if self._output.exists() and not options.overwrite:
            raise PokegemmaError(f"{self._output} exists; choose another --output or pass --overwrite")
        if self._commit is None:
            raise PokegemmaError("this is not a git checkout: pass --commit, so that the figures name their code")
        if not options.rehearse and not self._hardware.usable_gpus:
            found = self._hardware.describe()
            raise PokegemmaError(f"no NVIDIA GPU that torch can use ({found}); --rehearse needs none")
        versions = ", ".join(f"{name} {version}" for name, version in package_versions().items())
        logger.info("%s\n%s", self._hardware.describe(), versions)

    def save(self, part: Part, result: PartResult) -> None:
        """Write the file with what a part has measured so far."""
        self._results[part.name] = result
        write_record(
            self._output,
            stage="on_gpu",
            options=asdict(self._options),
            rehearsal=self._options.rehearse,
            commit=self._commit,
            hardware=asdict(self._hardware),
            parts={name: asdict(one) for name, one in self._results.items()},
        )

    def add_rows(self, part: Part, result: PartResult) -> None:
        """Write the file, and log the rows that are new."""
        num_known = len(self._results[part.name].rows)
        self.save(part, result)
        for row in result.rows[num_known:]:
            outcome = next((f"{how}: {row[how]}" for how in ("failed", "skipped") if how in row), "measured")
            logger.info("%s: %s: %s", part.name, row["unit"], outcome)

    def print_end(self, part: Part) -> None:
        """Print how a part ended."""
        result = self._results[part.name]
        reason = f" ({result.reason})" if result.reason else ""
        print(f"{part.name}: {result.status}{reason}, {result.seconds:.0f} of {result.limit_s:.0f} s", flush=True)

    def require_success(self) -> None:
        """Print where the result is.

        Raises:
            CheckFailedError: a part failed.
        """
        print(f"results in {self._output}")
        if failed := [name for name, result in self._results.items() if result.status == "failed"]:
            raise CheckFailedError(
                f"failed: {', '.join(failed)}; {self._output} has the errors, and all that was measured"
            )


if __name__ == "__main__":
    cli.run(main)
