"""Fixtures of deployment: models converted, questions, servers that behave badly, a model that can be seen to see."""

import contextlib
import json
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pokegemma.data.samples import read_samples
from pokegemma.engines.questions import Question, build_questions
from tests.conftest import MakeOnce
from tests.export import mlx_cases
from tests.serving.adversary import run_adversary
from tests.serving.served import write_colour_dataset, write_colour_model

if TYPE_CHECKING:
    from pokegemma.export.gguf import Conversion


@pytest.fixture(scope="session")
def to_gguf(forked_python: str) -> Callable[..., "Conversion"]:
    """Return a function that converts a model by the converter that ./init.sh --with gguf fetched, started as a fork.

    A new Python takes 5 seconds for the imports of the converter, which is started once for each file.
    """
    pytest.importorskip("llama_cpp", reason="needs ./init.sh --with gguf")
    from pokegemma.export.gguf import convert_to_gguf
    from pokegemma.export.llama_cpp_converter import find_converter

    def convert(model: Path, output: Path, *quantizations: str) -> "Conversion":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "executable", forked_python)
            return convert_to_gguf(model, output, quantizations=quantizations, converter=find_converter(None))

    return convert


@pytest.fixture(scope="session")
def gguf_folder(tiny_model: Path, to_gguf: Callable[..., "Conversion"], make_once: MakeOnce) -> Path:
    """Return the tiny model as f16, q8_0 and q4_k_m."""
    return make_once("gguf", lambda folder: to_gguf(tiny_model, folder / "tiny", "f16", "q8_0", "q4_k_m")) / "tiny"


@pytest.fixture(scope="session")
def questions(toy_dataset: Path) -> list[Question]:
    """Return six questions of the layout `grid` for the tiny model."""
    samples = list(read_samples(toy_dataset / "eval.jsonl"))[:6]
    return build_questions(samples, layout="grid", dataset_folder=toy_dataset, size_px=56)


@pytest.fixture(scope="session")
def mlx_checkpoint(make_once: MakeOnce) -> Path:
    """Return a tiny Gemma 3 with positions like those of a 4B, and 16 tokens a picture instead of 256."""
    from pokegemma.gemma.tiny.gemma3 import make_tiny_gemma3

    def make(folder: Path) -> None:
        make_tiny_gemma3(
            folder, image_size_px=mlx_cases.IMAGE_SIZE_PX, num_image_tokens=mlx_cases.IMAGE_TOKENS, sliding_window=64
        )
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["text_config"]["rope_parameters"]["full_attention"] |= {"rope_type": "linear", "factor": 8.0}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")

    return make_once("mlx_checkpoint", make)


@pytest.fixture(scope="session")
def mlx_folder(mlx_checkpoint: Path, make_once: MakeOnce) -> Path:
    """Return it converted for MLX, 16 bits."""
    from pokegemma.export.mlx import convert_to_mlx

    return make_once("mlx", lambda folder: convert_to_mlx(mlx_checkpoint, folder / "16bit")) / "16bit"


@pytest.fixture
def adversary() -> Iterator[Callable[[str], str]]:
    """Return a function that starts a server of a kind in a thread (see serving/adversary.py) and returns its URL."""
    with contextlib.ExitStack() as stack:
        yield lambda kind: stack.enter_context(run_adversary(kind)).url


@pytest.fixture(scope="session")
def closed_url() -> Iterator[str]:
    """Return where no server is, nor can be: the port is held, and nobody listens."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{held.getsockname()[1]}"


@pytest.fixture(scope="session")
def colour_dataset(make_once: MakeOnce) -> Path:
    """Return a dataset of a red and a blue picture."""
    return make_once("colours", lambda folder: write_colour_dataset(folder / "dataset")) / "dataset"


@pytest.fixture(scope="session")
def colour_model(colour_dataset: Path, make_once: MakeOnce) -> Path:
    """Return a model that answers "up" to red and "down" to blue."""
    return make_once("colour_model", lambda folder: write_colour_model(folder, colour_dataset))


@pytest.fixture(scope="session")
def colour_gguf(colour_model: Path, to_gguf: Callable[..., "Conversion"], make_once: MakeOnce) -> Path:
    """Return it converted for llama.cpp, as f16."""
    return make_once("colour_gguf", lambda folder: to_gguf(colour_model, folder / "gguf", "f16")) / "gguf"


@pytest.fixture(scope="session")
def colour_mlx(colour_model: Path, make_once: MakeOnce) -> Path:
    """Return it converted for MLX, 16 bits."""
    pytest.importorskip("mlx_vlm", reason="needs ./init.sh --with mlx")
    from pokegemma.export.mlx import convert_to_mlx

    return make_once("colour_mlx", lambda folder: convert_to_mlx(colour_model, folder / "mlx")) / "mlx"
