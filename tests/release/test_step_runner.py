"""Steps as processes: skipped when nothing changed, continued after a kill, never two at once."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from pokegemma.errors import CheckFailedError, PokegemmaError
from pokegemma.fingerprints import FileHashes
from pokegemma.provenance import PROJECT_ROOT
from pokegemma.release import step_runner
from pokegemma.release.step_runner import RECORD_FILE, Step, StepRunner, hash_contents, lock_folder
from tests.processes import WAIT_S, is_running, killed_after, take_sigint, wait_until

COUNT = """
import sys, pathlib
source, target, count = map(pathlib.Path, sys.argv[1:4])
count.write_text(str(int(count.read_text() or 0) + 1) if count.exists() else "1")
print("counting", source.name, flush=True)
target.write_text(source.read_text() + sys.argv[5])
"""


@pytest.fixture
def make_step(tmp_path: Path) -> Callable[..., Step]:
    """Return a function that makes a step which appends a letter to a file, and counts how often it ran."""
    script = tmp_path / "append.py"
    script.write_text(COUNT)

    def make(name: str, source: Path, target: Path, *, letter: str = "x") -> Step:
        return Step(
            name,
            f"{script} {source} {target} {tmp_path / name}.count",
            output=target,
            settings={"letter": letter},
            inputs={source.name: source},
        )

    return make


def run_all(output: Path, *steps: Step) -> list[str]:
    """Run the steps that have to run; return their names."""
    ran = []
    with lock_folder(output) as runner:
        for step in steps:
            if runner.reason_to_run(step):
                runner.run(step)
                ran.append(step.name)
    return ran


@pytest.fixture
def chain(tmp_path: Path, make_step: Callable[..., Step]) -> Callable[..., list[str]]:
    """Return a function that runs a -> b -> c and, off the same input, d; it returns which ran."""
    (tmp_path / "input").write_text("1")
    out = tmp_path / "out"

    def run(*, letter: str = "x") -> list[str]:
        return run_all(
            out,
            make_step("a", tmp_path / "input", out / "a"),
            make_step("b", out / "a", out / "b", letter=letter),
            make_step("c", out / "b", out / "c"),
            make_step("d", tmp_path / "input", out / "d"),
        )

    return run


def test_unchanged_steps_are_skipped(chain: Callable[..., list[str]], tmp_path: Path) -> None:
    assert chain() == ["a", "b", "c", "d"]
    assert (tmp_path / "out" / "c").read_text() == "1xxx"
    assert chain() == []
    assert {path.read_text() for path in tmp_path.glob("*.count")} == {"1"}
    (tmp_path / "input").touch()  # another time, the same content
    assert chain() == []


def test_a_change_repeats_exactly_what_depends_on_it(chain: Callable[..., list[str]], tmp_path: Path) -> None:
    chain()
    assert chain(letter="y") == ["b", "c"]
    (tmp_path / "input").write_text("2")
    assert chain(letter="y") == ["a", "b", "c", "d"]
    assert (tmp_path / "out" / "c").read_text() == "2xyx"


def test_a_missing_or_changed_result_is_made_again(chain: Callable[..., list[str]], tmp_path: Path) -> None:
    chain()
    (tmp_path / "out" / "b").unlink()
    assert chain() == ["b"]  # it comes out the same, so that c stays
    (tmp_path / "out" / "c").write_text("1xxX")
    assert chain() == ["c"]
    assert (tmp_path / "out" / "c").read_text() == "1xxx"
    assert chain() == []


def test_a_hidden_file_is_not_a_change_of_a_result(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    before = hash_contents(tmp_path, FileHashes())
    (tmp_path / ".DS_Store").touch()  # from a file manager
    assert hash_contents(tmp_path, FileHashes()) == before
    (tmp_path / "config.json").write_text("[]")
    assert hash_contents(tmp_path, FileHashes()) != before


def test_the_reason_names_what_changed(make_step: Callable[..., Step], tmp_path: Path) -> None:
    source, out = tmp_path / "input", tmp_path / "out"
    source.write_text("1")

    def reason(**changes: str) -> str | None:
        return StepRunner(out).reason_to_run(make_step("a", source, out / "a", **changes))

    assert reason() == "not done yet"
    run_all(out, make_step("a", source, out / "a"))
    assert reason() is None
    assert reason(letter="y") == "settings changed"
    source.write_text("2")
    assert reason(letter="y") == "input, settings changed"
    (out / "a").unlink()
    source.write_text("1")
    assert reason() == "a is missing"
    step = make_step("a", source, out / "a")
    moved = replace(step, paths={"place": tmp_path})
    assert moved.dependencies(FileHashes()) == step.dependencies(FileHashes())


def test_output_goes_to_a_log_and_to_stderr(
    chain: Callable[..., list[str]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    chain()
    assert (tmp_path / "out" / "logs" / "b.log").read_text() == "counting a\n"
    out, err = capfd.readouterr()
    assert (out, err.count("counting")) == ("", 4)


@pytest.mark.parametrize(
    ("code", "kind", "message"),
    [
        ("import sys; sys.stderr.write('error: no such folder\\n'); sys.exit(2)", PokegemmaError, "no such folder"),
        ("import sys; sys.stderr.write('error: too far\\n'); sys.exit(1)", CheckFailedError, "too far"),
        ("import os; os.kill(os.getpid(), 9)", CheckFailedError, r"killed by signal 9 \(out of memory\?\)"),
        ("import sys; sys.exit(7)", CheckFailedError, "exit status 7"),
    ],
)
def test_a_step_that_fails_is_named_with_its_error(
    code: str, kind: type[PokegemmaError], message: str, tmp_path: Path
) -> None:
    (tmp_path / "fail.py").write_text(code)
    step = Step("merge", str(tmp_path / "fail.py"), output=tmp_path / "out" / "merged")
    with pytest.raises(PokegemmaError, match=f"^merge failed: {message}") as caught:
        run_all(tmp_path / "out", step)
    assert type(caught.value) is kind
    assert StepRunner(tmp_path / "out").reason_to_run(step) == "not done yet"


MEASURE = """
import pathlib, sys
what, target = sys.argv[1], pathlib.Path(sys.argv[2])
if what == "crash":
    raise ZeroDivisionError  # exit status 1, like a check that fails
