"""The engines' own servers, started by scripts/serve.py: asked with a picture, watched, killed, reported."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

from pokegemma.data.samples import read_samples
from pokegemma.engines.questions import Question, build_questions
from pokegemma.gemma.loading import open_checkpoint
from pokegemma.provenance import PROJECT_ROOT
from pokegemma.serving.client import ask, request
from tests.processes import WAIT_S, call_script, free_port, is_running, killed_after, wait_until, wait_until_ended
from tests.serving.served import SIZE_PX

SERVE, MONITOR = PROJECT_ROOT / "scripts" / "serve.py", PROJECT_ROOT / "scripts" / "health_monitor.py"
ENGINES = ("transformers", "llama.cpp", "mlx")


@pytest.fixture(scope="module")
def served_paths(request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """Return a function from an engine to the colour model as that engine reads it."""
    names = {"transformers": "colour_model", "llama.cpp": "colour_gguf", "mlx": "colour_mlx"}
    return lambda engine: request.getfixturevalue(names[engine])


@pytest.fixture(scope="module")
def questions(colour_dataset: Path) -> list[Question]:
    samples = read_samples(colour_dataset / "train.jsonl")
    return build_questions(samples, layout="grid", dataset_folder=colour_dataset, size_px=SIZE_PX)


def prompt_inputs(model_path: Path, question: Question) -> dict[str, torch.Tensor]:
    """Return what transformers makes of a question."""
    processor = open_checkpoint(model_path).processor
    prompt = processor.apply_chat_template(list(question.messages), add_generation_prompt=True)
    return processor(text=[prompt], images=[list(question.pictures)], return_tensors="pt", add_special_tokens=False)


def count_prompt_tokens(url: str, question: Question, *, model: str) -> int:
    """Return how many tokens a server made of a question."""
    body = {"model": model, "messages": question.openai_messages(), "max_tokens": 1, "temperature": 0.0}
    answer = json.loads(request("POST", f"{url}/v1/chat/completions", timeout_s=WAIT_S, body=body))
    return answer["usage"]["prompt_tokens"]


@torch.no_grad()
def reference_text(model_path: Path, question: Question) -> str:
    """Return transformers' greedy answer in float32, without a server."""
    checkpoint, inputs = open_checkpoint(model_path), prompt_inputs(model_path, question)
    tokens = checkpoint.load_model().generate(**inputs, max_new_tokens=32, do_sample=False)[
        0, inputs["input_ids"].shape[1] :
    ]
    return checkpoint.processor.decode(tokens, skip_special_tokens=True)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Return a function that starts a script; what still runs at the end is killed, with its children."""
    with contextlib.ExitStack() as stack:

        def start(script: Path, *arguments: object) -> subprocess.Popen:
            errors = stack.enter_context(tempfile.TemporaryFile())
            process = subprocess.Popen(
                [sys.executable, str(script), *map(str, arguments)],
                cwd=tmp_path,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )
            process.errors = errors
            return stack.enter_context(killed_after(process))

        yield start


def errors_of(process: subprocess.Popen) -> str:
    process.errors.seek(0)
    return process.errors.read().decode(errors="replace")


def read_lines(path: Path) -> list[dict]:
    """Return the lines of JSON that are whole; the last may just be written."""
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_is_served_asked_watched_killed_and_reported(
    engine: str,
    served_paths: Callable[[str], Path],
    questions: list[Question],
    colour_model: Path,
    colour_dataset: Path,
    start: Callable[..., subprocess.Popen],
    tmp_path: Path,
) -> None:
    port = free_port()
    url, model = f"http://127.0.0.1:{port}", served_paths(engine)
    server = start(SERVE, "--engine", engine, "--model_path", model, "--port", port)
    ready = server.stdout.readline()
    name = str(model / "model-f16.gguf") if engine == "llama.cpp" else str(model)
    assert ready == f"ready: {url} ({engine}, model {name}); stop with Ctrl-C\n", errors_of(server)

    answers = [ask(url, question, model=name, max_new_tokens=32, timeout_s=WAIT_S) for question in questions]
    assert [answer.text for answer in answers] == ['{"button": "up"}', '{"button": "down"}']  # it saw the picture
    assert [answer.text for answer in answers] == [reference_text(colour_model, question) for question in questions]
    assert all(answer.complete for answer in answers)
    # As many tokens as in training: no second BOS.
    assert count_prompt_tokens(url, questions[0], model=name) == len(
        prompt_inputs(colour_model, questions[0])["input_ids"][0]
    )

    log = tmp_path / "health.jsonl"
    monitor = start(
        MONITOR,
        "--server_url",
        url,
        "--dataset_path",
        colour_dataset,
        "--image_size",
        SIZE_PX,
        "--log_file",
        log,
        "--interval_s",
        "0.3",
        "--max_consecutive_failures",
        "2",
        "--exit_on_breach",
        "--max_latency_p95_s",
        WAIT_S,
        "--timeout_s",
        WAIT_S,
    )
    wait_until(lambda: len(read_lines(log)) >= 2, monitor)
    assert {(line["state"], line["breaches"] == []) for line in read_lines(log)} == {("ok", True)}
    assert {line["detail"] for line in read_lines(log)} == {"up", "down"}
    assert all(line["memory_bytes"] > 50 * 2**20 for line in read_lines(log))

    (child,) = (one for one in psutil.Process(server.pid).children() if "--port" in one.cmdline())
    child.kill()
    assert monitor.wait(WAIT_S) == 1, errors_of(monitor)
    last = read_lines(log)[-1]
    assert (last["state"], last["breaches"], last["memory_bytes"]) == ("refused", ["refused"], None)
    assert server.wait(WAIT_S) == 1
    assert f"error: the {engine} server was killed by signal 9 after it was ready" in errors_of(server)


@pytest.mark.slow
def test_ctrl_c_ends_the_server_and_all_that_it_started(  # SIGTERM does in the servers of test_parity.py
    served_paths: Callable[[str], Path], start: Callable[..., subprocess.Popen], tmp_path: Path
) -> None:
    port, log = free_port(), tmp_path / "engine.txt"
    server = start(
        SERVE, "--engine", "llama.cpp", "--model_path", served_paths("llama.cpp"), "--port", port, "--log_file", log
    )
    assert server.stdout.readline().startswith("ready: "), errors_of(server)
    family = psutil.Process(server.pid).children(recursive=True)
    server.send_signal(signal.SIGINT)
    assert server.wait(WAIT_S) == 0, errors_of(server)
    assert family
    assert not any(map(is_running, family))  # it waits for them
    assert "Uvicorn running on" in log.read_text()
    assert "Uvicorn running on" not in errors_of(server)


@pytest.fixture
def broken_gguf(tmp_path: Path) -> Path:
    """Return a folder of files that look like a model until somebody loads them."""
    folder = tmp_path / "broken"
    folder.mkdir()
    for name in ("model-f16.gguf", "mmproj-f16.gguf"):
        (folder / name).write_bytes(b"GGUF" + bytes(100))
    return folder


def write_engine(folder: Path, commands: str) -> Path:
    """Write a llama-server that does nothing but `commands` of sh."""
    program = folder / "llama-server"
    program.write_text(f"#!/bin/sh\n{commands}")
    program.chmod(0o755)
    return program


def serve_options(folder: Path, engine: Path, *flags: object) -> list[object]:
    """Return options of serve.py for a program that stands for llama-server."""
    options = ["--engine", "llama.cpp", "--model_path", folder, "--port", free_port(), "--llama_server", engine]
    return [*options, *flags]


def test_a_taken_port_is_refused_before_anything_is_started(broken_gguf: Path, tmp_path: Path) -> None:
    engine = write_engine(tmp_path, f"touch {tmp_path}/started\n")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = call_script("serve", *serve_options(broken_gguf, engine, "--port", port))
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: --host 127.0.0.1 --port {port} ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "started").exists()


def test_an_engine_that_ends_at_once_fails_with_its_last_line(broken_gguf: Path, tmp_path: Path) -> None:
    engine = write_engine(tmp_path, "echo loading\necho no such model >&2\nexit 3\n")
    done = call_script("serve", *serve_options(broken_gguf, engine, "--log_file", tmp_path / "log"))
    assert (done.returncode, done.stdout) == (1, "")
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: the llama.cpp server ended with exit status 3 before it was ready")
    assert last.endswith("no such model")


def test_an_engine_that_is_not_ready_in_time_is_ended(broken_gguf: Path, tmp_path: Path) -> None:
    busy = write_engine(tmp_path, "exec sleep 600\n")
    flags = ("--ready_timeout_s", 0.05, "--log_file", tmp_path / "log")
    before = set(psutil.Process().children())
    done = call_script("serve", *serve_options(broken_gguf, busy, *flags))
    assert done.returncode == 1
    assert "--ready_timeout_s" in done.stderr
    assert set(psutil.Process().children()) <= before


@pytest.mark.slow(3)
def test_a_server_does_not_outlive_a_script_that_is_killed(
    broken_gguf: Path, start: Callable[..., subprocess.Popen], tmp_path: Path
) -> None:
    engine = write_engine(tmp_path, "sleep 600 &\necho $! > sleeper.part\nmv sleeper.part sleeper\nwait\n")
    server = start(SERVE, *serve_options(broken_gguf, engine))
    wait_until((tmp_path / "sleeper").exists, server)
    script = psutil.Process(server.pid)
    wait_until(lambda: len(script.children()) == 2, server)  # the engine, and what watches over it
    family = [*script.children(recursive=True), psutil.Process(int((tmp_path / "sleeper").read_text()))]
    server.kill()
    wait_until_ended(family)


PATIENT = """
import sys

