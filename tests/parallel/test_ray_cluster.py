"""Work on a Ray cluster: the same bytes as one machine, mistakes in one line, nothing left behind."""

import functools
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pokegemma.data import corpus
from pokegemma.data.convert import WindowOptions
from pokegemma.data.corpus import OUTPUTS, convert_corpus
from pokegemma.errors import CheckFailedError, PokegemmaError
from pokegemma.parallel import ray_cluster, ray_worker
from pokegemma.parallel.workers import map_items
from pokegemma.provenance import PROJECT_ROOT
from tests.conftest import conversion_command, failed_turn, raw_frame, turn_record, write_long_sessions, write_session
from tests.data.test_convert import folder_hashes
from tests.data.test_stopped_conversion import processes_in_group
from tests.processes import WAIT_S, free_port, is_listening, run_in_new_process, take_sigint, wait_until
from tests.toy_work import (
    assert_done_by_ray,
    count_calls,
    die,
    divide,
    empty_folder,
    fail_at_three,
    fail_to_start,
    note_ray_worker,
    use_state,
)

pytestmark = [
    pytest.mark.slow(30),
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ./init.sh --with ray"),
]


@pytest.fixture(scope="module")
def addresses(tmp_path_factory):
    """Start a Ray of two CPUs as a user does, with `ray start`; return its address and that for Ray clients."""
    port, client_port = free_port(), free_port()
    folder = Path("/tmp") / f"ray-test-{port}"  # a socket's path must be short
    command = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        "--head",
        "--block",
        f"--port={port}",
        f"--ray-client-server-port={client_port}",
        "--num-cpus=2",
        "--include-dashboard=false",
        "--min-worker-port=0",
        "--max-worker-port=0",
        f"--temp-dir={folder}",
    ]
    with open(tmp_path_factory.mktemp("ray") / "log", "w+") as log:
        # Ray gives the server of a client 30 s to start, which a busy machine may exceed.
        environ = os.environ | {
            "PYTHONPATH": str(PROJECT_ROOT),
            "RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S": str(WAIT_S),
            # Without it, a fork of the clients' proxy dies now and then (https://github.com/ray-project/ray/issues/63202).
            "GRPC_ENABLE_FORK_SUPPORT": "0",
        }
        process = subprocess.Popen(command, env=environ, stdout=log, stderr=log, start_new_session=True)
        try:
            log_text = Path(log.name).read_text
            wait_until(lambda: "Ray runtime started" in log_text(), process)
            wait_until(lambda: is_listening(client_port), process)  # `ray start` does not wait for it
            yield f"127.0.0.1:{port}", f"ray://127.0.0.1:{client_port}"
        finally:
            for member in processes_in_group(process.pid):  # SIGTERM would take Ray half a minute
                os.kill(member, signal.SIGKILL)
            process.wait()
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def sessions(tmp_path):
    """Write sessions whole, truncated, empty, without some frames, and copied; return their folder."""
    runs = tmp_path / "runs"
    for number in range(5):
        turns = [
            turn_record(turn, ["up", "a"][turn % 2], timestamp=f"2025-06-2{number}T18:{turn:02d}:00")
            for turn in range(1, 6 + 4 * number)
        ]
        write_session(runs / f"session_{number}", turns, steps=None if number else [1, 2, 5])
    shutil.copytree(runs / "session_3", runs / "session_copy")
    (runs / "session_4" / "sshots" / "step_0007_grid.png").write_bytes(b"broken")
    write_session(runs / "session_empty", [])
    write_session(runs / "session_failed", [failed_turn(1)])
    write_session(runs / "session_raw", [turn_record(1)], enhanced_turns=[raw_frame(1, 77)])
    record = write_session(runs / "session_cut", [turn_record(1)]) / "session_data.json"
    record.write_bytes(record.read_bytes()[:100])
    return runs


def convert(data_dir, output, **options):
    return convert_corpus(data_dir, output, window=WindowOptions(), eval_fraction=0.3, **options)


def convert_by_ray(sessions, output, workers):
    """Convert on two Ray workers, each of which leaves a note; return the report."""
    empty_folder(workers)
    note = lambda work, items, **options: map_items(  # noqa: E731
        functools.partial(note_ray_worker, work=work, folder=workers), items, **options
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "map_items", note)
        return convert(sessions, output, num_workers=2, ray_address="local")


def test_a_cluster_of_two_workers_writes_the_bytes_of_one_process(sessions, tmp_path, capfd):
    report = convert(sessions, tmp_path / "one", num_workers=1)
    workers = tmp_path / "workers"
    assert run_in_new_process(convert_by_ray, sessions, tmp_path / "ray", workers) == report
    assert_done_by_ray(workers, num_workers=2)
    assert report["sessions"]["unreadable"] == 2 and len(report["problems"]) > 2
    hashes = folder_hashes(tmp_path / "one")
    assert len(hashes) > 50 and folder_hashes(tmp_path / "ray") == hashes
    assert capfd.readouterr().out == ""
    assert {path.name for path in (tmp_path / "ray").iterdir()} == set(OUTPUTS)


