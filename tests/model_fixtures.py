"""Fixtures for the model side: a collator per layout over the toy dataset."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import Gemma3Processor
from transformers.utils import is_timm_available

from pokegemma.data.samples import Sample, read_samples
from pokegemma.errors import PokegemmaError
from pokegemma.gemma.batches.collator import Gemma3Collator
from pokegemma.gemma.gemma270m.package import find_weights
from pokegemma.gemma.loading import open_checkpoint
from pokegemma.gemma.tiny import gemma3n_gemma4
from tests.conftest import MakeOnce


@pytest.fixture(scope="session")
def processor(tiny_model: Path) -> Gemma3Processor:
    return open_checkpoint(tiny_model).processor


@pytest.fixture
def make_collator(processor: Gemma3Processor, toy_dataset: Path) -> Callable[[str], Gemma3Collator]:
    return lambda layout: Gemma3Collator(processor=processor, layout=layout, dataset_folder=toy_dataset)


@pytest.fixture(scope="session")
def samples(toy_dataset: Path) -> list[Sample]:
    return list(read_samples(toy_dataset / "train.jsonl"))


@pytest.fixture(scope="session")
def gemma270m_file() -> Path:
    """Return the GGUF file of a real Gemma 3 270M."""
    try:
        path = find_weights()
    except PokegemmaError as error:
        pytest.skip(str(error))
    pytest.importorskip("gguf", reason="needs ./init.sh --with gemma270m --accept-gemma-terms")
    return path


@pytest.fixture(scope="session")
def real_gemma(gemma270m_file: Path, make_once: MakeOnce) -> Path:
    """Return the checkpoint of a real Gemma 3 270M with a random vision tower: pictures of 56 px, 4 tokens each."""
    from pokegemma.gemma.gemma270m.vision import convert_gguf_with_vision

    def make(folder: Path) -> None:
        convert_gguf_with_vision(gemma270m_file, folder, image_size_px=56, num_image_tokens=4)

    return make_once("real_gemma", make)


@pytest.fixture(scope="session")
def other_models(make_once: MakeOnce) -> Callable[[str], Path]:
    """Return a function that makes a tiny checkpoint of another family once: gemma3n (by timm), gemma4, gemma4_large.

    Pictures of 16 tokens for Gemma 3n, at most 70 for Gemma 4; a window shorter than a sample.
    """

    def make(name: str) -> Path:
        if name != "gemma3n":
            options = {"max_image_tokens": 70, "sliding_window": 64, "large": name == "gemma4_large"}
            return make_once(name, functools.partial(gemma3n_gemma4.make_tiny_gemma4, **options))
        if not is_timm_available():
            pytest.skip("Gemma 3n's tower needs timm and torchvision (requirements-gemma3n.txt)")
        options = {"image_size_px": 64, "num_image_tokens": 16, "sliding_window": 64}
        return make_once(name, functools.partial(gemma3n_gemma4.make_tiny_gemma3n, **options))

    return make