from pokegemma.serving.engine_command_lines import ServerOptions, build_launch
from pokegemma.serving.supervisor import serve

model, port, engine = sys.argv[1:]
launch = build_launch("llama.cpp", model, ServerOptions(port=int(port), llama_server=engine))
serve(launch, on_ready=lambda: None, ready_timeout_s=1e6, stop_timeout_s=1e6)
"""


def test_a_server_that_does_not_end_is_killed_by_a_second_signal(
    broken_gguf: Path, start: Callable[..., subprocess.Popen], tmp_path: Path
) -> None:
    deaf = write_engine(tmp_path, "trap 'touch asked' TERM\necho $$ > pid\nwhile :; do sleep 0.1; done\n")
    script = tmp_path / "patient.py"  # as serve.py is for 15 s
    script.write_text(PATIENT)
    server = start(script, broken_gguf, free_port(), deaf)
    wait_until((tmp_path / "pid").exists, server)
    server.send_signal(signal.SIGINT)
    wait_until((tmp_path / "asked").exists, server)
    engine = int((tmp_path / "pid").read_text())
    assert is_running(engine)
    server.send_signal(signal.SIGINT)
    assert server.wait(WAIT_S) == 0
    assert not is_running(engine)


def test_the_log_has_all_that_a_server_writes_at_its_end(
    broken_gguf: Path, start: Callable[..., subprocess.Popen], tmp_path: Path
) -> None:
    log = tmp_path / "engine.txt"
    engine = write_engine(
        tmp_path,
        "exec 2> /dev/null\ntrap 'yes \"\" | head -n 100000; echo the end; exit' TERM\n"  # more than a pipe holds
        "echo begin\nwhile :; do sleep 0.1; done\n",
    )
    server = start(SERVE, *serve_options(broken_gguf, engine, "--log_file", log))
    wait_until(lambda: log.is_file() and log.read_text(), server)
    server.terminate()
    assert server.wait(WAIT_S) == 0
    assert log.read_text().split() == ["begin", "the", "end"]
    assert errors_of(server) == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_a_full_disk_does_not_hinder_a_clean_end(
    broken_gguf: Path, start: Callable[..., subprocess.Popen], tmp_path: Path
) -> None:
    engine = write_engine(tmp_path, "echo begin\ntouch started\nexec sleep 600\n")
    server = start(SERVE, *serve_options(broken_gguf, engine, "--log_file", "/dev/full"))
    wait_until((tmp_path / "started").exists, server)
    server.terminate()
    assert server.wait(WAIT_S) == 0, errors_of(server)


@pytest.mark.parametrize(("flag", "value"), [("--host", "a..b"), ("--ready_timeout_s", "nan"), ("--port", "0")])
def test_an_impossible_option_is_refused_in_a_line(flag: str, value: str, broken_gguf: Path, tmp_path: Path) -> None:
    done = call_script("serve", *serve_options(broken_gguf, write_engine(tmp_path, ""), flag, value))
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {flag} {value}: ")
    assert done.stderr.count("\n") == 1
