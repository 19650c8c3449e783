import json
import os
import shutil

import pytest

from pokegemma.data.convert import WindowOptions
from pokegemma.data.corpus import convert_corpus
from pokegemma.data.recordings.readers import find_recordings
from pokegemma.data.samples import read_samples
from tests.conftest import turn_record, write_session
from tests.data.test_convert import convert, folder_hashes


def find_sessions_below(folder):
    return [recording.path for recording in find_recordings(folder)]


def write_turns(folder, num_turns=3, **options):
    """Write a session; those of different length were not recorded at the same time."""
    times = [f"2025-06-25T{num_turns:02d}:00:{turn:02d}" for turn in range(num_turns)]
    turns = [turn_record(number, timestamp=time) for number, time in enumerate(times, start=1)]
    return write_session(folder, turns, **options)


# Copies


@pytest.mark.parametrize("copy", ["runs/session_a_backup", "session_z/session_a", "runs/deep/er/session_a"])
def test_a_copy_of_a_session_is_named_and_not_converted(tmp_path, copy):
    write_turns(tmp_path / "data" / "runs" / "session_a")
    write_turns(tmp_path / "data" / "runs" / "session_b", 2)
    shutil.copytree(tmp_path / "data" / "runs" / "session_a", tmp_path / "data" / copy)
    report = convert(tmp_path / "data", tmp_path / "out", eval_fraction=0.5)
    assert report["sessions"] == {"found": 3, "with_samples": 2, "without_samples": 0, "unreadable": 1}
    assert report["problems"] == [f"{copy} is a copy of runs/session_a: its 3 turns are not converted"]
    assert (report["turns"], report["samples"], len(report["per_session"])) == (5, 5, 2)
    splits = [
        {sample.session for sample in read_samples(tmp_path / "out" / f"{name}.jsonl")} for name in ("train", "eval")
    ]
    assert sorted(map(len, splits)) == [1, 1]
    stored = {path.name for path in (tmp_path / "out" / "frames").iterdir()}
    assert stored == splits[0] | splits[1]
    assert len(list((tmp_path / "out" / "grid_images").iterdir())) == 5


def test_a_copy_rewritten_with_other_spacing_and_key_order_is_a_copy(tmp_path):
    for name in ("a", "b"):
        write_turns(tmp_path / f"session_{name}", session_id="one", start_time="2025-06-25T18:00:00")
    path = tmp_path / "session_b" / "session_data.json"
    record = json.loads(path.read_text())
    record["turns"] = [dict(reversed(turn.items())) for turn in record["turns"]]
    path.write_text(json.dumps(record, indent=4))
    report = convert(tmp_path, tmp_path / "out")
    assert report["problems"] == ["session_b is a copy of session_a: its 3 turns are not converted"]


def test_sessions_without_turns_are_no_copies_of_each_other(tmp_path):
    for name in ("a", "b"):
        write_session(tmp_path / f"session_{name}", [], session_id="one")
    write_turns(tmp_path / "session_c")
    assert convert(tmp_path, tmp_path / "out")["problems"] == []


def test_with_copies_the_files_are_the_same_for_any_number_of_workers(tmp_path):
    for name, num_turns in (("a", 2), ("b", 5), ("c", 3)):
        folder = write_turns(tmp_path / "runs" / f"session_{name}", num_turns)
        shutil.copytree(folder, tmp_path / "runs" / f"session_{name}_backup")
    for num_workers in (1, 2, 5):
        convert(tmp_path / "runs", tmp_path / str(num_workers), num_workers=num_workers, eval_fraction=0.3)
    assert folder_hashes(tmp_path / "1") == folder_hashes(tmp_path / "2") == folder_hashes(tmp_path / "5")


# Folders in folders


def test_sessions_are_found_at_any_depth_in_a_fixed_order(tmp_path):
    names = ["session_b", "runs/session_a", "runs/nested/session_x", "runs/session_group/deep/any name", "a/b/c/d"]
    for name in names:
        write_turns(tmp_path / name)
    (tmp_path / "runs" / "session_crashed" / "sshots").mkdir(parents=True)
    assert [str(folder.relative_to(tmp_path)) for folder in find_sessions_below(tmp_path)] == [
        "session_b",
        "runs/session_a",
        "runs/session_crashed",
        "runs/nested/session_x",
        "a/b/c/d",
        "runs/session_group/deep/any name",
    ]


def test_symlinks_are_followed_and_never_in_circles(tmp_path):
    write_turns(tmp_path / "elsewhere" / "session_a")
    (tmp_path / "data" / "runs").mkdir(parents=True)
    for link in ("data/runs/loop", "data/runs/again", "elsewhere/session_a/loop"):
        (tmp_path / link).symlink_to(tmp_path / "data", target_is_directory=True)
    (tmp_path / "data" / "itself").symlink_to("itself")
    (tmp_path / "data" / "runs" / "session_a").symlink_to(tmp_path / "elsewhere" / "session_a")
    assert find_sessions_below(tmp_path / "data") == [tmp_path / "data" / "runs" / "session_a"]


def test_a_dataset_beside_the_sessions_is_not_taken_for_one(tmp_path):
    write_turns(tmp_path / "session_a")
    write_turns(tmp_path / "session_session_b", 2)
    for _ in range(2):
        report = convert(tmp_path, tmp_path / "session_out", overwrite=True)
        assert (report["sessions"]["found"], report["problems"]) == (2, [])
    assert (tmp_path / "session_out" / "frames" / "session_b").is_dir()


# Names


def test_folder_names_that_are_not_utf8_are_no_obstacle(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    write_turns(folder / "runs" / "session_a")
    options = {"eevee_data_dir": str(folder)}
    convert_corpus(folder, folder / "out", window=WindowOptions(), eval_fraction=0, num_workers=1, options=options)
    record = json.loads((folder / "out" / "run.json").read_text(encoding="utf-8"))
    assert record["options"]["eevee_data_dir"].endswith("caf?")
