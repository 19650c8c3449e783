"""The feature cache: what it is keyed by, that it continues, that several processes fill it, and what it refuses."""

import json
import multiprocessing
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Gemma3ForConditionalGeneration

from pokegemma.data.samples import Sample
from pokegemma.errors import PokegemmaError
from pokegemma.gemma.batches import feature_cache
from pokegemma.gemma.batches.collator import Gemma3Collator
from pokegemma.gemma.batches.feature_cache import FeatureCache, hash_frames, open_cache
from pokegemma.gemma.batches.feature_encoder import Encoder
from pokegemma.gemma.batches.feature_key import feature_key
from pokegemma.gemma.batches.picture_resize import read_pictures
from pokegemma.gemma.loading import open_checkpoint
from pokegemma.gemma.vision_tower import encode_pictures
from pokegemma.training import sft
from pokegemma.training.options import DataOptions, ModelOptions, TrainingOptions
from tests.processes import WAIT_S

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Gemma3ForConditionalGeneration:
    return open_checkpoint(tiny_model).load_model()


@pytest.fixture
def frames(toy_dataset: Path) -> list[str]:
    return sorted(map(str, (toy_dataset / "frames").glob("*/*.png")))


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_cache, "FRAMES_PER_CHUNK", 6)


def new_cache(folder: Path, model: Gemma3ForConditionalGeneration, processor: object, paths: list[str]) -> FeatureCache:
    cache = open_cache(folder, feature_key(model, processor))
    cache.digests = hash_frames(paths)
    return cache


def fill(
    cache: FeatureCache,
    model: object,
    processor: object,
    *,
    rank: int = 0,
    num_ranks: int = 1,
    share_out: Callable[[], object] = lambda: None,
) -> None:
    """Fill a share of what is missing; `share_out` is called between looking and writing, to wait for others."""
    encoder = Encoder(cache, model, processor, batch_size=4)
    chunks = cache.missing_chunks()
    share_out()
    for chunk in chunks[rank::num_ranks]:
        encoder.fill(chunk)
    cache.refresh()


def test_features_are_what_the_model_makes_of_the_frames(model, processor, frames, tmp_path) -> None:
    cache = new_cache(tmp_path, model, processor, frames)
    fill(cache, model, processor)
    with torch.no_grad():
        expected = encode_pictures(model.model, read_pictures(processor, frames[:4]))
    torch.testing.assert_close(cache.read(frames[:4]), expected, atol=1e-6, rtol=1e-6)
    assert cache.read([frames[3], frames[0], frames[3]]).shape == (3, 4, 128)
    assert cache.bytes_per_frame == 4 * 128 * 4


def test_a_frame_is_known_by_its_content(model, processor, frames, tmp_path) -> None:
    copy = tmp_path / "copy.png"
    shutil.copy(frames[0], copy)
    cache = new_cache(tmp_path / "cache", model, processor, [frames[0], frames[-1], str(copy)])
    assert [len(chunk.paths) for chunk in cache.missing_chunks()] == [2]
    fill(cache, model, processor)
    assert torch.equal(cache.read([str(copy)]), cache.read([frames[0]]))


@pytest.mark.usefixtures("small_chunks")
def test_a_killed_precompute_continues_and_ends_with_the_same_files(model, processor, frames, tmp_path) -> None:
    whole, killed = (new_cache(tmp_path / name, model, processor, frames) for name in ("whole", "killed"))
    fill(whole, model, processor)
    fill(killed, model, processor, rank=1, num_ranks=3)  # a third, as when two of three processes died
    (tmp_path / "killed/chunks/.half.safetensors.99.part").write_bytes(b"half")
    missing = killed.missing_chunks()
    assert 0 < len(missing) < len(whole._places) / 6
    again = new_cache(tmp_path / "killed", model, processor, frames)
    assert again.missing_chunks() == missing
    fill(again, model, processor)
    assert again.missing_chunks() == []
    files = [sorted((tmp_path / name / "chunks").glob("*.safetensors")) for name in ("whole", "killed")]
    assert [path.name for path in files[0]] == [path.name for path in files[1]]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True))


