"""Fixtures of deployment: servers that behave badly, and a model that can be seen to see."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.deploy.served import free_port, write_colour_dataset, write_colour_model


@pytest.fixture
def adversary() -> Iterator[Callable[[str], str]]:
    """Return a function that starts a server of a kind (see adversary.py) and returns its URL."""
    started = []

    def start(kind: str) -> str:
        command = [sys.executable, str(Path(__file__).with_name("adversary.py")), kind]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        return f"http://127.0.0.1:{int(process.stdout.readline())}"

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def closed_url() -> str:
    """Return where no server is."""
    return f"http://127.0.0.1:{free_port()}"


@pytest.fixture(scope="session")
def colour_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a dataset of a red and a blue picture."""
    return write_colour_dataset(tmp_path_factory.mktemp("colours") / "dataset")


@pytest.fixture(scope="session")
def colour_model(colour_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model that answers "up" to red and "down" to blue."""
    folder = tmp_path_factory.mktemp("colour_model")
    write_colour_model(folder, colour_dataset)
    return folder