def check_each_worker_makes_its_state_once_and_results_come_in_order(addresses, tmp_path):
    items = [f"item {number}" for number in range(12)]
    workers, begun = empty_folder(tmp_path / "workers"), empty_folder(tmp_path / "begun")
    work = functools.partial(use_state, folder=begun, num_workers=2)
    work = functools.partial(note_ray_worker, work=work, folder=workers)
    results = list(map_items(work, items, num_workers=2, initialize=count_calls, ray_address=addresses[0], size=len))
    assert_done_by_ray(workers, num_workers=2)
    assert [result[0] for result in results] == items
    processes = {result[1] for result in results}
    assert len(processes) == 2 and os.getpid() not in processes
    for process in processes:
        calls = sorted(result[2] for result in results if result[1] == process)
        assert calls == list(range(1, len(calls) + 1))
    assert all(result[1] == result[3] for result in results)


def test_each_worker_makes_its_state_once_and_results_come_in_order(addresses, tmp_path):
    run_in_new_process(check_each_worker_makes_its_state_once_and_results_come_in_order, addresses, tmp_path)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_processes_of_this_machine_make_their_state_once_too(num_workers, tmp_path):
    work = functools.partial(use_state, folder=tmp_path, num_workers=num_workers)
    results = list(map_items(work, ["a", "b", "c", "d"], num_workers=num_workers, initialize=count_calls))
    assert [result[0] for result in results] == ["a", "b", "c", "d"]
    assert len({result[1] for result in results}) == num_workers
    assert all(result[1] == result[3] for result in results)


def check_an_error_of_a_worker_is_raised_as_it_was(where, initialize, error, message, addresses):
    options = {"num_workers": 1 if where == "here" else 2, "ray_address": addresses[0] if where == "ray" else None}
    with pytest.raises(error, match=f"^{message}$"):
        list(map_items(fail_at_three, range(5), initialize=initialize, **options))


@pytest.mark.parametrize("where", ["here", "processes", "ray"])
@pytest.mark.parametrize(
    ("initialize", "error", "message"),
    [(None, CheckFailedError, "item 3: broken"), (fail_to_start, PokegemmaError, "model not found")],
    ids=["work", "initialize"],
)
def test_an_error_of_a_worker_is_raised_as_it_was(where, initialize, error, message, request):
    addresses = request.getfixturevalue("addresses") if where == "ray" else None
    arguments = (where, initialize, error, message, addresses)
    if where == "ray":
        run_in_new_process(check_an_error_of_a_worker_is_raised_as_it_was, *arguments)
    else:
        check_an_error_of_a_worker_is_raised_as_it_was(*arguments)


def check_a_bug_in_a_worker_shows_its_traceback(addresses):
    with pytest.raises(Exception, match=r"(?s)in divide.*ZeroDivisionError"):
        list(map_items(divide, [1, 0], num_workers=2, ray_address=addresses[0]))


def test_a_bug_in_a_worker_shows_its_traceback(addresses):
    run_in_new_process(check_a_bug_in_a_worker_shows_its_traceback, addresses)


def check_a_worker_that_always_dies_is_one_line(addresses):
    with pytest.raises(PokegemmaError, match=r"^a Ray worker died 3 times ") as error:
        list(map_items(die, [1], num_workers=1, ray_address=addresses[0]))
    assert "\n" not in str(error.value)


def test_a_worker_that_always_dies_is_one_line(addresses):
    run_in_new_process(check_a_worker_that_always_dies_is_one_line, addresses)


def check_no_thread_of_ray_data_outlives_the_connection(addresses):
    """It would call Ray after the shutdown, which starts another Ray or ends this process."""
    alive = lambda: [one for one in threading.enumerate() if one.name.startswith(ray_cluster._EXECUTOR_THREAD)]  # noqa: E731
    counts, join = [], ray_cluster._join_executors
    ray_cluster._join_executors = lambda: (join(), counts.append(len(alive())))  # this process ends with the test
    results = map_items(divide, [1, 2, 4, 5], num_workers=1, ray_address=addresses[0])
    next(results)
    assert len(alive()) == 1
    results.close()
    assert counts == [0]


def test_no_thread_of_ray_data_outlives_the_connection(addresses):
    run_in_new_process(check_no_thread_of_ray_data_outlives_the_connection, addresses)


