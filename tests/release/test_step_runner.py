"""Steps as processes: left out when nothing changed, resumed after a kill, stopped by a gate, never two at once."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pokegemma.errors import CheckFailedError, PokegemmaError
from pokegemma.fingerprints import FileHashes, hash_of, imported_files
from pokegemma.provenance import PROJECT_ROOT
from pokegemma.release.step_runner import STATE_FILE, Gate, State, Step, check_gates, locked, run_step
from tests.processes import WAIT_S, is_running, killed_after, wait_until

COUNT = """
import sys, pathlib
source, target, count = map(pathlib.Path, sys.argv[1:4])
count.write_text(str(int(count.read_text() or 0) + 1) if count.exists() else "1")
print("counting", source.name, flush=True)
target.write_text(source.read_text() + sys.argv[4])
"""


@pytest.fixture
def make_step(tmp_path: Path) -> Callable[..., Step]:
    """Return a function that makes a step which appends a letter to a file, and counts how often it ran."""
    script = tmp_path / "append.py"
    script.write_text(COUNT)

    def make(name: str, source: Path, target: Path, *, letter: str = "x", after: tuple[str, ...] = ()) -> Step:
        return Step(
            name=name,
            script=str(script),
            paths={},
            settings=[letter],
            command_words=[str(source), str(target), str(tmp_path / f"{name}.count")],
            inputs=lambda hashes: {source.name: hashes.of(source)},
            outputs=[target],
            after=after,
        )

    return make


def run_all(output: Path, *steps: Step) -> list[str]:
    """Run what has to run, as a pipeline does; return the names."""
    state, ran = State.read(output), []
    with locked(output) as lock:
        state.write()
        for step in steps:
            if state.why(step):
                run_step(step, state, lock=lock)
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


def test_what_did_not_change_is_not_done_again(chain: Callable[..., list[str]], tmp_path: Path) -> None:
    assert chain() == ["a", "b", "c", "d"]
    assert (tmp_path / "out" / "c").read_text() == "1xxx"
    assert chain() == []
    assert {path.read_text() for path in tmp_path.glob("*.count")} == {"1"}
    (tmp_path / "input").touch()  # another time, the same content
    assert chain() == []


def test_a_change_redoes_exactly_what_depends_on_it(chain: Callable[..., list[str]], tmp_path: Path) -> None:
    chain()
    assert chain(letter="y") == ["b", "c"]
    (tmp_path / "input").write_text("2")
    assert chain(letter="y") == ["a", "b", "c", "d"]
    assert (tmp_path / "out" / "c").read_text() == "2xyx"


def test_a_result_that_is_gone_or_changed_is_made_again(chain: Callable[..., list[str]], tmp_path: Path) -> None:
    chain()
    (tmp_path / "out" / "b").unlink()
    assert chain() == ["b"]  # it comes out the same, so that c stays
    (tmp_path / "out" / "c").write_text("1xxX")
    assert chain() == ["c"]
    assert (tmp_path / "out" / "c").read_text() == "1xxx"


def test_changed_code_redoes_a_step(chain: Callable[..., list[str]], tmp_path: Path) -> None:
    chain()
    (tmp_path / "append.py").write_text(COUNT + "\n# another comment\n")
    assert chain() == ["a", "b", "c", "d"]


def test_the_reason_says_what_changed(make_step: Callable[..., Step], tmp_path: Path) -> None:
    (tmp_path / "input").write_text("1")
    step = make_step("a", tmp_path / "input", tmp_path / "out" / "a")
    assert State.read(tmp_path / "out").why(step) == "not done yet"
    run_all(tmp_path / "out", step)
    assert State.read(tmp_path / "out").why(step) is None
    other = make_step("a", tmp_path / "input", tmp_path / "out" / "a", letter="y")
    assert State.read(tmp_path / "out").why(other) == "settings changed"
    (tmp_path / "input").write_text("2")
    assert State.read(tmp_path / "out").why(other) == "input, settings changed"
    (tmp_path / "out" / "a").unlink()
    (tmp_path / "input").write_text("1")
    assert State.read(tmp_path / "out").why(step) == "a is gone"


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
    step = Step(
        name="merge", script=str(tmp_path / "fail.py"), paths={}, settings=[], inputs=lambda hashes: {}, outputs=[]
    )
    with pytest.raises(PokegemmaError, match=f"^merge failed: {message}") as caught:
        run_all(tmp_path / "out", step)
    assert type(caught.value) is kind
    assert State.read(tmp_path / "out").why(step) == "not done yet"


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
        return Step(
            name="parity",
            script=str(tmp_path / "measure.py"),
            paths={},
            settings=[what],
            inputs=lambda hashes: {},
            command_words=[what, str(target)],
            outputs=[target],
            measures=target,
        )

    with pytest.raises(CheckFailedError, match=r"^parity failed: exit status 1"):
        run_all(tmp_path / "out", step("crash"))
    assert run_all(tmp_path / "out", step("unlike")) == ["parity"]  # exit status 1: for the gates to judge
    with pytest.raises(CheckFailedError, match=r"^parity failed: exit status 1"):
        run_all(tmp_path / "out", step("crash"))
    assert target.read_text() == "unlike"
    assert State.read(tmp_path / "out").why(step("unlike")) == "not done yet"


def test_a_gate_names_value_and_limit() -> None:
    gates = [Gate("--min_accuracy", "accuracy", 0.41, 0.6), Gate("--max_x", "x", 1.0, 2.0, at_least=False)]
    with pytest.raises(CheckFailedError) as caught:
        check_gates("evaluate", gates)
    assert str(caught.value) == "the gate of evaluate failed: accuracy 0.41, --min_accuracy 0.6 (at least)"
    check_gates("evaluate", gates[1:])


@pytest.mark.parametrize("value", [None, float("nan")])
def test_what_was_not_measured_passes_no_gate(value: float | None) -> None:
    assert not Gate("--a", "a", value, 0.0).holds
    assert not Gate("--a", "a", value, 1.0, at_least=False).holds


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
from pokegemma.release.step_runner import State, Step, locked, run_step
out, folder = Path(sys.argv[1]), Path(sys.argv[2])
steps = [
    Step(name=name, script=str(folder / script), paths={}, settings=[], command_words=words,
         inputs=lambda hashes: {}, outputs=[out / name])
    for name, script, words in (
        ("a", "append.py", [str(folder / "input"), str(out / "a"), str(folder / "a.count"), "x"]),
        ("b", "sleep.py", [str(out / "b")]),
    )
]
def main():
    state = State.read(out)
    with locked(out) as lock:
        state.write()
        for step in steps:
            if state.why(step):
                run_step(step, state, lock=lock)
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


def test_a_killed_pipeline_goes_on_in_the_step_where_it_was(
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


def test_what_a_killed_step_left_is_removed(start: Callable[[], subprocess.Popen[str]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / STATE_FILE).write_text('{"steps": {}, "file_hashes": {}}')
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
        assert f"still runs (process {child}); wait for it, or end it" in stderr
    finally:
        os.kill(child, signal.SIGKILL)
    first.communicate()


def test_a_folder_with_something_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(PokegemmaError, match="holds something else"):
        State.read(tmp_path)
    (tmp_path / STATE_FILE).write_text('{"steps": ')
    with pytest.raises(PokegemmaError, match="is damaged"):
        State.read(tmp_path)


def test_a_folder_that_cannot_be_written_to_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(PokegemmaError, match=r"^--output_dir .*file/out cannot be written to: "),
        locked(tmp_path / "file" / "out"),
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


def test_a_script_depends_on_what_it_imports_also_within_functions() -> None:
    names = {str(path.relative_to(PROJECT_ROOT)) for path in imported_files("merge_qlora.py")}
    assert {"scripts/merge_qlora.py", "pokegemma/cli.py", "pokegemma/export/merge.py"} <= names
    assert "pokegemma/gemma/loading.py" in names  # imported by what it imports
    assert "pokegemma/release/registry.py" not in names
    assert "pokegemma/evaluation/report.py" not in names
