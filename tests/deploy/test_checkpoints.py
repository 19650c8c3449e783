"""Which files hold a checkpoint's weights: those that transformers reads, for every converter the same."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pokegemma.deploy.checkpoints import open_weights, unread_files, weight_files
from pokegemma.deploy.gguf_checkpoint import read_checkpoint, staged
from pokegemma.errors import PokegemmaError
from pokegemma.training.models import load_model

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = "model.safetensors.index.json"


def write_shards(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    names = sorted(weights)
    places = {name: SHARDS[at % 2] for at, name in enumerate(names)}
    for shard in SHARDS:
        save_file({name: weights[name] for name in names if places[name] == shard}, folder / shard, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


@pytest.fixture
def sharded(tiny_model: Path, tmp_path: Path) -> Path:
    """Return the tiny model with its weights in two files, as a 4B has them."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "sharded"))
    write_shards(folder, load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    return folder


def test_the_files_are_those_that_transformers_reads(tiny_model: Path, sharded: Path) -> None:
    assert [path.name for path in weight_files(tiny_model)] == ["model.safetensors"]
    assert [path.name for path in weight_files(sharded)] == SHARDS
    whole = load_file(tiny_model / "model.safetensors")
    assert {name for _, weights in open_weights(sharded) for name in weights.keys()} == set(whole)  # noqa: SIM118
    assert unread_files(sharded) == set()
    # The shards of an earlier save beside one file: transformers takes the file.
    shutil.copy(tiny_model / "model.safetensors", sharded)
    write_shards(sharded, {name: torch.zeros_like(weight) for name, weight in whole.items()})
    assert [path.name for path in weight_files(sharded)] == ["model.safetensors"]
    assert unread_files(sharded) == {*SHARDS, INDEX}
    loaded = load_model(sharded).state_dict()["model.language_model.norm.weight"]
    assert torch.equal(loaded.float(), whole["language_model.model.norm.weight"].float())


def test_converters_are_shown_the_same_files(tiny_model: Path, sharded: Path) -> None:
    (sharded / "consolidated2.safetensors").write_bytes(b"not read by transformers")
    expected = {*SHARDS, INDEX}
    with staged(read_checkpoint(sharded)) as folder:
        assert {path.name for path in folder.glob("*.safetensors*")} == expected
    mlx = pytest.importorskip("pokegemma.deploy.mlx", exc_type=PokegemmaError)
    mlx.read_checkpoint(sharded)  # looks into the same files
    with mlx._staged(sharded, {}) as folder:
        assert {path.name for path in Path(folder).glob("*.safetensors*")} == expected


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / INDEX).unlink(), r"no weights \(model\.safetensors or"),
        (lambda folder: (folder / INDEX).write_text('{"weight'), "json is damaged: "),
        (lambda folder: (folder / INDEX).write_text("[]"), "json is damaged: "),
        (lambda folder: (folder / INDEX).write_text('{"weight_map": {"x": 1}}'), "json is damaged: "),
        (lambda folder: (folder / SHARDS[1]).unlink(), f"{SHARDS[1]} not found, which {INDEX} names"),
        (lambda folder: (folder / SHARDS[1]).write_bytes(b"x"), "the weights cannot be read"),
    ],
)
def test_weights_that_are_not_whole_are_one_line(
    damage: Callable[[Path], object], message: str, sharded: Path
) -> None:  # fmt: skip
    damage(sharded)
    with pytest.raises(PokegemmaError, match=message):
        read_checkpoint(sharded)