target.with_name("new").write_text(what)
target.with_name("new").replace(target)
sys.exit(what == "unlike")
"""


def test_a_crash_is_not_taken_for_a_measurement_that_an_earlier_run_left(tmp_path: Path) -> None:
    (tmp_path / "measure.py").write_text(MEASURE)
    target = tmp_path / "out" / "parity.json"

    def step(what: str) -> Step:
        return Step("parity", f"{tmp_path}/measure.py {what} {target}", output=target, is_check=True)

    with pytest.raises(CheckFailedError, match=r"^parity failed: exit status 1"):
        run_all(tmp_path / "out", step("crash"))
    assert run_all(tmp_path / "out", step("unlike")) == ["parity"]  # its exit status 1 is for the gates
    with pytest.raises(CheckFailedError, match=r"^parity failed: exit status 1"):
        run_all(tmp_path / "out", step("crash"))
    assert target.read_text() == "unlike"  # the earlier measurement is kept
    assert StepRunner(tmp_path / "out").reason_to_run(step("crash")) == "settings changed"


SLEEPER = """
import os, pathlib, sys, time
target = pathlib.Path(sys.argv[1])
if not (target.parent / "awake").exists():
    target.write_text("half")
    (target.parent / "new").write_text(str(os.getpid()))
    (target.parent / "new").replace(target.parent / "started")
    time.sleep(600)
target.write_text("done")
"""
RUNNER = """
import sys
from pathlib import Path
from pokegemma import cli
from pokegemma.release.step_runner import Step, lock_folder
out, folder = Path(sys.argv[1]), Path(sys.argv[2])
steps = [
    Step("a", f"{folder}/append.py {folder}/input {out}/a {folder}/a.count --letter x", output=out / "a"),
    Step("b", f"{folder}/sleep.py {out}/b", output=out / "b"),
]
def main():
    with lock_folder(out) as runner:
        for step in steps:
            if runner.reason_to_run(step):
                runner.run(step)
                print("ran", step.name, flush=True)
