"""What converters are shown of a checkpoint: the weights that transformers reads, under published names."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pokegemma.errors import PokegemmaError
from pokegemma.export.gguf import convert_to_gguf
from pokegemma.export.gguf_source import read_gguf_source, staged
from pokegemma.export.llama_cpp_converter import find_converter
from pokegemma.export.source import PUBLISHED_HEAD
from pokegemma.gemma.loading import open_checkpoint
from pokegemma.gemma.weight_files import stored_tensors, weight_files

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
    assert {tensor.name for tensor in stored_tensors(sharded)} == set(whole)
    # The shards of an earlier save beside one file: transformers takes the file.
    shutil.copy(tiny_model / "model.safetensors", sharded)
    write_shards(sharded, {name: torch.zeros_like(weight) for name, weight in whole.items()})
    assert [path.name for path in weight_files(sharded)] == ["model.safetensors"]
    loaded = open_checkpoint(sharded).load_model().state_dict()["model.language_model.norm.weight"]
    assert torch.equal(loaded.float(), whole["language_model.model.norm.weight"].float())


def staged_weights(checkpoint: Path, temporary: Path) -> list[dict[str, torch.Tensor]]:
    """Return the tensors that the converters for GGUF and MLX are shown; they read them as safetensors does."""
    temporary.mkdir()
    shown = []
    with staged(read_gguf_source(checkpoint), beside=temporary) as folder:
        shown.append({tensor.name: tensor.read() for tensor in stored_tensors(folder)})
        names = {path.name for path in folder.glob("*.safetensors*")}
    mlx = pytest.importorskip("pokegemma.export.mlx", exc_type=PokegemmaError)
    with mlx._staged(checkpoint, {}, beside=temporary) as folder:
        folder = Path(folder)
        shown.append({tensor.name: tensor.read() for tensor in stored_tensors(folder)})
        assert {path.name for path in folder.glob("*.safetensors*")} == names
    assert names == {file.name for file in weight_files(checkpoint)} | ({INDEX} if len(names) > 1 else set())
    assert list(temporary.iterdir()) == []
    return shown


def assert_same_tensors(shown: list[dict[str, torch.Tensor]], expected: dict[str, torch.Tensor]) -> None:
    for tensors in shown:
        assert set(tensors) == set(expected)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())


def test_converters_are_shown_the_files_that_transformers_reads(
    tiny_model: Path, sharded: Path, tmp_path: Path
) -> None:
    (sharded / "consolidated2.safetensors").write_bytes(b"not read by transformers")
    whole = load_file(tiny_model / "model.safetensors")
    assert_same_tensors(staged_weights(sharded, tmp_path / "shards"), whole)
    # The shards of an earlier save beside one file: transformers takes the file.
    shutil.copy(tiny_model / "model.safetensors", sharded)
    write_shards(sharded, {name: torch.zeros_like(weight) for name, weight in whole.items()})
    assert_same_tensors(staged_weights(sharded, tmp_path / "file"), whole)


# --- names of transformers 5


@pytest.fixture
def checkpoint_n(tiny_model: Path, tmp_path: Path) -> Path:
    """Return a checkpoint-2 of full fine-tuning: transformers 5's names, no tokenizer.model, run.json beside it."""
    folder = tmp_path / "run" / "checkpoint-2"
    shutil.copytree(tiny_model, folder)
    (folder / "tokenizer.model").unlink()
    open_checkpoint(tiny_model).load_model().save_pretrained(folder, save_original_format=False)
    (folder.parent / "run.json").write_text(json.dumps({"stage": "train", "base_model": str(tiny_model)}))
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        assert "model.vision_tower.post_layernorm.bias" in weights.keys()  # noqa: SIM118
    return folder


@pytest.mark.parametrize("shards", [False, True])
def test_converters_are_shown_published_names_of_a_training_checkpoint(
    shards: bool, checkpoint_n: Path, tiny_model: Path, tmp_path: Path
) -> None:
    if shards:
        write_shards(checkpoint_n, load_file(checkpoint_n / "model.safetensors"))
        (checkpoint_n / "model.safetensors").unlink()
    assert_same_tensors(staged_weights(checkpoint_n, tmp_path / "staged"), load_file(tiny_model / "model.safetensors"))


