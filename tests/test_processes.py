"""What the other tests trust: a script called in pytest's process says what it would say, and leaves nothing behind."""

import logging
import os
import signal
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from tests.processes import call_script, run_in_new_process


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
