"""A `python` for tests that has imported what training needs: each script is a fork, and starts without imports.

A new Python takes seven seconds of a core to import torch, transformers, TRL and PEFT, as often as a script is started.
The fixture `forked_python` is the path of a program that is called as `python` is, with `-m module`, `-c code` or a
script. A server forks itself into the script, with the environment, the folder and the files 0, 1 and 2 of the caller.
The program passes signals on, and ends as the script ends. In the script `sys.executable` is that program, too.

    python -m tests.forked_python SOCKET PROCESS_ID_OF_ITS_OWNER

Only where imports start no device: with a GPU, and on macOS, the program is Python itself.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import IO

import pytest

from pokegemma.environment import detect_hardware
from pokegemma.errors import PokegemmaError
from pokegemma.provenance import PROJECT_ROOT
from tests import forked_client
from tests.conftest import MakeOnce
from tests.processes import is_running, wait_until

MODULES = (
    "pokegemma.training.sft",
    "pokegemma.evaluation.predict",
    "accelerate.commands.launch",
    "torch.distributed.run",
    "deepspeed",  # accelerate imports it, if it is installed, to look at a model's class (2 s)
    "matplotlib.pyplot",
    "peft.tuners.lora.bnb",
    "pokegemma.release.registry",
)


# --- the server


def import_modules() -> None:
    gc.disable()
    for name in MODULES:
        with contextlib.suppress(ModuleNotFoundError, PokegemmaError):  # of extras, or on Linux only
            importlib.import_module(name)
    gc.freeze()  # a collection after the fork would copy the pages of all objects
    gc.enable()


def serve(address: str, owner: int) -> None:
    """Fork for each request, until the owner has ended; a fork returns, and then becomes a script."""
    import_modules()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the processes that wait for scripts
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(64)
        listener.settimeout(1)
        while is_running(owner):
            with contextlib.suppress(TimeoutError):
                connection, _ = listener.accept()
                if os.fork() == 0:
                    listener.close()
                    connection.settimeout(None)
                    return wait_for_script(connection)
                connection.close()
    shutil.rmtree(Path(address).parent)
    os._exit(0)


def wait_for_script(connection: socket.socket) -> None:
    """Start the script that a connection asks for and report its end; only the script's process returns."""
    header, files, *_ = socket.recv_fds(connection, 8, 3)
    request = json.loads(connection.recv(struct.unpack("Q", header)[0], socket.MSG_WAITALL))
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    process = os.fork()
    if process == 0:
        connection.close()
        os.setpgid(0, 0)
        take_over(request, files)
        return
    for file in files:
        os.close(file)
    connection.send(struct.pack("i", process))
    threading.Thread(target=pass_signals, args=(connection, process), daemon=True).start()
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    with contextlib.suppress(OSError):  # the caller has gone
        connection.send(struct.pack("i", status))
    os._exit(0)


def pass_signals(connection: socket.socket, process: int) -> None:
    """Send the script what signals come, and kill it with its process group when its caller has ended."""
    with contextlib.suppress(OSError):
        while number := connection.recv(1):
            os.kill(process, number[0])
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)
    os._exit(0)


def take_over(request: dict, files: Sequence[int]) -> None:
    """Give this process the caller's files, folder, environment and arguments."""
    for number in forked_client.SIGNALS:
        usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN if number in request["ignored"] else usual)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    arguments = request["arguments"]
    while arguments[0] in ("-u", "-B"):
        del arguments[0]
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)
    sys.executable, sys.argv = request["python"], arguments


def be_script() -> None:
    """Run what `sys.argv` names, as Python does."""
    kind = sys.argv.pop(0) if sys.argv[0] in ("-m", "-c") else ""
    folder = {"": str(Path(sys.argv[0]).resolve().parent), "-m": str(Path.cwd()), "-c": ""}[kind]
    sys.path[:] = [folder, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), *sys.path[1:]]
    if kind == "-m":
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        code, sys.argv[0] = sys.argv[0], "-c"
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


# --- its callers


def start_server(folder: Path) -> None:
    """Start a server that ends with the tests, and write the program `python`, with a socket whose path is short."""
    owner = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
    address = Path(tempfile.mkdtemp(prefix="forks-")) / "socket"
    command = [sys.executable, "-m", "tests.forked_python", str(address), str(owner)]
    with (folder / "log").open("w") as log:
        options = {"cwd": PROJECT_ROOT, "stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
        process = subprocess.Popen(command, start_new_session=True, **options)
    wait_until(lambda: address.exists() or process.poll() is not None)
    assert process.poll() is None, (folder / "log").read_text()
    (folder / "address").write_text(str(address))
    client = [sys.executable, "-IS", forked_client.__file__, str(address)]
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec {shlex.join(client)} "$0" "$@"\n')
    python.chmod(0o755)


@pytest.fixture(scope="session")
def forked_python(make_once: MakeOnce) -> str:
    """Return the path of a program that stands for `python`; see above."""
    if sys.platform == "darwin" or detect_hardware().usable_gpus:
        return sys.executable
    return str(make_once("forked_python", start_server) / "python")


class ForkedProcess:
    """What `subprocess.Popen` is for a command that begins with `forked_python`, with the process id of the script."""

    def __init__(self, command: Sequence[str], *, stdin: int, stdout: IO[bytes], stderr: int) -> None:
        """Take the options that are used: no input, and one file for all output."""
        assert (stdin, stderr) == (subprocess.DEVNULL, subprocess.STDOUT)
        python, *arguments = command
        address = Path(python).with_name("address").read_text()
        with open(os.devnull) as nothing:
            files = [nothing.fileno(), stdout.fileno(), stdout.fileno()]
            self._connection = forked_client.request_fork(address, python, arguments, files=files)
        self.pid = forked_client.receive_number(self._connection)
        self.returncode: int | None = None
        self._connection.setblocking(False)

    def poll(self) -> int | None:
        if self.returncode is None:
            with contextlib.suppress(BlockingIOError):
                self.returncode = forked_client.receive_number(self._connection)
        return self.returncode

    def __enter__(self) -> "ForkedProcess":
        return self

    def __exit__(self, *error: object) -> None:
        """Wait for the end."""
        self._connection.setblocking(True)
        self.poll()
        self._connection.close()


def start_by_forks(module: ModuleType, python: str, patch: pytest.MonkeyPatch) -> None:
    """Let a module that uses `subprocess.Popen` as above start `python`, which `forked_python` returned."""
    if Path(python).with_name("address").is_file():
        names = SimpleNamespace(Popen=ForkedProcess, DEVNULL=subprocess.DEVNULL, STDOUT=subprocess.STDOUT)
        patch.setattr(sys, "executable", python)
        patch.setattr(module, "subprocess", names)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
    be_script()