def _fill_share(
    folder: Path, tiny_model: Path, frames: list[str], rank: int, num_ranks: int, share_out: Callable[[], object]
) -> None:
    model, processor = open_checkpoint(tiny_model).load_model(), open_checkpoint(tiny_model).processor
    cache = new_cache(folder, model, processor, frames)
    fill(cache, model, processor, rank=rank, num_ranks=num_ranks, share_out=share_out)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("num_ranks", [2, 1], ids=["each its share", "both all of it"])
def test_two_processes_fill_a_cache_at_once(num_ranks, model, tiny_model, processor, frames, tmp_path) -> None:
    alone = new_cache(tmp_path / "alone", model, processor, frames)
    fill(alone, model, processor)
    # Forked, so that they share the small chunks; torch's threads are one in tests.
    context = multiprocessing.get_context("fork")
    wait = context.Barrier(2, timeout=WAIT_S).wait  # not for ever where the other one fails
    workers = [
        context.Process(
            target=_fill_share, args=(tmp_path / "two", tiny_model, frames, rank % num_ranks, num_ranks, wait)
        )
        for rank in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    two = new_cache(tmp_path / "two", model, processor, frames)
    assert two.missing_chunks() == []
    assert torch.equal(two.read(frames), alone.read(frames))
    assert not list((tmp_path / "two").rglob("*.part"))


@pytest.mark.parametrize("what", ["weights", "projector", "dtype", "processor", "image_size"])
def test_a_cache_of_another_model_is_refused(what, tiny_model, processor, tmp_path) -> None:
    model = open_checkpoint(tiny_model).load_model()
    key = feature_key(model, processor)
    open_cache(tmp_path / "cache", key)
    open_cache(tmp_path / "cache", feature_key(open_checkpoint(tiny_model).load_model(), processor))
    with torch.no_grad():
        if what == "weights":
            model.model.vision_tower.encoder.layers[3].mlp.fc2.bias[5] += 1e-3
        elif what == "projector":
            model.model.multi_modal_projector.mm_soft_emb_norm.weight[0] += 1e-3
        elif what == "dtype":
            model = model.to(torch.bfloat16)
    changed = feature_key(model, processor)
    if what == "processor":
        changed["processor"] = {**changed["processor"], "image_mean": [0.0, 0.0, 0.0]}
    elif what == "image_size":
        changed["image_size"] = 112
    with pytest.raises(PokegemmaError, match="of another model or size"):
        open_cache(tmp_path / "cache", changed)


def test_the_weights_of_the_language_model_do_not_matter(tiny_model, processor) -> None:
    model = open_checkpoint(tiny_model).load_model()
    key = feature_key(model, processor)
    with torch.no_grad():
        model.model.language_model.layers[0].mlp.up_proj.weight += 1
    assert feature_key(model, processor) == key


def test_what_a_killed_process_left_of_the_key_is_not_something_else(model, processor, tmp_path) -> None:
    (tmp_path / ".key.json.123.part").write_text("{")
    open_cache(tmp_path, feature_key(model, processor))
    assert (tmp_path / "key.json").is_file()


def test_a_key_that_another_process_writes_at_the_same_moment_is_accepted(tmp_path, monkeypatch) -> None:
    is_file = Path.is_file

    def written_after_the_look(path: Path) -> bool:
        found = is_file(path)
        if path.name == "key.json" and not found:
            monkeypatch.undo()
            open_cache(tmp_path, {"size": 1})  # the other process
        return found

    monkeypatch.setattr(Path, "is_file", written_after_the_look)
    assert open_cache(tmp_path, {"size": 1}).key == {"size": 1}


def test_a_folder_with_something_else_is_refused(model, processor, tmp_path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(PokegemmaError, match=r"--vision_features .*no key\.json"):
        open_cache(tmp_path, feature_key(model, processor))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_damaged_chunk_is_named(model, processor, frames, tmp_path) -> None:
    fill(new_cache(tmp_path, model, processor, frames[:3]), model, processor)
    (chunk,) = (tmp_path / "chunks").iterdir()
    chunk.write_bytes(chunk.read_bytes()[:-100])
    with pytest.raises(PokegemmaError, match=rf"{chunk.name} is damaged"):
        open_cache(tmp_path, feature_key(model, processor))


def test_a_chunk_that_disappears_during_training_is_named(model, processor, frames, tmp_path) -> None:
    cache = new_cache(tmp_path, model, processor, frames[:3])
    fill(cache, model, processor)
    cache.refresh()
    (chunk,) = (tmp_path / "chunks").iterdir()
    chunk.unlink()
    with pytest.raises(PokegemmaError, match=chunk.name):
        cache.read(list(cache.digests))


def test_a_frame_that_is_not_in_the_cache_is_named(model, processor, frames, tmp_path) -> None:
    cache = new_cache(tmp_path, model, processor, frames[:3])
    fill(cache, model, processor)
    with pytest.raises(PokegemmaError, match="is not in the feature cache"):
        cache.read([frames[5]])


def test_a_frame_that_cannot_be_read_is_named(model, processor, tmp_path) -> None:
    with pytest.raises(PokegemmaError, match=r"nowhere\.png cannot be read"):
        hash_frames([str(tmp_path / "nowhere.png")])
    (tmp_path / "text.png").write_text("no picture")
    cache = new_cache(tmp_path / "cache", model, processor, [str(tmp_path / "text.png")])
    with pytest.raises(PokegemmaError, match=r"text\.png cannot be read as a picture"):
        fill(cache, model, processor)


def test_a_collator_with_features_opens_no_picture_and_goes_to_workers(
    model, samples: list[Sample], toy_dataset: Path, make_collator: Callable[[str], Gemma3Collator], tmp_path: Path
) -> None:
    moved = tmp_path / "data"
    shutil.copytree(toy_dataset, moved)
    collator = replace(make_collator("frames"), dataset_folder=moved)
    paths = [str(moved / path) for path in samples[4].frames]
    cache = new_cache(tmp_path / "cache", model, collator.processor, paths)
    fill(cache, model, collator.processor)
    shutil.rmtree(moved / "frames")
    collator = pickle.loads(pickle.dumps(replace(collator, features=cache)))
    batch = collator([samples[4]])
    assert "pixel_values" not in batch
    assert batch["image_features"].shape == (len(set(paths)), 4, 128)
    assert len(batch["image_index"]) == 4


@pytest.mark.parametrize(
    "options",
    [{"train_vision_tower": True}, {"train_projector": True}, {"lora_modules_to_save": ["multi_modal_projector"]}],
    ids=lambda options: next(iter(options)),
)
def test_features_of_weights_that_are_trained_are_refused(options, tiny_model, toy_dataset, tmp_path) -> None:
    data = DataOptions(dataset_path=str(toy_dataset), vision_features=str(tmp_path / "cache"))
    training = TrainingOptions(output_dir=str(tmp_path / "a"), use_cpu=True)
    with pytest.raises(PokegemmaError, match=f"--vision_features: --{next(iter(options))} "):
        sft.train(data, training, ModelOptions(model_name_or_path=str(tiny_model), finetuning="lora", **options))
    assert not (tmp_path / "cache").exists()


def test_the_files_are_as_documented(model, processor, frames, tmp_path) -> None:
    fill(new_cache(tmp_path, model, processor, frames[:3]), model, processor)
    assert json.loads((tmp_path / "key.json").read_text())["tokens"] == 4
    (chunk,) = (tmp_path / "chunks").iterdir()
    assert load_file(chunk)["features"].shape == (3, 4, 128)
