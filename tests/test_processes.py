"""What the other tests trust: a script called in pytest's process says what it would say, and leaves nothing behind."""

import logging
import os
import signal
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from tests.forked_python import ForkedProcess
from tests.processes import call_script, killed_after, run_in_new_process, wait_until, wait_until_ended


def test_a_called_script_logs_to_its_stderr(toy_dataset: Path, tiny_model: Path, tmp_path: Path) -> None:
    flags = ("--dataset_path", toy_dataset, "--model_name_or_path", tiny_model, "--vision_features", tmp_path)
    done = call_script("precompute_features", *flags)
    assert (done.returncode, done.args[0]) == (0, "scripts/precompute_features.py")
    assert str(tmp_path) in done.stderr  # in a line of the log: how many pictures, and where to


@pytest.mark.parametrize(("arguments", "status"), [(("--help",), 0), (("--dataset_path", "missing"), 2)])
def test_a_called_script_leaves_the_process_as_it_was(
    arguments: tuple[str, ...], status: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])  # as under pytest -p no:logging
    before = (root.handlers[:], root.level, dict(os.environ), signal.getsignal(signal.SIGTERM))
    done = call_script("validate_training", *arguments)
    assert (root.handlers[:], root.level, dict(os.environ), signal.getsignal(signal.SIGTERM)) == before
    assert (done.returncode, bool(done.stdout), bool(done.stderr)) == (status, status == 0, status == 2)
    assert capfd.readouterr() == ("", "")


def die_until(marker: Path) -> str:
    if marker.exists():
        return "done"
    marker.touch()
    os._exit(1)


def die() -> None:
    os._exit(1)


def test_a_new_process_that_dies_is_tried_once_more(tmp_path: Path) -> None:
    assert run_in_new_process(die_until, tmp_path / "marker") == "done"
    with pytest.raises(BrokenProcessPool):
        run_in_new_process(die)


SHOW = """
import os, sys
from pathlib import Path
import pokegemma
print(sys.argv, sys.path[0], Path.cwd(), os.environ.get("SHOWN"), __name__, sys.stdin.read(), pokegemma.__name__)
print("an error", file=sys.stderr)
sys.exit(3)
"""


@pytest.mark.parametrize("kind", ["script", "-m", "-c"])
def test_a_forked_python_does_what_python_does(kind: str, forked_python: str, tmp_path: Path) -> None:
    (tmp_path / "show.py").write_text(SHOW)
    words = {"script": ["-u", "show.py", "a b"], "-m": ["-m", "show", "a b"], "-c": ["-c", SHOW, "a b"]}[kind]
    options = {"cwd": tmp_path, "env": {**os.environ, "SHOWN": "\u00e9 \udcff"}, "input": "in\n"}
    ours, expected = (
        subprocess.run([python, *words], **options, capture_output=True, text=True, errors="surrogateescape")
        for python in (forked_python, sys.executable)
    )
    assert (ours.returncode, ours.stdout, ours.stderr) == (3, expected.stdout, "an error\n")


WAIT = "import os, time; open('started', 'w').write(str(os.getpid())); time.sleep(600)"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_forked_python_gets_signals_and_ends_by_them(number: int, forked_python: str, tmp_path: Path) -> None:
    options = {"cwd": tmp_path, "stderr": subprocess.PIPE, "text": True}
    options["preexec_fn"] = lambda: signal.signal(number, signal.SIG_DFL)  # a shell's background job ignores SIGINT
    with killed_after(subprocess.Popen([forked_python, "-c", WAIT], **options)) as process:
        wait_until(lambda: (tmp_path / "started").exists() and (tmp_path / "started").read_text(), process)
        process.send_signal(number)
        errors = process.communicate()[1]
    assert (process.returncode, "KeyboardInterrupt" in errors) == (-number, number == signal.SIGINT)


def test_a_forked_python_ends_with_its_caller(forked_python: str, tmp_path: Path) -> None:
    process = subprocess.Popen([forked_python, "-c", WAIT], cwd=tmp_path)
    wait_until(lambda: (tmp_path / "started").exists() and (tmp_path / "started").read_text(), process)
    process.kill()
    process.wait()
    wait_until_ended([int((tmp_path / "started").read_text())])


def test_a_forked_process_has_the_id_of_its_script(forked_python: str, tmp_path: Path) -> None:
    with (
        open(tmp_path / "log", "wb") as log,
        ForkedProcess(
            [forked_python, "-c", "import os; print(os.getpid(), flush=True); os.abort()"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        pass
    assert process.returncode == -signal.SIGABRT
    assert (tmp_path / "log").read_text().splitlines()[0] == str(process.pid)
