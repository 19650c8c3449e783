"""What a killed run leaves behind: what counts as a checkpoint, what is deleted, and what begins again."""

import logging
from pathlib import Path

import pytest

from pokegemma.errors import PokegemmaError
from pokegemma.gemma.loading import open_checkpoint
from pokegemma.gemma.weight_files import hash_weights
from pokegemma.provenance import write_run_record
from pokegemma.training.run_folder import (
    check_output,
    clear_output,
    clear_unfinished,
    last_checkpoint,
)
from pokegemma.training.run_record import _FIXED_OPTIONS, check_resumed


def make_checkpoint(folder: Path, step: int, *, complete: bool = True) -> Path:
    """Write a checkpoint with what the trainer needs to continue; a cut-off one lacks the mark alone."""
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text("{}")
    if complete:
        (checkpoint / "complete").touch()
    return checkpoint


def resume(folder: Path, checkpoint: str = "last") -> Path | None:
    return check_output(folder, sources=[], overwrite=False, resume=checkpoint)


def test_the_last_checkpoint_is_the_newest_that_every_process_has_written(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 2)
    whole = make_checkpoint(tmp_path, 10)
    make_checkpoint(tmp_path, 12, complete=False)
    assert last_checkpoint(tmp_path) == whole == resume(tmp_path)


def test_an_incomplete_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    cut_off = make_checkpoint(tmp_path, 12, complete=False)
    with pytest.raises(PokegemmaError, match="checkpoint-12 is not a complete checkpoint"):
        resume(tmp_path, str(cut_off))


def test_a_run_of_an_earlier_version_is_continued_on_the_same_base(tiny_model: Path, tmp_path: Path) -> None:
    """Its record has the fingerprint as it was taken then."""
    options, dataset = dict.fromkeys((*_FIXED_OPTIONS, "layout")), {"sha256": "d"}
    earlier = hash_weights(tiny_model, version="")
    now = {"base_fingerprint": open_checkpoint(tiny_model).weights_fingerprint(), "base_model": str(tiny_model)}
    write_run_record(tmp_path, stage="train", options=options, base_fingerprint=earlier, dataset=dataset)
    check_resumed(tmp_path, options=options, facts={**now, "dataset": dataset})
    write_run_record(tmp_path, stage="train", options=options, base_fingerprint="0" * 64, dataset=dataset)
    with pytest.raises(PokegemmaError, match=f"base model was {'0' * 64}"):
        check_resumed(tmp_path, options=options, facts={**now, "dataset": dataset})


def test_a_run_killed_before_its_first_checkpoint_begins_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_run_record(tmp_path, stage="train", options={}, status="running")
    make_checkpoint(tmp_path, 2, complete=False)
    assert resume(tmp_path) is None
    assert "killed before its first checkpoint" in caplog.text


@pytest.mark.parametrize(("stage", "status"), [("train", "completed"), ("train", "interrupted"), ("merge", "running")])
def test_only_a_killed_run_is_started_again(stage: str, status: str, tmp_path: Path) -> None:
    write_run_record(tmp_path, stage=stage, options={}, status=status)
    with pytest.raises(PokegemmaError, match="no checkpoint in"):
        resume(tmp_path)


def test_incomplete_checkpoints_are_deleted_and_other_files_are_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = make_checkpoint(tmp_path, 10)
    cut_off = make_checkpoint(tmp_path, 12, complete=False)
    (tmp_path / ".run.json.123.part").touch()
    (tmp_path / "run.json").write_text("{}")
    with caplog.at_level(logging.WARNING):
        clear_unfinished(tmp_path)
    assert sorted(tmp_path.iterdir()) == [whole, tmp_path / "run.json"]
    assert f"{cut_off} is incomplete" in caplog.text


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_not_from_a_run_is_never_emptied(overwrite: bool, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(PokegemmaError, match=r"\(adapter, notes.txt\); choose an empty folder"):
        check_output(tmp_path, sources=[], overwrite=overwrite, resume=None)
    with pytest.raises(PokegemmaError, match="is not a folder"):
        check_output(tmp_path / "notes.txt", sources=[], overwrite=overwrite, resume=None)


def test_files_of_a_run_killed_before_its_record_do_not_block_the_next_run(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 2, complete=False)
    (tmp_path / "dataset_cache").mkdir()
    (tmp_path / ".run.json.7.part").touch()
    assert check_output(tmp_path, sources=[], overwrite=False, resume=None) is None
    clear_output(tmp_path)
    assert list(tmp_path.iterdir()) == []
