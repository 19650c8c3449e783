"""The benchmark of what a user waits for: its table, its busy loops, what it refuses."""

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


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [path.name for path in sorted((PROJECT_ROOT / "benchmarks").glob("*.py")) if "__main__" in path.read_text()]
)
def test_a_benchmark_starts_by_its_file(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(PROJECT_ROOT / "benchmarks" / name), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert name in done.stdout
