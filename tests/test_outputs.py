"""What has its final name is whole, and nothing is overwritten unasked."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from pokegemma.errors import PokegemmaError
from pokegemma.outputs import (
    atomic_file,
    atomic_folder,
    file_lock,
    refuse_to_replace,
    require_folder,
    require_space,
)
from pokegemma.provenance import PROJECT_ROOT

ENTRIES = ("a.txt", "run.json")


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
        pytest.raises(PokegemmaError, match="not created by this script"),
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


def test_other_files_next_to_the_entries_stay(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("keep me")
    for text, overwrite in (("first", False), ("second", True)):
        with atomic_folder(tmp_path / "out", stage="s", overwrite=overwrite, entries=ENTRIES) as folder:
            (folder / "a.txt").write_text(text)
            (folder / "run.json").write_text('{"stage": "s"}')
            (folder / "left_over").touch()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"README.md", "a.txt", "run.json"}
    assert (tmp_path / "out" / "a.txt").read_text() == "second"
    with (
        pytest.raises(PokegemmaError, match=r"out/a\.txt exists"),
        atomic_folder(tmp_path / "out", stage="s", entries=ENTRIES),
    ):
        pass


def test_what_came_while_a_folder_was_written_is_not_lost(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "out", stage="s", entries=ENTRIES) as folder:
        (folder / "a.txt").touch()
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "notes").touch()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a.txt", "notes"}
    with pytest.raises(PokegemmaError, match="exists"), atomic_folder(tmp_path / "b", stage="s") as folder:
        make_result(tmp_path / "b", stage="s")
    assert (tmp_path / "b" / "old.txt").exists()


@pytest.mark.parametrize("entries", [(), ("old.txt", "run.json", "new.txt")])
def test_a_failure_while_replacing_puts_the_old_result_back(
    entries: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_result(tmp_path / "out", stage="s")
    before = sorted(tmp_path.rglob("*"))
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if "new" in path.parts and path.name == ("new.txt" if entries else "out"):
            raise OSError(5, "Input/output error")
        return rename(path, target)

    with (
        pytest.raises(PokegemmaError, match="Input/output error"),
        atomic_folder(tmp_path / "out", stage="s", overwrite=True, entries=entries) as folder,
    ):
        (folder / "new.txt").touch()
        monkeypatch.setattr(Path, "rename", fail)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("entries", [(), ("old.txt", "run.json", "new.txt")])
@pytest.mark.parametrize("error", [OSError(116, "Stale file handle"), KeyboardInterrupt()])
def test_an_old_result_that_cannot_be_put_back_is_kept_and_named(
    error: BaseException,
    entries: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    make_result(tmp_path / "out", stage="s")
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if "old" in path.parts or ("new" in path.parts and path.name == ("new.txt" if entries else "out")):
            raise error
        return rename(path, target)

    with (
        pytest.raises((PokegemmaError, KeyboardInterrupt)),
        atomic_folder(tmp_path / "out", stage="s", overwrite=True, entries=entries) as folder,
    ):
        (folder / "new.txt").touch()
        monkeypatch.setattr(Path, "rename", fail)
    (kept,) = tmp_path.rglob("old.txt")
    (old,) = (parent for parent in kept.parents if parent.name == "old")
    assert str(old) in caplog.text


@pytest.mark.parametrize("path", ["..", "../inner/..", ".", "../inner"])
def test_a_path_without_a_name_of_its_own_is_written(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    with atomic_folder(Path(path), stage="s", entries=ENTRIES) as folder:
        (folder / "a.txt").touch()
    assert [file.name for file in tmp_path.rglob("*.txt")] == ["a.txt"]
    assert not list(tmp_path.rglob(".*"))
    assert Path(path, "a.txt").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from pokegemma.outputs import atomic_folder
with atomic_folder(Path(sys.argv[1]), stage="s"):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_only_folders_of_ended_processes_are_removed(tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "out")], cwd=PROJECT_ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [path.suffix for path in tmp_path.iterdir()] == [".part"]
    with atomic_folder(tmp_path / "out", stage="s") as running:
        assert len(list(tmp_path.iterdir())) == 1
        with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "out", stage="s"):
            assert len(list(tmp_path.iterdir())) == 2
            raise ZeroDivisionError
        assert running.is_dir()


def test_what_a_killed_process_was_replacing_is_kept_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    work = tmp_path / ".out.x.part"
    make_result(work, stage="s")
    (work / "lock").touch()
    (work / "old").mkdir()
    (work / "old" / "a.txt").touch()
    with atomic_folder(tmp_path / "out", stage="s"):
        pass
    assert work.is_dir() and str(work / "old") in caplog.text


@pytest.mark.parametrize("name", [".out.x.part", "out/.out.x.part", "out/.convert.x.part"])
def test_a_killed_processs_folder_is_found_next_to_the_result_and_inside(name: str, tmp_path: Path) -> None:
    work = tmp_path / name
    work.mkdir(parents=True)
    (work / "lock").touch()
    (work / "old").mkdir()  # nothing had been moved yet
    (tmp_path / "out").mkdir(exist_ok=True)
    with atomic_folder(tmp_path / "out", stage="convert", entries=ENTRIES) as folder:
        (folder / "a.txt").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "a.txt"]


@pytest.mark.parametrize("name", [".out.x.part", "out/.out.x.part", "out/.convert.x.part"])
def test_earlier_files_of_a_killed_replacement_are_named_with_the_refusal(name: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.txt").write_text("new")  # run.json had not been moved yet
    make_result(tmp_path / name, stage="s")
    (tmp_path / name / "lock").touch()
    (tmp_path / name / "old").mkdir()
    (tmp_path / name / "old" / "a.txt").write_text("old")
    with (
        pytest.raises(PokegemmaError, match=f"not created by this script.*{name}/old"),
        atomic_folder(tmp_path / "out", stage="convert", overwrite=True, entries=ENTRIES),
    ):
        pass
    assert (tmp_path / name / "old" / "a.txt").read_text() == "old"


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


def test_a_hub_name_is_not_taken_for_a_path_inside_the_output(tmp_path: Path) -> None:
    refuse_to_replace(Path.cwd(), "google/gemma-3-4b-it")
    with pytest.raises(PokegemmaError, match="--output_dir"):
        refuse_to_replace(tmp_path, tmp_path / "features")


def test_a_lock_is_held_until_its_block_ends(tmp_path: Path) -> None:
    with file_lock(tmp_path / "lock"), pytest.raises(BlockingIOError), file_lock(tmp_path / "lock", wait=False):
        pass
    with file_lock(tmp_path / "lock", wait=False):
        pass


def test_a_shared_lock_keeps_out_who_wants_it_alone(tmp_path: Path) -> None:
    with file_lock(tmp_path / "lock", shared=True):
        with file_lock(tmp_path / "lock", wait=False, shared=True):
            pass
        with pytest.raises(BlockingIOError), file_lock(tmp_path / "lock", wait=False):
            pass
    with file_lock(tmp_path / "lock", wait=False):
        pass


def test_an_output_folder_that_is_a_file_or_in_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "a" / "b"):
        with pytest.raises(PokegemmaError, match=f"--output_dir {path}: {tmp_path / 'file'} is not a folder"):
            require_folder(path)
    require_folder(tmp_path)
    require_folder(tmp_path / "new" / "folder")
