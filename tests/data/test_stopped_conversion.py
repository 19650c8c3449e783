"""A conversion that is killed: its workers end, and the next one clears up."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from pokegemma.provenance import PROJECT_ROOT
from tests.conftest import conversion_command, turn_record, write_long_sessions, write_session
from tests.data.test_convert import convert
from tests.processes import WAIT_S, wait_until


def processes_in_group(group):
    """Return the live processes of a process group (what has ended and was not waited for is none)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, process_group = stat.read_text().rpartition(")")[2].split()[:3]
        except (OSError, ValueError):
            continue
        if process_group == str(group) and state not in "ZX":
            found.append(int(stat.parent.name))
    return found


@pytest.fixture
def conversion(tmp_path):
    """Start a conversion of two long sessions with two workers; return it once both write frames."""
    write_long_sessions(tmp_path / "runs")
    command = conversion_command(tmp_path)
    process = subprocess.Popen(command, cwd=PROJECT_ROOT, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        wait_until(lambda: len(list(tmp_path.glob(".out.*/new/out/frames/*/0009.png"))) == 2, process)
        yield process
    finally:
        for member in processes_in_group(process.pid):
            os.kill(member, signal.SIGKILL)
        process.wait()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
def test_the_workers_of_a_killed_conversion_end_and_the_next_one_removes_its_folder(conversion, tmp_path):
    assert len(processes_in_group(conversion.pid)) >= 3
    conversion.kill()
    conversion.wait()
    wait_until(lambda: not processes_in_group(conversion.pid))
    assert len(list(tmp_path.glob(".out.*"))) == 1
    write_session(tmp_path / "small" / "session_a", [turn_record(1)])
    convert(tmp_path / "small", tmp_path / "out")
    assert list(tmp_path.glob(".out.*")) == []


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
def test_sigterm_to_the_parent_ends_all_and_leaves_nothing(conversion, tmp_path):
    conversion.terminate()
    assert conversion.wait(timeout=WAIT_S) == 143
    wait_until(lambda: not processes_in_group(conversion.pid))
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
def test_the_folder_of_a_conversion_that_runs_is_left_alone(conversion, tmp_path):
    for member in processes_in_group(conversion.pid):
        os.kill(member, signal.SIGSTOP)  # it must not end before the other one has
    write_session(tmp_path / "small" / "session_a", [turn_record(1)])
    convert(tmp_path / "small", tmp_path / "out")
    assert len(list(tmp_path.glob(".out.*/new/out/frames/*/0009.png"))) == 2
