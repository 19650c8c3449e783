"""Time what a user waits for, in a checkout of an earlier commit and in this one, by turns in one run.

    python benchmarks/startup.py --base ../earlier_checkout --only demonstration,busy

demonstration: `./train_gemma3.sh` without settings, wall and CPU time of each step. busy: training next to a busy loop
for each core. quick_tests, tests: the suite without and with its slow tests. Both checkouts use this Python and its
packages. Without --base only this checkout is measured. The machine should do nothing else.
"""

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from pokegemma.cli import parse_options, run
from pokegemma.errors import PokegemmaError, check_ranges
from pokegemma.options import option
from pokegemma.provenance import PROJECT_ROOT
from pokegemma.tables import format_table

NUM_STEPS, NUM_WARMUP_STEPS = 8, 3
"""Training steps of a `busy` measurement, and those at its beginning that do not count."""


@dataclass(frozen=True)
class StartupOptions:
    base: str | None = option(None, "Folder of a checkout of the commit to compare with.")
    only: str = option("demonstration,busy", "What to measure: demonstration, busy, quick_tests, tests.")
    repeats: int = option(1, "Runs of each measurement and checkout; medians are printed.")
    json: bool = option(False, "Print JSON instead of tables.")

    def __post_init__(self) -> None:
        check_ranges(self, "repeats", at_least=1)
        unknown = set(self.only.split(",")) - MEASUREMENTS.keys()
        if unknown:
            raise PokegemmaError(f"--only {self.only}: {sorted(unknown)[0]!r} is not one of {', '.join(MEASUREMENTS)}")
        if self.base is not None and not (Path(self.base) / "train_gemma3.sh").is_file():
            raise PokegemmaError(f"--base {self.base}: not a checkout of this project")


