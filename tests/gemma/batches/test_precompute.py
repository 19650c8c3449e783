"""The script that fills a feature cache: here, killed and continued, and on a Ray of two workers."""

import functools
import hashlib
import importlib.util
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import SiglipVisionModel

from pokegemma.data.convert import WindowOptions
from pokegemma.data.corpus import convert_corpus
from pokegemma.gemma.batches import feature_encoder
from pokegemma.parallel.workers import map_items
from pokegemma.play.toy.recorder import record_sessions
from tests.parallel.test_ray_cluster import assert_done_by_ray
from tests.processes import call_script
from tests.toy_work import note_ray_worker


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a dataset of 300 grid pictures: three chunks of features."""
    folder = tmp_path_factory.mktemp("many")
    record_sessions(folder / "recorded", num_sessions=10, seed=5, num_turns=30)
    convert_corpus(
        folder / "recorded" / "runs", folder / "dataset", window=WindowOptions(), eval_fraction=0.2, num_workers=1
    )
    return folder / "dataset"


def flags(dataset: Path, model: Path, output: Path) -> list[str]:
    return ["--dataset_path", str(dataset), "--model_name_or_path", str(model), "--vision_features", str(output)]


def precompute(dataset: Path, model: Path, output: Path) -> subprocess.CompletedProcess[str]:
    return call_script("precompute_features", *flags(dataset, model, output))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def alone(dataset: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("alone") / "features"
    done = precompute(dataset, tiny_model, output)
    assert done.returncode == 0, done.stderr
    assert len(list((output / "chunks").iterdir())) == 3
    return output


@pytest.mark.slow
def test_what_is_there_is_not_made_again(dataset: Path, tiny_model: Path, alone: Path) -> None:
    chunks = sorted((alone / "chunks").iterdir())
    content, times = chunks[1].read_bytes(), {path: path.stat().st_mtime_ns for path in chunks}
    chunks[1].unlink()
    done = precompute(dataset, tiny_model, alone)
    assert done.returncode == 0, done.stderr
    assert chunks[1].read_bytes() == content
    assert [path for path in chunks if path.stat().st_mtime_ns != times[path]] == [chunks[1]]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ./init.sh --with ray")
def test_a_ray_of_two_workers_writes_the_same_bytes(
    dataset: Path, tiny_model: Path, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (workers := tmp_path / "workers").mkdir()
    note = lambda work, chunks, **options: map_items(  # noqa: E731
        functools.partial(note_ray_worker, work=work, folder=workers), chunks, **options
    )
    monkeypatch.setattr(feature_encoder, "map_items", note)
    ray = ("--ray_address", "local", "--num_workers", "2")
    done = call_script("precompute_features", *flags(dataset, tiny_model, tmp_path / "ray"), *ray)
    assert done.returncode == 0, done.stderr
    assert_done_by_ray(workers, num_workers=2)
    assert contents(tmp_path / "ray") == contents(alone)


@pytest.mark.slow
def test_a_cache_of_another_model_is_one_line(dataset: Path, tmp_path: Path, alone: Path) -> None:
    from pokegemma.gemma.tiny.gemma3 import make_tiny_gemma3

    (tmp_path / "other").mkdir()
    make_tiny_gemma3(tmp_path / "other", seed=1, image_size_px=56, num_image_tokens=4)
    done = precompute(dataset, tmp_path / "other", alone)
    assert done.returncode == 2
    assert "is of another model or size (weights differ" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.slow(5)
def test_features_are_computed_and_stored_in_the_type_that_was_asked_for(
    dtype: str, toy_dataset: Path, tiny_model: Path, tmp_path: Path
) -> None:
    types, pictures = set(), []

    def look(module: torch.nn.Module, inputs: tuple, output: object) -> None:
        if isinstance(module, torch.nn.Linear):
            types.add(output.dtype)
        if isinstance(module, SiglipVisionModel):
            pictures.append(len(output.last_hidden_state))

    handle = torch.nn.modules.module.register_module_forward_hook(look)
    try:
        options = flags(toy_dataset, tiny_model, tmp_path / "features")
        done = call_script("precompute_features", *options, "--dtype", dtype)
    finally:
        handle.remove()
    assert done.returncode == 0, done.stderr
    assert types == {getattr(torch, dtype)}
    features = [load_file(path)["features"] for path in (tmp_path / "features" / "chunks").iterdir()]
    assert {part.dtype for part in features} == {getattr(torch, dtype)}
    grids = {hashlib.sha256(path.read_bytes()).digest() for path in (toy_dataset / "grid_images").iterdir()}
    assert sum(pictures) == sum(map(len, features)) == len(grids)  # every picture once
