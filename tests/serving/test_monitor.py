"""Each kind of failure has its state; limits are judged over the window."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest

from pokegemma.data.samples import read_samples
from pokegemma.engines.questions import Question, build_questions
from pokegemma.errors import PokegemmaError
from pokegemma.provenance import PROJECT_ROOT
from pokegemma.serving.monitor import Monitor, ServerCheck, find_breaches, summarize_window
from pokegemma.serving.monitor_options import MonitorOptions
from pokegemma.serving.monitor_outputs import CheckLog, Webhook, format_summary, serve_metrics
from pokegemma.serving.processes import ServerProcesses, Usage, gpu_memory_bytes
from tests.processes import WAIT_S, call_script, free_port, killed_after, wait_until
from tests.serving.served import write_colour_dataset

SCRIPT = PROJECT_ROOT / "scripts" / "health_monitor.py"
LIMITS = {"timeout_s": 100, "max_latency_p95_s": 90, "max_consecutive_failures": 2, "window": 4}
"""A valid answer is in time, however busy the machine is."""


def make_options(url: str = "http://server", **options: object) -> MonitorOptions:
    return MonitorOptions(server_url=url, dataset_path="", **options)


def make_check(*breaches: str, state: str = "ok", latency_s: float | None = 0.5, **fields: object) -> ServerCheck:
    check = ServerCheck("2026-01-01T00:00:00Z", 1, "s/1", state, latency_s, "up", 2**30, None, 0, breaches)
    return replace(check, **fields)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_colour_dataset(tmp_path_factory.mktemp("health") / "dataset")


@pytest.fixture(scope="module")
def questions(dataset: Path) -> list[Question]:
    samples = read_samples(dataset / "train.jsonl")
    return build_questions(samples, layout="grid", dataset_folder=dataset, size_px=56)


@pytest.fixture
def make_monitor(questions: list[Question]) -> Callable[..., Monitor]:
    def make(url: str, usage: Callable[[], Usage] = Usage, **options: object) -> Monitor:
        return Monitor(make_options(url, **{**LIMITS, **options}), questions, usage=usage)

    return make


@pytest.mark.parametrize(
    ("kind", "state"),
    [
        ("valid", "ok"),
        ("slow", "slow"),
        ("prose", "invalid"),
        ("html", "invalid"),
        ("failing", "refused"),
        ("silent", "timeout"),
        ("trickling", "timeout"),
    ],
)
def test_each_failure_has_its_state(
    kind: str, state: str, adversary: Callable[[str], str], make_monitor: Callable[..., Monitor]
) -> None:
    limits = {"timeout": {"timeout_s": 0.2}, "slow": {"max_latency_p95_s": 0.1}}.get(state, {})
    monitor = make_monitor(adversary(kind), window=20, **limits)
    first, second = (monitor.run_check() for _ in range(2))
    assert (first.state, second.state) == (state, state)
    assert first.breaches == ()  # a single failure
    assert second.breaches == (() if state == "ok" else (state,))
    assert (second.latency_s is None) == (state in ("refused", "timeout"))


def test_a_killed_server_refuses(make_monitor: Callable[..., Monitor]) -> None:
    command = [sys.executable, "-m", "tests.serving.adversary", "valid"]
    with killed_after(subprocess.Popen(command, cwd=PROJECT_ROOT, stdout=subprocess.PIPE, text=True)) as server:
        url = f"http://127.0.0.1:{int(server.stdout.readline())}"
        processes = ServerProcesses(url)
        monitor = make_monitor(url, usage=processes.usage)
        check = monitor.run_check()
        assert (check.state, check.detail) == ("ok", "up")
        assert check.memory_bytes > 5 * 2**20
        assert processes.usage().listener.pid == server.pid
        server.kill()
        server.communicate()
    checks = [monitor.run_check() for _ in range(2)]
    assert [check.state for check in checks] == ["refused", "refused"]
    assert checks[-1].breaches == ("refused",)
    assert checks[-1].memory_bytes is None
    assert not monitor.summary()["passed"]


def test_a_server_that_fails_now_and_then_breaches_the_rate(
    make_monitor: Callable[..., Monitor], adversary: Callable[[str], str], closed_url: str
) -> None:
    monitor = make_monitor(adversary("valid"), min_valid_rate=0.6)
    valid, breaches = monitor.options.server_url, []
    for url in (valid, closed_url, valid, closed_url, valid, valid, valid):
        monitor.options.server_url = url
        breaches.append(monitor.run_check().breaches)
    # 4, 3, 3, 2, 2, 3, 3 of the last four are valid, or to come; never two failures in a row.
    assert breaches == [(), (), (), ("refused",), ("refused",), (), ()]
    assert not monitor.summary()["passed"]  # a breach counts after its end, too


@pytest.mark.parametrize("bad", [("refused", None), ("slow", 9.0)])
def test_two_bad_checks_of_twenty_are_a_breach_and_one_is_not(bad: tuple[str, float | None]) -> None:
    check = make_check(state=bad[0], latency_s=bad[1])
    checks = [check, *[make_check()] * 18, check]
    breaches = [find_breaches(make_options(), checks[:count]) for count in range(1, 21)]
    assert breaches == [()] * 19 + [(bad[0],)]


def test_percentiles_are_those_of_the_window() -> None:
    results = [("ok", 1.0), ("refused", None), ("slow", 2.0), ("invalid", 3.0), ("ok", 4.0)]
    assert summarize_window([make_check(state=state, latency_s=seconds) for state, seconds in results]) == {
        "num_checks": 5,
        "latency_p50_s": 2.5,
        "latency_p95_s": pytest.approx(3.85),
        "latency_p99_s": pytest.approx(3.97),
        "valid_rate": 0.6,
        "worst_state": "invalid",
    }
    assert summarize_window([])["latency_p50_s"] is None


@pytest.mark.parametrize(
    ("limit", "used", "breaches"),
    [
        ({"max_memory_gib": 1}, {"memory_bytes": 2**30 + 1}, ("memory",)),
        ({"max_memory_gib": 1}, {"memory_bytes": 2**30}, ()),
        ({"max_memory_gib": 1}, {"memory_bytes": None}, ()),
        ({"max_gpu_memory_gib": 2}, {"gpu_memory_bytes": 3 * 2**30}, ("gpu_memory",)),
    ],
)
def test_memory_above_its_limit_is_a_breach(
    limit: dict[str, int], used: dict[str, int | None], breaches: tuple[str, ...]
) -> None:
    assert find_breaches(make_options(**limit), [make_check(**used)]) == breaches


def test_a_restart_is_another_process_at_the_port(make_monitor: Callable[..., Monitor], closed_url: str) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        pids = iter([os.getpid(), os.getpid(), None, other.pid, other.pid])
        listeners = [None if pid is None else psutil.Process(pid) for pid in pids]
        other.communicate(b"\n")
    usages = iter([Usage(listener=listener) for listener in listeners])
    monitor = make_monitor(closed_url, usage=lambda: next(usages), max_restarts=0)
    checks = [monitor.run_check() for _ in range(5)]
    assert [check.restarts for check in checks] == [0, 0, 0, 1, 1]
    assert ["restarts" in check.breaches for check in checks] == [False, False, False, True, True]


@pytest.mark.skipif(sys.platform != "linux", reason="there /proc tells a process's beginning by the clock")
def test_a_clock_that_is_set_is_not_a_restart(
    make_monitor: Callable[..., Monitor], adversary: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = adversary("valid")
    monitor = make_monitor(url, usage=ServerProcesses(url).usage)
    assert monitor.run_check().memory_bytes is not None
    boot_time = psutil.boot_time() + 3600
    monkeypatch.setattr("psutil._pslinux.boot_time", lambda: boot_time)
    assert monitor.run_check().restarts == 0


def test_checks_are_counted_and_timed(make_monitor: Callable[..., Monitor], closed_url: str) -> None:
    start = time.monotonic()
    assert len(list(make_monitor(closed_url, interval_s=0.1, num_checks=3).watch())) == 3
    assert time.monotonic() - start >= 0.2
    assert len(list(make_monitor(closed_url, interval_s=0.3, duration_s=0.4).watch())) == 2


def test_no_check_begins_after_the_duration_however_long_they_take(
    make_monitor: Callable[..., Monitor], adversary: Callable[[str], str]
) -> None:
    monitor = make_monitor(adversary("slow"), interval_s=0, duration_s=0.05)
    assert len(list(monitor.watch())) == 1  # a check takes 0.1 s


def test_memory_counts_the_processes_that_a_server_started() -> None:
    child_code = "print(flush=True); input()"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child_code!r}])"
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert parent.stdout.readline() == b"\n"  # the child has started, and waits
        (child,) = psutil.Process(parent.pid).children()
        used = ServerProcesses("http://192.0.2.1:8000", parent.pid).usage()
        own = psutil.Process(parent.pid).memory_info().rss
        assert used.memory_bytes >= own + child.memory_info().rss // 2
        assert (used.listener, used.gpu_memory_bytes) == (None, None)  # of another machine nothing is known
    finally:
        parent.communicate(b"\n")


def test_gpu_memory_is_the_sum_over_the_drivers_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\n[ "$1" = --query-gpu=memory.used ] && printf "1024\\n512\\n"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert gpu_memory_bytes() == 1536 * 2**20
    program.write_text("#!/bin/sh\nexit 9\n")  # no driver
    assert gpu_memory_bytes() is None


def has_address(family: int, address: str) -> bool:
    """Return whether this machine has an address: IPv6 may be off, and macOS has one 127.0.0.x."""
    try:
        with socket.socket(family) as one:
            one.bind((address, 0))
    except OSError:
        return False
    return True


def test_a_server_is_found_at_its_own_address() -> None:
    code = (
        "import socket, sys; one = socket.socket(int(sys.argv[1])); one.bind((sys.argv[2], int(sys.argv[3]))); "
        "one.listen(); print('listens', flush=True); input()"
    )
    port, started = free_port(), {}
    addresses = {"127.0.0.2": socket.AF_INET, "127.0.0.1": socket.AF_INET, "::1": socket.AF_INET6}
    for address, family in addresses.items():
        if address != "127.0.0.1" and not has_address(family, address):
            continue
        started[address] = subprocess.Popen(
            [sys.executable, "-c", code, str(int(family)), address, str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
    try:
        for address, process in started.items():
            assert process.stdout.readline() == b"listens\n"
            url = f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"
            assert ServerProcesses(url).usage().listener.pid == process.pid
    finally:
        for process in started.values():
            process.kill()
            process.communicate()


# --- reports


class Receiver(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.server.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(self.server.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[HTTPServer]:
    server = HTTPServer(("127.0.0.1", 0), Receiver)
    server.bodies, server.status = [], 200
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_breach_and_recovery_reach_the_webhook(
    receiver: HTTPServer, make_monitor: Callable[..., Monitor], adversary: Callable[[str], str]
) -> None:
    url = adversary("recovering")
    monitor = make_monitor(url, min_valid_rate=0.5, window=2, interval_s=0, num_checks=6)
    webhook = Webhook(f"http://127.0.0.1:{receiver.server_port}/secret", server_url=url)
    for check in monitor.watch():  # the first three fail
        webhook(check)
    assert [body["event"] for body in receiver.bodies] == ["breach", "recovery"]
    assert [body["check"]["number"] for body in receiver.bodies] == [2, 4]
    assert receiver.bodies[0]["text"].startswith(f"{url}: invalid (invalid: ")


def test_a_webhook_that_fails_is_logged_without_its_secret_and_tried_again(
    receiver: HTTPServer, caplog: pytest.LogCaptureFixture
) -> None:
    webhook = Webhook(f"http://127.0.0.1:{receiver.server_port}/secret?key=hidden", server_url="http://server")
    receiver.status = 500
    webhook(make_check("refused"))
    assert "127.0.0.1" in caplog.text
    assert "secret" not in caplog.text
    assert "hidden" not in caplog.text
    receiver.status = 200
    webhook(make_check("refused"))
    webhook(make_check("refused"))
    assert len(receiver.bodies) == 2  # the failed one, and one more


def test_the_log_has_a_line_for_each_check(tmp_path: Path) -> None:
    log = CheckLog(tmp_path / "logs" / "health.jsonl")
    log(make_check())
    log(make_check("slow", state="slow"))
    lines = [json.loads(line) for line in (tmp_path / "logs" / "health.jsonl").read_text().splitlines()]
    assert [(line["state"], line["breaches"]) for line in lines] == [("ok", []), ("slow", ["slow"])]
    with pytest.raises(PokegemmaError, match="cannot be written"):
        CheckLog(tmp_path)


def test_half_a_surrogate_pair_is_logged(tmp_path: Path) -> None:
    half_a_pair = "\ud83d"  # json.loads takes it from a server
    log = CheckLog(tmp_path / "health.jsonl")
    log(replace(make_check(state="invalid"), detail=half_a_pair))
    assert json.loads((tmp_path / "health.jsonl").read_text(encoding="utf-8"))["detail"] == half_a_pair


def read_metrics(port: int) -> dict[str, float]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever HTTP_PROXY says
    with opener.open(f"http://127.0.0.1:{port}/metrics", timeout=100) as page:
        lines = page.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def test_prometheus_reads_what_the_monitor_found(
    make_monitor: Callable[..., Monitor], adversary: Callable[[str], str]
) -> None:
    options = {"min_valid_rate": 0.1, "window": 20, "interval_s": 0, "num_checks": 5}
    monitor, port = make_monitor(adversary("recovering"), **options), free_port()
    with serve_metrics(monitor, port=port) as add:
        assert str(read_metrics(port)["pokegemma_server_up"]) == "nan"  # not asked yet
        for check in monitor.watch():
            add(check)
        found = read_metrics(port)
        with pytest.raises(PokegemmaError, match=f"--metrics_port {port} cannot be listened on"):
            serve_metrics(monitor, port=port).__enter__()
    assert found['pokegemma_checks_total{state="invalid"}'] == 3
    assert found['pokegemma_checks_total{state="ok"}'] == 2
    assert found["pokegemma_answer_latency_seconds_count"] == 5
    assert found["pokegemma_valid_answer_rate"] == pytest.approx(0.4)
    assert found["pokegemma_server_up"] == 1
    assert (
        found['pokegemma_window_latency_seconds{quantile="0.95"}'] == summarize_window(monitor.checks)["latency_p95_s"]
    )
    assert str(found["pokegemma_process_memory_bytes"]) == "nan"


# --- the script


def monitor_options(url: str, dataset: Path, *arguments: object) -> list[object]:
    options = ["--server_url", url, "--dataset_path", dataset, "--image_size", 56, "--timeout_s", 100]
    return [*options, "--max_latency_p95_s", 90, *arguments]


def test_a_breach_is_exit_status_1(dataset: Path, adversary: Callable[[str], str], tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    flags = ("--interval_s", 0, "--exit_on_breach", "--log_file", log, "--json", "--max_consecutive_failures", 2)
    bad = call_script("health_monitor", *monitor_options(adversary("prose"), dataset, *flags))
    assert bad.returncode == 1, bad.stderr
    assert bad.stderr.splitlines()[-1] == "error: limits exceeded: invalid"
    summary = json.loads(bad.stdout)
    assert (summary["passed"], summary["num_checks"], summary["breaches"]) == (False, 2, {"invalid": 1})
    assert summary["states"] == {"ok": 0, "slow": 0, "invalid": 2, "timeout": 0, "refused": 0}
    assert len(log.read_text().splitlines()) == 2  # tests/test_scripts.py has the other exit status


def test_the_summary_counts_checks_and_breaches(
    make_monitor: Callable[..., Monitor], adversary: Callable[[str], str]
) -> None:
    monitor = make_monitor(adversary("valid"), interval_s=0, num_checks=3)
    assert len(list(monitor.watch())) == 3
    summary = format_summary(monitor.summary())
    assert "checks    3 (3 ok)" in summary
    assert "breaches  none" in summary


@pytest.mark.parametrize("url", ["http://127.0.0.1:port", "http://127.0.0.1:99999", "http://[::1"])
def test_another_kind_of_url_is_the_users_mistake(url: str) -> None:
    with pytest.raises(PokegemmaError, match="--server_url http"):
        ServerProcesses(url)
    with pytest.raises(PokegemmaError, match="--webhook_url") as caught:
        Webhook(url, server_url="http://server")
    assert url not in str(caught.value)  # it may contain a secret


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--pid", "-5"),
        ("--metrics_port", "99999"),
        ("--metrics_port", "0"),
        ("--interval_s", "inf"),
        ("--interval_s", "604801.0"),
        ("--timeout_s", "inf"),
    ],
)
def test_numbers_out_of_range_are_refused_in_a_line(option: str, value: str, dataset: Path, closed_url: str) -> None:
    done = call_script("health_monitor", *monitor_options(closed_url, dataset, "--num_checks", 1, option, value))
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {option} {value}: ")
    assert done.stderr.count("\n") == 1


def test_sigterm_ends_watching_with_a_summary(dataset: Path, adversary: Callable[[str], str], tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    options = monitor_options(adversary("valid"), dataset, "--interval_s", 1000, "--log_file", log)
    process = subprocess.Popen([sys.executable, SCRIPT, *map(str, options)], stdout=subprocess.PIPE, text=True)
    with killed_after(process):
        wait_until(lambda: log.is_file() and log.read_text(), process)
        process.terminate()
        stdout, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0
    assert "checks    1 (1 ok)" in stdout