def environ_of(checkout: Path, **variables: str) -> dict[str, str]:
    """Return an environment in which `checkout` runs offline with this Python, without the caller's settings.

    POKEGEMMA_PYTHON tells the launcher that the environment is ready, so it installs nothing.
    """
    settings = re.findall(r"^([A-Z_]+)=", (PROJECT_ROOT / ".env.example").read_text(), re.MULTILINE)
    dropped = {*settings, "HF_TOKEN", "OMP_NUM_THREADS", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    ours = {"POKEGEMMA_PYTHON": sys.executable, "PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1"}
    return {**kept, **ours, "WANDB_MODE": "disabled", **variables}


def cpu_seconds(process: psutil.Process) -> float:
    """Return the CPU time of a process and of its children that have ended."""
    times = process.cpu_times()
    return times.user + times.system + times.children_user + times.children_system


def run_demonstration(checkout: Path, folder: Path) -> dict[str, float]:
    """Run the launcher; return seconds of wall and CPU time for each step and in all, and accuracies in percent."""
    output = folder / "demonstration"
    result: dict[str, float] = {}
    started = time.perf_counter()
    process = subprocess.Popen(
        ["bash", "train_gemma3.sh"],
        cwd=checkout,
        env=environ_of(checkout, OUTPUT_DIR=str(output)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    launcher = psutil.Process(process.pid)
    wall_s, cpu_s, lines = started, 0.0, []
    for line in process.stdout:
        lines.append(line)
        if ended := re.match(r"\[(\d+)/\d+\] took ", line):
            (log,) = (output / "logs").glob(f"{ended[1]}-*.log")
            name = log.stem.partition("-")[2]
            before, wall_s, cpu_s = (wall_s, cpu_s), time.perf_counter(), cpu_seconds(launcher)
            result |= {f"{name}, wall s": wall_s - before[0], f"{name}, CPU s": cpu_s - before[1]}
    if process.wait():
        raise PokegemmaError(f"{checkout}/train_gemma3.sh failed with exit status {process.returncode}: {lines[-3:]}")
    result |= {"in all, wall s": time.perf_counter() - started, "in all, CPU s": cpu_s}
    rows = json.loads((output / "evaluation" / "metrics.json").read_text())["rows"]
    return result | {f"accuracy of {row['name']}, %": 100 * row["accuracy"] for row in rows}


_BUSY_LOOP = """
import os, sys
while os.getppid() == int(sys.argv[1]):
    sum(range(1_000_000))
"""


@contextmanager
def busy_cores() -> Iterator[None]:
    """Run a busy loop for each core; a loop also ends when this process is killed."""
    loops = [subprocess.Popen([sys.executable, "-c", _BUSY_LOOP, str(os.getpid())]) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def call(checkout: Path, script: str, *arguments: object) -> None:
    """Run a script of a checkout.

    Raises:
        PokegemmaError: it failed; the message is the end of what it printed.
    """
    command = [sys.executable, checkout / "scripts" / f"{script}.py", *map(str, arguments)]
    done = subprocess.run(command, cwd=checkout, env=environ_of(checkout), capture_output=True, text=True, check=False)
    if done.returncode:
        raise PokegemmaError(f"{checkout}: {script} failed with exit status {done.returncode}: {done.stderr[-500:]}")


def run_busy(checkout: Path, folder: Path) -> dict[str, float]:
    """Train the demonstration's kind of model free and next to busy loops; return decisions a second and their ratio.

    Sessions, samples and base model are made once, by this checkout, and are the same for both.
    """
    shared = folder.parent / "busy"
    dataset, model = shared / "dataset", shared / "model"
    if not model.exists():
        call(PROJECT_ROOT, "record_toy_game", "--output_dir", shared / "recorded", "--num_sessions", 20)
        call(
            PROJECT_ROOT,
            "convert_eevee_data_v2",
            *("--eevee_data_dir", shared / "recorded" / "runs", "--output_dir", dataset),
        )
        call(PROJECT_ROOT, "make_tiny_model", "--output_dir", model)

    def train(name: str) -> float:
        call(
            checkout,
            "sft_pokemon_gemma3",
            *("--config", PROJECT_ROOT / "training_configs" / "toy.yaml", "--model_name_or_path", model),
            *("--dataset_path", dataset, "--output_dir", folder / name, "--max_steps", NUM_STEPS),
            *("--per_device_train_batch_size", 16, "--logging_steps", 1),
            *("--eval_strategy", "no", "--save_strategy", "no"),
        )
        history = json.loads((folder / name / "trainer_state.json").read_text())["log_history"]
        speeds = [entry["decisions_per_second"] for entry in history if "decisions_per_second" in entry]
        return statistics.median(speeds[NUM_WARMUP_STEPS:])

    free = train("free")
    with busy_cores():
        busy = train("busy")
    return {
        "training on free cores, decisions/s": free,
        "training next to busy loops, decisions/s": busy,
        "times slower next to busy loops": free / busy,
    }


def flags_of_tests(launcher: str) -> list[str]:
    """Return the flags that the text of a run_tests.sh passes to pytest before those of its caller."""
    return re.search(r'-m pytest (.*)"\$@"', launcher)[1].split()


def run_tests(checkout: Path, *arguments: str) -> dict[str, float]:
    """Run pytest as a checkout's run_tests.sh does; return seconds of wall and CPU time."""
    started, before = time.perf_counter(), cpu_seconds(psutil.Process())
    flags = flags_of_tests((checkout / "run_tests.sh").read_text(encoding="utf-8"))
    command = [sys.executable, "-m", "pytest", *flags, "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(
        command, cwd=checkout, env=environ_of(checkout, MPLBACKEND="Agg"), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise PokegemmaError(f"{checkout}: the tests failed: {done.stdout[-500:]}")
    name = "tests without the slow ones" if arguments else "tests"
    cpu_s = cpu_seconds(psutil.Process()) - before
    return {f"{name}, wall s": time.perf_counter() - started, f"{name}, CPU s": cpu_s}


MEASUREMENTS: dict[str, Callable[[Path, Path], dict[str, float]]] = {
    "demonstration": run_demonstration,
    "busy": run_busy,
    "quick_tests": lambda checkout, folder: run_tests(checkout, "-m", "not slow"),
    "tests": lambda checkout, folder: run_tests(checkout),
}
"""Each measures a checkout, may write to a folder that is empty, and returns values by name."""


def commit_of(checkout: Path) -> str:
    command = ["git", "-C", checkout, "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or str(checkout)


def measure(name: str, checkouts: dict[str, Path], *, repeats: int) -> dict[str, dict[str, float]]:
    """Return the medians of one measurement: by row, then by checkout. The checkouts take turns."""
    values: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory(prefix="pokegemma-startup-") as temporary:
        for repeat in range(repeats):
            for label, checkout in checkouts.items():
                folder = Path(temporary) / f"{label}{repeat}"
                folder.mkdir()
                print(f"{name}, {label} ({repeat + 1} of {repeats}) ...", file=sys.stderr, flush=True)
                for row, value in MEASUREMENTS[name](checkout, folder).items():
                    values.setdefault(row, {}).setdefault(label, []).append(value)
    return {row: {label: statistics.median(runs) for label, runs in cells.items()} for row, cells in values.items()}


def table_of(rows: dict[str, dict[str, float]], labels: list[str]) -> str:
    """Return rows as text, with the ratio of the last column to the first."""
    header = ("", *labels, *(["ratio"] if len(labels) > 1 else []))
    cells = [header]
    for row, values in rows.items():
        numbers = [f"{values[label]:.1f}" if label in values else "-" for label in labels]
        ratio = []
        if len(labels) > 1:
            first, last = values.get(labels[0]), values.get(labels[-1])
            ratio = [f"{last / first:.2f}" if first and last is not None else "-"]
        cells.append((row, *numbers, *ratio))
    return format_table(cells)


def main() -> None:
    (options,) = parse_options(StartupOptions, description=__doc__)
    checkouts = {"now": PROJECT_ROOT}
    if options.base is not None:
        checkouts = {"then": Path(options.base).resolve(), **checkouts}
    record: dict[str, Any] = {
        "machine": f"{platform.platform()}, {os.cpu_count()} cores",
        "commits": {label: commit_of(checkout) for label, checkout in checkouts.items()},
        "load_average": [],
        "rows": {},
    }
    for name in options.only.split(","):
        record["load_average"].append(round(os.getloadavg()[0], 1))
        rows = measure(name, checkouts, repeats=options.repeats)
        record["rows"] |= rows
        if not options.json:
            print(f"\n{name}\n{table_of(rows, list(checkouts))}", flush=True)
    if options.json:
        print(json.dumps(record, indent=2))
        return
    commits = ", ".join(f"{label} {commit}" for label, commit in record["commits"].items())
    print(f"\n{record['machine']}; {commits}; load average before each: {record['load_average']}")


if __name__ == "__main__":
    run(main)
