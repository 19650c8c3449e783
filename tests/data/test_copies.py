"""Two folders with the same play: which is kept, and what is only similar."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pokegemma.data.copies import Fingerprint, Play, find_copies
from tests.conftest import frame_png, raw_frame, turn_record, write_session
from tests.data.test_convert import convert, folder_hashes


def recorded(num_turns: int, *, minute: int = 0) -> list[dict[str, Any]]:
    """Return the turns of a player who stands still and presses A."""
    return [
        turn_record(turn, "a", timestamp=f"2025-06-25T18:{minute:02d}:{turn:02d}.{turn:06d}")
        for turn in range(1, num_turns + 1)
    ]


def kept_turns(output: Path) -> dict[str, int]:
    """Return the number of samples of each session that was converted."""
    report = json.loads((output / "conversion_report.json").read_text())
    return {session["session"]: session["samples"] for session in report["per_session"]}


@pytest.mark.parametrize(
    "change",
    [
        {"session_id": "other"},
        {"start_time": "2024-01-01T00:00:00"},
        {"goal": "become champion"},
        {"session_id": None, "start_time": None, "session_metadata": None},
    ],
)
def test_a_copy_with_another_id_start_or_goal_is_a_copy(tmp_path: Path, change: dict[str, Any]) -> None:
    write_session(tmp_path / "session_a", recorded(3))
    write_session(tmp_path / "session_b", recorded(3), **change)
    report = convert(tmp_path, tmp_path / "out")
    first, second = ("a", "b") if "a" in kept_turns(tmp_path / "out") else ("b", "a")
    assert report["problems"] == [f"session_{second} is a copy of session_{first}: its 3 turns are not converted"]
    assert report["sessions"] == {"found": 2, "with_samples": 1, "without_samples": 0, "unreadable": 1}


def test_the_choice_between_copies_does_not_depend_on_folder_names(tmp_path: Path) -> None:
    kept = set()
    for number, names in enumerate(itertools.permutations("abc")):
        runs = tmp_path / str(number)
        records = dict(zip(names, (("1", "heal"), ("2", "heal"), ("1", "win")), strict=True))
        for name, (session_id, goal) in records.items():
            write_session(runs / f"session_{name}", recorded(3), goal=goal, session_id=session_id)
        convert(runs, runs / "out")
        kept |= {records[name] for name in kept_turns(runs / "out")}
    assert len(kept) == 1


@pytest.mark.parametrize("names", [("a", "b", "c"), ("b", "c", "a"), ("c", "a", "b")])
def test_of_a_session_and_its_beginnings_the_longest_is_kept(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name, num_turns in zip(names, (2, 7, 4), strict=True):
        write_session(tmp_path / f"session_{name}", recorded(num_turns), session_id="one")
    report = convert(tmp_path, tmp_path / "out", eval_fraction=0.5)
    short, whole, middle = names
    assert kept_turns(tmp_path / "out") == {whole: 7}
    assert sorted(report["problems"]) == sorted(
        f"session_{name} is a copy of session_{whole} (7 turns): its {num_turns} turns are not converted"
        for name, num_turns in ((short, 2), (middle, 4))
    )
    assert [path.name for path in (tmp_path / "out" / "frames").iterdir()] == [whole]


def test_a_shorter_session_under_another_id_is_a_copy(tmp_path: Path) -> None:
    write_session(tmp_path / "session_a", recorded(5))
    turns = [{**turn, "screenshot_path": f"/backup/{turn['turn']}.png", "reviewed": True} for turn in recorded(3)]
    write_session(tmp_path / "session_b", turns, start_time=None)
    convert(tmp_path, tmp_path / "out")
    assert kept_turns(tmp_path / "out") == {"a": 5}


def test_the_copy_with_complete_pictures_is_kept_even_if_it_has_fewer_turns(tmp_path: Path) -> None:
    write_session(tmp_path / "session_a", recorded(7), steps=[])
    write_session(tmp_path / "session_b", recorded(6))
    cut_off = tmp_path / "session_b" / "sshots" / "step_0006_grid.png"
    cut_off.write_bytes(cut_off.read_bytes()[:60])
    write_session(tmp_path / "session_c", recorded(4))
    convert(tmp_path, tmp_path / "out")
    assert kept_turns(tmp_path / "out") == {"b": 5}


@pytest.mark.parametrize(("with_raw", "without"), [("a", "b"), ("b", "a")])
def test_of_two_copies_the_one_with_raw_frames_is_kept(tmp_path: Path, with_raw: str, without: str) -> None:
    raw = [raw_frame(turn, 50 + turn) for turn in (1, 2, 3)]
    write_session(tmp_path / f"session_{with_raw}", recorded(3), session_id="x", enhanced_turns=raw)
    write_session(tmp_path / f"session_{without}", recorded(3), session_id="x")
    convert(tmp_path, tmp_path / "out")
    assert kept_turns(tmp_path / "out") == {with_raw: 3}


def test_plays_that_are_only_similar_are_all_kept(tmp_path: Path) -> None:
    """Same answers and pictures at another time; same times with another picture, button or text; no times at all."""
    write_session(tmp_path / "session_a", recorded(4))
    write_session(tmp_path / "session_later", recorded(4, minute=1))
    write_session(tmp_path / "session_other_pictures", recorded(4))
    for step in range(1, 5):
        path = tmp_path / "session_other_pictures" / "sshots" / f"step_{step:04d}_grid.png"
        path.write_bytes(frame_png(100 + step))
    turns = recorded(4)
    turns[1] = turn_record(2, "b", timestamp=turns[1]["timestamp"])
    write_session(tmp_path / "session_other_button", turns)
    turns = recorded(4)
    turns[3]["ai_analysis"]["raw_text"] = "Another thought."
    write_session(tmp_path / "session_other_text", turns)
    for name, num_turns in (("no_times", 4), ("no_times_shorter", 3)):
        turns = [{**turn, "timestamp": None} for turn in recorded(num_turns)]
        write_session(tmp_path / f"session_{name}", turns)
    report = convert(tmp_path, tmp_path / "out")
    assert report["problems"] == []
    assert len(kept_turns(tmp_path / "out")) == 7


@pytest.mark.parametrize("raw", [False, True])
def test_one_other_picture_at_the_end_makes_another_play(tmp_path: Path, raw: bool) -> None:
    for name, last in (("a", 3), ("b", 77)):
        frames = [raw_frame(turn, value) for turn, value in ((1, 1), (2, 2), (3, last))] if raw else []
        write_session(tmp_path / f"session_{name}", recorded(3), session_id=name, enhanced_turns=frames)
        (tmp_path / f"session_{name}" / "sshots" / "step_0003_grid.png").write_bytes(frame_png(last))
    convert(tmp_path, tmp_path / "out")
    assert kept_turns(tmp_path / "out") == {"a": 3, "b": 3}


@pytest.mark.parametrize("num_raw", [0, 3, 4])
def test_a_beginning_without_all_raw_frames_is_a_copy(tmp_path: Path, num_raw: int) -> None:
    """v1 wrote a turn first and its raw frame afterwards; and people take the raw frames out, which are large."""
    raw = [raw_frame(turn, 50 + turn) for turn in range(1, 7)]
    write_session(tmp_path / "session_a", recorded(6), enhanced_turns=raw)
    write_session(tmp_path / "session_b", recorded(4), enhanced_turns=raw[:num_raw])
    report = convert(tmp_path, tmp_path / "out")
    assert report["problems"] == ["session_b is a copy of session_a (6 turns): its 4 turns are not converted"]


def test_a_copy_of_a_copy_names_the_one_that_is_kept() -> None:
    def play(record: str, *turns: str, num_samples: int = 1) -> Play:
        return Play(Fingerprint(record, "", turns, dated=True), num_samples, [None] * len(turns))

    plays = [play("short", "1"), play("whole", "1", "2", num_samples=2), play("short", "1"), play("else", "0")]
    assert find_copies(plays) == {0: 1, 2: 1}


def test_the_real_sessions_with_copies_convert_to_the_same_bytes_as_without(tmp_path: Path, real_runs: Path) -> None:
    folders = sorted(real_runs.iterdir())[:6]
    for folder in folders:
        shutil.copytree(folder, tmp_path / "runs" / folder.name)
    convert(tmp_path / "runs", tmp_path / "alone", eval_fraction=0.3)
    for folder in folders:
        backup = tmp_path / "runs" / f"{folder.name}_backup"
        shutil.copytree(folder, backup)
        record = json.loads((backup / "session_data.json").read_text())
        record |= {"session_id": "edited", "start_time": "2020-01-01T00:00:00"}
        record["turns"] = record["turns"][:-1]
        (backup / "session_data.json").write_text(json.dumps(record))
    report = convert(tmp_path / "runs", tmp_path / "with_copies", eval_fraction=0.3, num_workers=2)
    assert report["sessions"]["unreadable"] == 6
    alone, with_copies = (folder_hashes(tmp_path / name) for name in ("alone", "with_copies"))
    assert alone.pop("conversion_report.json") != with_copies.pop("conversion_report.json")
    assert alone == with_copies
