"""Steps as processes: skipped when nothing changed, continued after a kill, never two at once."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pokegemma.errors import CheckFailedError, PokegemmaError
from pokegemma.fingerprints import FileHashes, hash_of
from pokegemma.provenance import PROJECT_ROOT
from pokegemma.release.step_runner import RECORD_FILE, PipelineRecord, Step, lock_folder, run_step
from tests.processes import WAIT_S, is_running, killed_after, wait_until

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
            name=name,
            script=[str(script), str(source), str(target), str(tmp_path / f"{name}.count")],
            flags={"letter": letter},
            inputs={source.name: FileHashes().of(source)},
            outputs=[target],
        )

    return make


def run_all(output: Path, *steps: Callable[[], Step]) -> list[str]:
    """Build each step when it is its turn, and run those that have to run; return their names."""
    record, ran = PipelineRecord.read(output), []
    with lock_folder(output) as lock:
        for build in steps:
            step = build()
            if record.reason_to_run(step):
                run_step(step, record, lock=lock)
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
            lambda: make_step("a", tmp_path / "input", out / "a"),
            lambda: make_step("b", out / "a", out / "b", letter=letter),
            lambda: make_step("c", out / "b", out / "c"),
            lambda: make_step("d", tmp_path / "input", out / "d"),
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


def test_a_hidden_file_is_not_a_change_of_a_result(tmp_path: Path) -> None:
    out, step = tmp_path / "out", Step(name="merge", script=[], outputs=[tmp_path / "out" / "merged"])
    (out / "merged").mkdir(parents=True)
    (out / "merged" / "config.json").write_text("{}")
    before = step.hash_outputs(FileHashes())
    (out / "merged" / ".DS_Store").touch()  # from a file manager
    assert step.hash_outputs(FileHashes()) == before
    (out / "merged" / "config.json").write_text("[]")
    assert step.hash_outputs(FileHashes()) != before


def test_the_reason_names_what_changed(make_step: Callable[..., Step], tmp_path: Path) -> None:
    source, out = tmp_path / "input", tmp_path / "out"
    source.write_text("1")

    def reason(**changes: str) -> str | None:
        return PipelineRecord.read(out).reason_to_run(make_step("a", source, out / "a", **changes))

    assert reason() == "not done yet"
    run_all(out, lambda: make_step("a", source, out / "a"))
    assert reason() is None
    assert reason(letter="y") == "settings changed"
    source.write_text("2")
    assert reason(letter="y") == "input, settings changed"
    (out / "a").unlink()
    source.write_text("1")
    assert reason() == "a is missing"
    moved = make_step("a", source, out / "a")
    assert replace(moved, flags={**moved.flags, "place": tmp_path}).dependencies() == moved.dependencies()


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
    step = Step(name="merge", script=[str(tmp_path / "fail.py")])
    with pytest.raises(PokegemmaError, match=f"^merge failed: {message}") as caught:
        run_all(tmp_path / "out", lambda: step)
    assert type(caught.value) is kind
    assert PipelineRecord.read(tmp_path / "out").reason_to_run(step) == "not done yet"


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
        script = [str(tmp_path / "measure.py"), what, str(target)]
        return Step(name="parity", script=script, outputs=[target], measurement=target)

    with pytest.raises(CheckFailedError, match=r"^parity failed: exit status 1"):
        run_all(tmp_path / "out", lambda: step("crash"))
    assert run_all(tmp_path / "out", lambda: step("unlike")) == ["parity"]  # its exit status 1 is for the gates
    with pytest.raises(CheckFailedError, match=r"^parity failed: exit status 1"):
        run_all(tmp_path / "out", lambda: step("crash"))
    assert target.read_text() == "unlike"  # the earlier measurement is kept
    assert PipelineRecord.read(tmp_path / "out").reason_to_run(step("unlike")) == "not done yet"


SLEEPER = """
import pathlib, sys, time
target = pathlib.Path(sys.argv[1])
(target.parent / ".b.1234.part").mkdir(exist_ok=True)
if not (target.parent / "awake").exists():
    (target.parent / "started").touch()
    time.sleep(600)
target.write_text("done")
"""
RUNNER = """
import sys
from pathlib import Path
from pokegemma import cli
from pokegemma.release.step_runner import PipelineRecord, Step, lock_folder, run_step
out, folder = Path(sys.argv[1]), Path(sys.argv[2])
steps = [
    Step(name=name, script=list(map(str, script)), outputs=[out / name])
    for name, script in (
        ("a", [folder / "append.py", folder / "input", out / "a", folder / "a.count", "--letter", "x"]),
        ("b", [folder / "sleep.py", out / "b"]),
    )
]
def main():
    record = PipelineRecord.read(out)
    with lock_folder(out) as lock:
        for step in steps:
            if record.reason_to_run(step):
                run_step(step, record, lock=lock)
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
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's "&" ignores it
            )
            return stack.enter_context(killed_after(process))

        yield run


def wait_for_second_step(process: subprocess.Popen[str], out: Path) -> int:
    """Return its process, from the lock, once it sleeps."""
    wait_until((out / "started").exists, process)
    lock = out / ".pipeline.lock"
    wait_until(lambda: lock.read_text() not in ("", str(process.pid)), process)
    return int(lock.read_text())


def test_a_killed_pipeline_continues_with_the_step_that_was_killed(
    start: Callable[[], subprocess.Popen[str]], tmp_path: Path
) -> None:
    out, first = tmp_path / "out", start()
    wait_for_second_step(first, out)
    os.killpg(first.pid, signal.SIGKILL)  # as when the machine dies
    assert first.communicate()[0] == "ran a\n"
    assert (out / ".b.1234.part").is_dir()
    (out / "awake").touch()
    second = start()
    stdout, stderr = second.communicate(timeout=WAIT_S)
    assert (second.returncode, stdout) == (0, "ran b\n"), stderr
    assert (tmp_path / "a.count").read_text() == "1"
    assert (out / "b").read_text() == "done"


def test_temporary_files_of_a_killed_step_are_removed(
    start: Callable[[], subprocess.Popen[str]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / RECORD_FILE).write_text('{"steps": {}, "file_hashes": {}}')
    (out / ".b.9999.part").mkdir()
    (out / ".b.9999.part" / "model.safetensors").touch()
    (out / "awake").touch()
    assert start().communicate(timeout=WAIT_S)[0] == "ran a\nran b\n"
    assert not (out / ".b.9999.part").exists()


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
        assert f"(process {child})" in stderr
    finally:
        os.kill(child, signal.SIGKILL)
    first.communicate()


def test_a_folder_with_something_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(PokegemmaError, match=f"^{tmp_path} contains files"):
        PipelineRecord.read(tmp_path)
    (tmp_path / RECORD_FILE).write_text('{"steps": ')
    with pytest.raises(PokegemmaError, match=r"pipeline\.json is damaged .*; choose another folder$"):
        PipelineRecord.read(tmp_path)


def test_a_folder_that_cannot_be_written_to_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(PokegemmaError, match=r"^--output_dir .*file/out is not writable: "),
        lock_folder(tmp_path / "file" / "out"),
    ):
        pass


def test_hashes_are_kept_until_a_file_changes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("one")
    hashes = FileHashes()
    first = hashes.of(path)
    kept = FileHashes(json.loads(json.dumps(hashes.known)))
    kept.known[str(path)][3] = "from the cache"
    assert kept.of(path) == "from the cache"
    path.write_text("two, longer")
    assert kept.of(path) not in (first, "from the cache")
    assert hash_of({"a": 1, "b": 2}) == hash_of({"b": 2, "a": 1})
