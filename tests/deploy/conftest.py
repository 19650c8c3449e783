"""Fixtures of deployment: the tiny model converted, and questions to ask it."""

from pathlib import Path

import pytest

from pokegemma.data.samples import read_samples
from pokegemma.deploy.questions import Question, build_questions


@pytest.fixture(scope="session")
def gguf_folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tiny model as f16, q8_0 and q4_k_m, by the converter that ./init.sh --with gguf fetched."""
    from pokegemma.deploy.converter_source import find_converter
    from pokegemma.deploy.gguf import convert

    folder = tmp_path_factory.mktemp("gguf") / "tiny"
    convert(tiny_model, folder, quantizations=["f16", "q8_0", "q4_k_m"], converter=find_converter(None))
    return folder


@pytest.fixture(scope="session")
def questions(toy_dataset: Path) -> list[Question]:
    """Return six questions of the layout `grid` for the tiny model."""
    samples = list(read_samples(toy_dataset / "eval.jsonl"))[:6]
    return build_questions(samples, layout="grid", dataset_folder=toy_dataset, size_px=56)
