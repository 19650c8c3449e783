"""Fixtures for the model side: a collator per layout over the toy dataset."""

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import Gemma3Processor

from pokegemma.data.samples import Sample, read_samples
from pokegemma.training.collator import Gemma3Collator
from pokegemma.training.models import load_processor


@pytest.fixture(scope="session")
def processor(tiny_model: Path) -> Gemma3Processor:
    return load_processor(tiny_model)


@pytest.fixture
def make_collator(processor: Gemma3Processor, toy_dataset: Path) -> Callable[[str], Gemma3Collator]:
    return lambda layout: Gemma3Collator(processor=processor, layout=layout, dataset_folder=toy_dataset)


@pytest.fixture(scope="session")
def samples(toy_dataset: Path) -> list[Sample]:
    return list(read_samples(toy_dataset / "train.jsonl"))
