"""The benchmark of what a user waits for: its table, its busy loops, what it refuses."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from benchmarks import startup
from pokegemma.errors import PokegemmaError
from pokegemma.provenance import PROJECT_ROOT


def test_the_table_shows_the_ratio_of_now_to_then() -> None:
    rows = {"train, wall s": {"then": 100.0, "now": 40.0}, "new step, wall s": {"now": 3.0}}
    lines = startup.table_of(rows, ["then", "now"]).splitlines()
    assert [line.split()[-3:] for line in lines[1:]] == [["100.0", "40.0", "0.40"], ["-", "3.0", "-"]]


def test_busy_loops_end_with_the_measurement() -> None:
    before = set(psutil.Process().children())
    with pytest.raises(KeyboardInterrupt), startup.busy_cores():
        loops = set(psutil.Process().children()) - before
        raise KeyboardInterrupt
    assert len(loops) == psutil.cpu_count()
    assert not any(loop.is_running() for loop in loops)


@pytest.mark.parametrize(("option", "value"), [("only", "demonstration,typing"), ("base", "nowhere"), ("repeats", 0)])
def test_an_option_that_cannot_be_measured_is_refused(option: str, value: object) -> None:
    with pytest.raises(PokegemmaError, match=rf"^--{option} {value}: "):
        startup.StartupOptions(**{option: value})


def test_the_callers_settings_do_not_reach_a_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DATASET_PATH", "MAX_STEPS", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    environ = startup.environ_of(Path("/checkout"))
    assert not {"DATASET_PATH", "MAX_STEPS", "OMP_NUM_THREADS"} & environ.keys()
    assert environ["PYTHONPATH"] == "/checkout"


def test_the_tests_of_a_checkout_run_as_its_launcher_runs_them() -> None:
    assert startup.flags_of_tests('set -e\n"$python" -m pytest "$@"\n') == []
    launcher = (PROJECT_ROOT / "run_tests.sh").read_text()
    assert startup.flags_of_tests(launcher) == ["-n", "auto", "--dist", "worksteal"]


BENCHMARKS = [path for path in sorted((PROJECT_ROOT / "benchmarks").glob("*.py")) if "__main__" in path.read_text()]
HELP = """
import io, runpy, sys
from contextlib import redirect_stdout, suppress
from pathlib import Path

start = list(sys.path)
for file in map(Path, sys.argv[1:]):
    for name in [name for name in sys.modules if name.partition(".")[0] in ("benchmarks", "pokegemma")]:
        del sys.modules[name]  # of the one before
    sys.argv, sys.path[:] = [str(file), "--help"], [str(file.parent), *start[1:]]
    with redirect_stdout(io.StringIO()) as printed, suppress(SystemExit):
        runpy.run_path(str(file), run_name="__main__")
    print(file.name if file.name in printed.getvalue() else f"{file.name}: {printed.getvalue()}")
"""


@pytest.mark.slow(25)
def test_each_benchmark_starts_by_its_file(tmp_path: Path) -> None:
    """All in one process, as if each were its own: torch is imported once."""
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", HELP, *map(str, BENCHMARKS)]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [path.name for path in BENCHMARKS]
