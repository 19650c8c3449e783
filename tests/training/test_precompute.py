"""The script that fills a feature cache: here, killed and continued, and on a Ray of two workers."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from pokegemma.data.convert import WindowOptions
from pokegemma.data.corpus import convert_corpus
from pokegemma.play.toy_recorder import record_sessions
from tests.processes import call_script

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "precompute_features.py"


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
    return [
        "--dataset_path", str(dataset), "--model_name_or_path", str(model), "--vision_features", str(output)
    ]  # fmt: skip


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
    dataset: Path, tiny_model: Path, alone: Path, tmp_path: Path
) -> None:
    command = [sys.executable, str(SCRIPT), *flags(dataset, tiny_model, tmp_path / "ray"), "--ray_address", "local"]
    done = subprocess.run([*command, "--num_workers", "2"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "ray") == contents(alone)


@pytest.mark.slow
def test_a_cache_of_another_model_is_one_line(dataset: Path, tmp_path: Path, alone: Path) -> None:
    from pokegemma.training.tiny_gemma3 import make_tiny_gemma3

    (tmp_path / "other").mkdir()
    make_tiny_gemma3(tmp_path / "other", seed=1, image_size_px=56, num_image_tokens=4)
    done = precompute(dataset, tmp_path / "other", alone)
    assert done.returncode == 2
    assert "is of another model or size (weights differ" in done.stderr.splitlines()[-1]