cli.run(main)
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Return a function that starts a pipeline of two steps in a group of its own; the second sleeps until told."""
    (tmp_path / "append.py").write_text(COUNT)
    (tmp_path / "sleep.py").write_text(SLEEPER)
    (tmp_path / "input").write_text("1")

    with contextlib.ExitStack() as stack:

        def run() -> subprocess.Popen[str]:
            process = subprocess.Popen(
                [sys.executable, "-c", RUNNER, str(tmp_path / "out"), str(tmp_path)],
                cwd=PROJECT_ROOT,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                preexec_fn=take_sigint,
            )
            return stack.enter_context(killed_after(process))

        yield run


def wait_for_second_step(process: subprocess.Popen[str], out: Path) -> int:
    """Return its process once it sleeps."""
    wait_until((out / "started").exists, process)
    return int((out / "started").read_text())


def test_a_killed_pipeline_continues_with_the_step_that_was_killed(
    start: Callable[[], subprocess.Popen[str]], tmp_path: Path
) -> None:
    out, first = tmp_path / "out", start()
    wait_for_second_step(first, out)
    os.killpg(first.pid, signal.SIGKILL)  # as when the machine dies
    assert first.communicate()[0] == "ran a\n"
    assert (out / "b").read_text() == "half"
    (out / "awake").touch()
    second = start()
    stdout, stderr = second.communicate(timeout=WAIT_S)
    assert (second.returncode, stdout) == (0, "ran b\n"), stderr
    assert (tmp_path / "a.count").read_text() == "1"
    assert (out / "b").read_text() == "done"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_step_too(
    number: int, status: int, start: Callable[[], subprocess.Popen[str]], tmp_path: Path
) -> None:
    out, process = tmp_path / "out", start()
    child = wait_for_second_step(process, out)
    assert is_running(child)
    process.send_signal(number)
    process.communicate(timeout=WAIT_S)
    assert process.returncode == status
    assert not is_running(child)


def test_a_step_that_ignores_the_signal_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import os, signal, time; signal.signal(15, signal.SIG_IGN); print(os.getpid(), flush=True); time.sleep(600)"
    pids = []

    def interrupt(piece: bytes) -> None:
        pids.append(int(piece))
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stderr", SimpleNamespace(buffer=SimpleNamespace(write=interrupt)))
    monkeypatch.setattr(step_runner, "_STOP_TIMEOUT_S", 0.2)
    with pytest.raises(KeyboardInterrupt), open(tmp_path / "lock", "w") as lock:
        step_runner._run_script([sys.executable, "-c", code], tmp_path / "log", lock.fileno())
    assert not is_running(pids[0])


def test_a_step_that_outlives_its_pipeline_keeps_others_out(
    start: Callable[[], subprocess.Popen[str]], tmp_path: Path
) -> None:
    out, first = tmp_path / "out", start()
    child = wait_for_second_step(first, out)
    first.kill()  # the pipeline alone
    first.wait()
    try:
        second = start()
        stderr = second.communicate(timeout=WAIT_S)[1]
        assert second.returncode == 2
        assert str(out) in stderr
    finally:
        os.kill(child, signal.SIGKILL)
    first.communicate()


def test_a_folder_with_something_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(PokegemmaError, match=f"^{tmp_path} contains files"):
        StepRunner(tmp_path)
    (tmp_path / RECORD_FILE).write_text('{"steps": ')
    with pytest.raises(PokegemmaError, match=r"pipeline\.json is damaged"):
        StepRunner(tmp_path)


def test_a_release_of_an_earlier_version_is_made_again(chain: Callable[..., list[str]], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / RECORD_FILE).write_text('{"steps": {"a": {"depends_on": {}}}, "file_hashes": {}}')
    assert chain() == ["a", "b", "c", "d"]
    assert chain() == []


def test_a_folder_that_cannot_be_written_to_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(PokegemmaError, match=r"^--output_dir .*file/out is not writable: "),
        lock_folder(tmp_path / "file" / "out"),
    ):
        pass
