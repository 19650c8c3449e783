"""Rows of training are read from where their files are, and those that are too long are refused."""

import json
import shutil
from pathlib import Path

import pytest

from pokegemma.data.samples import read_samples
from pokegemma.errors import PokegemmaError
from pokegemma.gemma.batches.collator import Gemma3Collator
from pokegemma.gemma.loading import open_checkpoint
from pokegemma.training.inputs import check_lengths, load_dataset
from pokegemma.training.options import DataOptions


def test_samples_that_are_too_long_are_named_and_refused(toy_dataset: Path, tiny_model: Path) -> None:
    processor = open_checkpoint(tiny_model).processor
    collator = Gemma3Collator(processor=processor, layout="grid", dataset_folder=toy_dataset)
    path = toy_dataset / "train.jsonl"
    examples = list(read_samples(path))
    check_lengths(path, examples, collator, max_length=1000)
    with pytest.raises(
        PokegemmaError, match=r"40 samples are longer than 50 tokens: \S+/1 \(\d+\).* \.\.\.; raise --max"
    ):
        check_lengths(path, examples, collator, max_length=50)


def test_the_length_check_agrees_with_the_collator(toy_dataset: Path, tiny_model: Path) -> None:
    processor = open_checkpoint(tiny_model).processor
    collator = Gemma3Collator(processor=processor, layout="frames", dataset_folder=toy_dataset)
    path = toy_dataset / "train.jsonl"
    examples = list(read_samples(path))
    longest = max(map(collator.count_tokens, examples))
    check_lengths(path, examples, collator, max_length=longest)
    with pytest.raises(PokegemmaError, match=f"longer than {longest - 1} tokens"):
        check_lengths(path, examples, collator, max_length=longest - 1)


def test_another_folder_with_the_same_relative_path_is_read_again(
    toy_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("before", "after"):
        (tmp_path / name).mkdir()
        shutil.copy(toy_dataset / "eval.jsonl", tmp_path / name)
        monkeypatch.chdir(tmp_path / name)
        rows = load_dataset(Path("eval.jsonl"), DataOptions(dataset_path="."), cache_dir=tmp_path / "cache")
        assert json.loads(rows[0]["sample"])["frames"][0].startswith(f"{tmp_path / name}/frames/")