@pytest.mark.slow(7)
def test_a_training_checkpoint_becomes_the_gguf_files_of_the_same_merged_one(
    checkpoint_n: Path, gguf_folder: Path, to_gguf: Callable[..., object], tmp_path: Path
) -> None:
    to_gguf(checkpoint_n, tmp_path / "gguf", "f16")
    for name in ("model-f16.gguf", "mmproj-f16.gguf"):
        ours, theirs = ((folder / name).read_bytes() for folder in (tmp_path / "gguf", gguf_folder))
        assert len(ours) == pytest.approx(len(theirs), abs=200)  # the model's name is in it
        assert ours[-100_000:] == theirs[-100_000:]
    assert not list((tmp_path / "gguf").glob(".*"))


def test_a_training_checkpoint_becomes_the_mlx_folder_of_the_same_merged_one(
    checkpoint_n: Path, tiny_model: Path, tmp_path: Path
) -> None:
    mlx = pytest.importorskip("pokegemma.export.mlx", exc_type=PokegemmaError)
    mlx.convert_to_mlx(checkpoint_n, tmp_path / "ours", bits=4)
    mlx.convert_to_mlx(tiny_model, tmp_path / "theirs", bits=4)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert_same_tensors([ours], theirs)
    assert not list((tmp_path / "ours").glob(".*"))


def test_a_training_checkpoint_without_its_base_names_the_missing_file(checkpoint_n: Path, tmp_path: Path) -> None:
    (checkpoint_n.parent / "run.json").write_text(json.dumps({"stage": "train", "base_model": str(tmp_path / "gone")}))
    with pytest.raises(PokegemmaError, match=r"gone: no such folder"):
        convert_to_gguf(checkpoint_n, tmp_path / "gguf", quantizations=["f16"], converter=find_converter(None))
    assert not (tmp_path / "gguf").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "processor_config.json"])
def test_a_missing_file_of_the_processor_is_named_with_the_base(
    name: str, checkpoint_n: Path, tiny_model: Path
) -> None:
    (checkpoint_n / name).unlink()
    with pytest.raises(PokegemmaError, match=f"{name} not found; copy from the base checkpoint, {tiny_model}"):
        read_gguf_source(checkpoint_n)


# --- the LM head


def add_head(folder: Path, *, same: bool) -> torch.Tensor:
    """Add an LM head to a checkpoint: a copy of the embeddings, or another one, which transformers reads.

    It does so whatever tie_word_embeddings in config.json says, which is true here.
    """
    weights = load_file(folder / "model.safetensors")
    embeddings = weights["language_model.model.embed_tokens.weight"]
    head = embeddings.clone() if same else embeddings.flip(0).contiguous()
    save_file({**weights, "lm_head.weight": head}, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(open_checkpoint(folder).load_model().lm_head.weight, head)
    return head


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "copy"))


def test_a_head_that_is_a_copy_of_the_embeddings_is_left_out(copy: Path, tiny_model: Path, tmp_path: Path) -> None:
    add_head(copy, same=True)
    assert_same_tensors(staged_weights(copy, tmp_path / "staged"), load_file(tiny_model / "model.safetensors"))


def test_an_untied_head_arrives_in_gguf_and_is_refused_for_mlx(copy: Path, tmp_path: Path) -> None:
    head = add_head(copy, same=False)
    assert read_gguf_source(copy).num_text_tensors == 6 * 13 + 3
    with staged(read_gguf_source(copy), beside=tmp_path) as folder:
        assert torch.equal(load_file(folder / "model.safetensors")[PUBLISHED_HEAD], head)
    mlx = pytest.importorskip("pokegemma.export.mlx", exc_type=PokegemmaError)
    with pytest.raises(PokegemmaError, match="its LM head is not tied to its embeddings") as caught:
        mlx.convert_to_mlx(copy, tmp_path / "mlx")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "mlx").exists()


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
def test_weights_that_are_not_whole_are_one_line(damage: Callable[[Path], object], message: str, sharded: Path) -> None:
    damage(sharded)
    with pytest.raises(PokegemmaError, match=message):
        read_gguf_source(sharded)
