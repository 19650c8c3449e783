"""What has its final name is whole, and nothing is overwritten unasked."""

import shutil
from pathlib import Path

import pytest
from safetensors import SafetensorError

from pokegemma.errors import PokegemmaError
from pokegemma.outputs import atomic_file, atomic_folder, file_lock, refuse_to_replace, require_space


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "new" / "a.txt") as path:
        path.write_text("whole")
        assert not (tmp_path / "new" / "a.txt").exists()
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["a.txt"]


def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_file(tmp_path / "a.txt") as path:
        path.write_text("half")
        raise ZeroDivisionError
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"a.txt": "old"}


def make_result(folder: Path, *, stage: str) -> None:
    folder.mkdir()
    (folder / "old.txt").touch()
    (folder / "run.json").write_text(f'{{"stage": "{stage}"}}')


@pytest.mark.parametrize("error", [SafetensorError("No space left on device (os error 28)"), OSError(28, "full")])
def test_a_full_disk_has_the_name_of_the_file_or_folder(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"a\.json") as caught, atomic_file(tmp_path / "a.json"):
        raise error
    assert caught.value.filename == str(tmp_path / "a.json")
    with pytest.raises(PokegemmaError, match="the disk is full"), atomic_folder(tmp_path / "b", stage="merge"):
        raise error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stage", ["convert", None])
def test_only_a_result_of_the_same_stage_is_replaced(tmp_path: Path, stage: str | None) -> None:
    make_result(tmp_path / "out", stage="convert")
    if stage is None:
        (tmp_path / "out" / "run.json").unlink()
    before = sorted(tmp_path.rglob("*"))
    with (
        pytest.raises(PokegemmaError, match="something else"),
        atomic_folder(tmp_path / "out", stage="s", overwrite=True),
    ):
        pass
    assert sorted(tmp_path.rglob("*")) == before


def test_a_link_to_a_result_is_replaced_and_its_target_kept(tmp_path: Path) -> None:
    make_result(tmp_path / "target", stage="s")
    (tmp_path / "out").symlink_to(tmp_path / "target")
    with atomic_folder(tmp_path / "out", stage="s", overwrite=True) as folder:
        (folder / "new.txt").touch()
    assert (tmp_path / "out" / "new.txt").exists() and (tmp_path / "target" / "old.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "target"]


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "out", stage="s") as folder:
        (folder / "a.txt").write_text("whole")
        assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "a.txt").read_text() == "whole"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failed_folder_leaves_nothing_or_what_was_there(tmp_path: Path, overwrite: bool) -> None:
    if overwrite:
        make_result(tmp_path / "out", stage="s")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "out", stage="s", overwrite=overwrite) as folder:
        (folder / "half.txt").touch()
        raise ZeroDivisionError
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_is_replaced_only_when_asked(tmp_path: Path) -> None:
    make_result(tmp_path / "out", stage="s")
    with pytest.raises(PokegemmaError, match="pass --overwrite"), atomic_folder(tmp_path / "out", stage="s"):
        pass
    with atomic_folder(tmp_path / "out", stage="s", overwrite=True) as folder:
        (folder / "new.txt").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with atomic_folder(tmp_path / "out", stage="s") as folder:
        (folder / "new.txt").touch()
    assert (tmp_path / "out" / "new.txt").exists()


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "out"
    with pytest.raises(PokegemmaError, match="could not be written"), atomic_folder(path, stage="s"):
        pass


def test_a_disk_without_room_is_named_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**31, 2**30, 2**30))
    require_space(tmp_path / "not" / "there", 2**30, remedy="free some")
    with pytest.raises(PokegemmaError, match=r"there: 1\.5 GiB needed, 1\.0 GiB free on this disk; free some$"):
        require_space(tmp_path / "not" / "there", 3 * 2**29, remedy="free some")


def test_an_output_that_contains_an_input_is_refused(tmp_path: Path) -> None:
    model = tmp_path / "out" / "model"
    model.mkdir(parents=True)
    for output in (tmp_path / "out", model, tmp_path / "out" / ".." / "out"):
        with pytest.raises(PokegemmaError, match=f"--output_path {output} contains the input {model}"):
            refuse_to_replace(output, model, flag="--output_path")
    refuse_to_replace(tmp_path / "new", model, "google/gemma-3-4b-it", tmp_path / "out")


def test_a_name_on_the_hub_is_not_inside_the_output_but_a_path_to_be_made_is(tmp_path: Path) -> None:
    refuse_to_replace(Path.cwd(), "google/gemma-3-4b-it")
    with pytest.raises(PokegemmaError, match="--output_dir"):
        refuse_to_replace(tmp_path, tmp_path / "features")


def test_a_lock_is_held_until_its_block_ends(tmp_path: Path) -> None:
    with file_lock(tmp_path / "lock"), pytest.raises(BlockingIOError), file_lock(tmp_path / "lock", wait=False):
        pass
    with file_lock(tmp_path / "lock", wait=False):
        pass