def check_a_folder_that_a_worker_does_not_see_is_one_line(sessions, tmp_path, addresses):
    with pytest.raises(
        PokegemmaError, match=r"^Ray worker on .* does not see the files of /proc/self/fd/\d+; "
    ) as error:
        descriptor = os.open(sessions, os.O_RDONLY)  # a path that means this folder in this process only
        convert(Path(f"/proc/self/fd/{descriptor}"), tmp_path / "out", num_workers=2, ray_address=addresses[0])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_a_folder_that_a_worker_does_not_see_is_one_line(sessions, tmp_path, addresses):
    run_in_new_process(check_a_folder_that_a_worker_does_not_see_is_one_line, sessions, tmp_path, addresses)


def test_a_worker_with_other_code_is_refused():
    versions = ray_worker.code_versions() | {"pillow": "1.0"}
    with pytest.raises(PokegemmaError, match=r"^Ray worker on \S+: pillow is [\d.]+ there and 1\.0 here; "):
        ray_worker.Job(divide, None, {}, versions).check_machine()


def test_a_ray_client_writes_the_same_bytes(sessions, tmp_path, addresses):
    convert(sessions, tmp_path / "one", num_workers=1)
    command = [
        sys.executable,
        "scripts/convert_eevee_data_v2.py",
        "--eevee_data_dir",
        str(sessions),
        "--output_dir",
        str(tmp_path / "ray"),
        "--eval_fraction",
        "0.3",
        "--ray_address",
        addresses[1],
    ]
    done = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert folder_hashes(tmp_path / "ray") == folder_hashes(tmp_path / "one")


ABORTED = """Initialization failure from server:
Traceback (most recent call last):
  File "ray/util/client/server/proxier.py", line 773, in Datapath
    raise RuntimeError(
RuntimeError: Starting Ray client server failed. See ray_client_server_23000.err for detailed logs.
"""
"""What `ray.init` raises where the server of a client died at its start."""


def test_a_client_whose_server_died_at_its_start_connects_again():
    attempts = []

    def connect():
        attempts.append(1)
        if len(attempts) < 3:
            raise ConnectionAbortedError(ABORTED)

    ray_cluster._connect(connect, "ray://head:10001")
    assert len(attempts) == 3


def test_a_client_whose_server_never_starts_names_the_cause():
    def connect():
        raise ConnectionAbortedError(ABORTED)

    with pytest.raises(
        PokegemmaError, match=r"^--ray_address ray://head:10001: .*ray_client_server_23000\.err"
    ) as error:
        ray_cluster._connect(connect, "ray://head:10001")
    assert "\n" not in str(error.value) and "proxier.py" not in str(error.value)
    assert "GRPC_ENABLE_FORK_SUPPORT=0" in str(error.value)


def check_more_gpus_than_there_are_is_one_line(addresses):
    with pytest.raises(PokegemmaError, match=r"^the Ray cluster has 0 GPUs, a worker needs 1$"):
        list(map_items(divide, [1], num_workers=1, num_gpus=1, ray_address=addresses[0]))


def test_more_gpus_than_there_are_is_one_line(addresses):
    run_in_new_process(check_more_gpus_than_there_are_is_one_line, addresses)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nonsense", "host:port"])
def test_an_address_without_ray_is_one_line(address):
    with pytest.raises(
        PokegemmaError, match=rf'^--ray_address {address}: .*; give "local", "auto", host:port or ray://'
    ):
        list(map_items(divide, [1], num_workers=1, ray_address=address))


def test_without_ray_installed_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(PokegemmaError, match=r"\./init\.sh --with ray, or pip install 'pokegemma\[ray\]'$"):
        list(map_items(divide, [1], num_workers=1, ray_address="local"))


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("kind", ["local", "cluster"])
def test_a_signal_ends_a_conversion_on_ray_and_leaves_nothing(tmp_path, addresses, kind, number, status):
    write_long_sessions(tmp_path / "runs")
    address = "local" if kind == "local" else addresses[0]
    command = conversion_command(tmp_path, "--ray_address", address)
    process = subprocess.Popen(
        command,
        cwd=PROJECT_ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=take_sigint,
    )
    try:
        written = lambda: list(tmp_path.glob(".out.*/new/out/frames/*/0009.png"))  # noqa: E731
        wait_until(lambda: len(written()) == 2, process)
        os.killpg(process.pid, number) if number == signal.SIGINT else process.terminate()
        _, errors = process.communicate(timeout=WAIT_S)
        assert process.returncode == status, errors
        assert "Traceback" not in errors
        wait_until(lambda: not processes_in_group(process.pid))
        time.sleep(1)  # for a worker that would still write
        assert not (tmp_path / "out").exists()
    finally:
        for member in processes_in_group(process.pid):
            os.kill(member, signal.SIGKILL)
