import errno
import json
import os
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from PIL import Image

from pokegemma.data.eevee_v1.sessions import read_session
from pokegemma.errors import PokegemmaError
from pokegemma.play.recording.journal import PlayedTurn, SessionJournal, new_session_folder

START = datetime(2026, 11, 29, 19, 0)
FACTS = {"emulator": "toy 1", "timing": {"hold_frames": 12}, "player": "expert", "seed": 3}


def screen(number):
    return Image.new("RGB", (240, 160), (number % 256, 10, 20))


def played(number, button="up", **changes):
    values = {
        "time": START + timedelta(seconds=number),
        "button": button,
        "pressed": (button,),
        "probabilities": [0.5, 0.1, 0.1, 0.1, 0.1, 0.05, 0.03, 0.02],
        "reasoning": f"reason {number}",
        "situation": "navigation",
        "decided_by": "model:tiny",
    }
    return PlayedTurn(number, **(values | changes))


def add(journal, number, **changes):
    journal.begin(screen(number))
    journal.record(played(number, **changes))


def record(folder, numbers, **changes):
    with SessionJournal(folder, goal="leave the house", facts=FACTS) as journal:
        for number in numbers:
            add(journal, number, **changes)


def test_a_recorded_session_is_one_of_eevee_v1(tmp_path):
    folder = tmp_path / "session_20261129_190000"
    record(folder, range(1, 6))
    session = read_session(folder)
    assert session.goal == "leave the house"
    assert [turn.number for turn in session.turns] == [1, 2, 3, 4, 5]
    assert [turn.decision.pressed for turn in session.turns] == [("up",)] * 5
    assert session.turns[2].time == START + timedelta(seconds=3)
    assert session.turns[2].decision.confidence == 0.5
    with Image.open(session.turns[4].frames[0]) as picture:
        assert picture.getpixel((0, 0)) == (5, 10, 20)
    stored = json.loads((folder / "session_data.json").read_text())
    assert (stored["facts"], stored["session_id"]) == (FACTS, "20261129_190000")
    assert stored["session_metadata"]["status"] == "done"
    assert stored["session_metadata"]["total_turns"] == 5


def test_session_data_is_written_when_the_turns_have_doubled_and_later_turns_are_in_the_journal(tmp_path):
    journal = SessionJournal(tmp_path / "s", goal="g", facts={})
    for number in range(1, 8):
        add(journal, number)
    assert len(json.loads((tmp_path / "s" / "session_data.json").read_text())["turns"]) == 4
    assert len(read_session(tmp_path / "s").turns) == 7
    journal.close()
    assert len(json.loads((tmp_path / "s" / "session_data.json").read_text())["turns"]) == 7


def test_every_cut_of_the_journal_loses_only_what_is_cut(tmp_path):
    folder = tmp_path / "session_s"
    record(folder, range(1, 5))
    content = (folder / "journal.jsonl").read_bytes()
    ends = [at + 1 for at, byte in enumerate(content) if byte == 10]
    (folder / "session_data.json").unlink()
    for size in range(ends[0], len(content), 7):
        (folder / "journal.jsonl").write_bytes(content[:size])
        session = read_session(folder)
        assert len(session.turns) == sum(end <= size for end in ends) - 1
        assert bool(session.problems) == (size not in ends)


def test_zeros_after_a_power_failure_are_cut_off(tmp_path):
    record(tmp_path / "s", range(1, 4))
    with open(tmp_path / "s" / "journal.jsonl", "ab") as file:
        file.write(b"\0" * 100 + b"\n" + b"\0" * 30)
    session = read_session(tmp_path / "s")
    assert (len(session.turns), len(session.problems)) == (3, 1)
    record(tmp_path / "s", [4])
    assert [turn.number for turn in read_session(tmp_path / "s").turns] == [1, 2, 3, 4]


def test_a_damaged_line_in_the_middle_is_named_and_counted(tmp_path):
    record(tmp_path / "s", range(1, 6))
    lines = (tmp_path / "s" / "journal.jsonl").read_bytes().split(b"\n")
    lines[3] = lines[3][:50]
    (tmp_path / "s" / "journal.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "s" / "session_data.json").unlink()
    session = read_session(tmp_path / "s")
    assert [turn.number for turn in session.turns] == [1, 2, None, 4, 5]
    assert session.turns[2].decision.status == "malformed_turn"
    assert session.problems == ("s/journal.jsonl line 4: not JSON",)


def test_a_cut_session_file_is_read_from_the_journal(tmp_path):
    record(tmp_path / "s", range(1, 6))
    content = (tmp_path / "s" / "session_data.json").read_bytes()
    (tmp_path / "s" / "session_data.json").write_bytes(content[:200])
    session = read_session(tmp_path / "s")
    assert len(session.turns) == 5
    assert "s/session_data.json is cut off" in session.problems[0]


def test_opening_a_session_again_continues_it(tmp_path):
    journal = SessionJournal(tmp_path / "s", goal="leave the house", facts=FACTS)
    for number in (1, 2, 3):
        add(journal, number)
    journal._open.close()  # as a crash does: the lock is free, and nothing was written
    (tmp_path / "s" / "sshots" / "step_0004_grid.png").write_bytes(b"half a picture")
    with SessionJournal(tmp_path / "s", goal="leave the house", facts=FACTS | {"seed": 4}) as journal:
        assert journal.num_turns == 3
        add(journal, 4)
        add(journal, 5)
    stored = json.loads((tmp_path / "s" / "session_data.json").read_text())
    assert [(turn["turn"], turn.get("new_start")) for turn in stored["turns"]] == [
        (1, None),
        (2, None),
        (3, None),
        (4, True),
        (5, None),
    ]
    assert (stored["resumed"][0]["turn"], stored["resumed"][0]["facts"]["seed"]) == (4, 4)
    assert len(read_session(tmp_path / "s").turns[3].frames) == 1


def test_corrections_in_session_data_survive_more_turns(tmp_path):
    record(tmp_path / "s", range(1, 4))
    path = tmp_path / "s" / "session_data.json"
    stored = json.loads(path.read_text())
    stored["turns"][1]["correction"] = {"button": "left", "by": "human"}
    path.write_text(json.dumps(stored))
    record(tmp_path / "s", range(4, 9))
    turns = json.loads(path.read_text())["turns"]
    assert (turns[1]["correction"]["button"], len(turns)) == ("left", 8)


def test_one_process_records_at_a_time(tmp_path):
    with (
        SessionJournal(tmp_path / "s", goal="g", facts={}),
        pytest.raises(PokegemmaError, match="s is being recorded by another process"),
    ):
        SessionJournal(tmp_path / "s", goal="g", facts={})
    SessionJournal(tmp_path / "s", goal="g", facts={}).close()


def test_other_sessions_are_not_continued(tmp_path):
    record(tmp_path / "mine", [1])
    with pytest.raises(PokegemmaError, match="mine has the goal 'leave the house', not 'win'"):
        SessionJournal(tmp_path / "mine", goal="win", facts={})
    (tmp_path / "v1").mkdir()
    (tmp_path / "v1" / "session_data.json").write_text('{"turns": []}')
    with pytest.raises(PokegemmaError, match="v1 contains a session without a journal"):
        SessionJournal(tmp_path / "v1", goal="g", facts={})
    assert not (tmp_path / "v1" / "journal.jsonl").exists()


@pytest.mark.parametrize(
    "changes", [{"button": "jump"}, {"pressed": ("UP",)}, {"decided_by": "somebody"}, {"decided_by": ""}]
)
def test_a_wrong_turn_is_refused(changes):
    with pytest.raises(ValueError, match="turn 7: "):
        played(7, **changes)


def test_a_turn_follows_the_one_before(tmp_path):
    with SessionJournal(tmp_path / "s", goal="g", facts={}) as journal:
        add(journal, 1)
        for number in (1, 3):
            with pytest.raises(ValueError, match=f"turn {number} does not follow turn 1"):
                add(journal, number)


def test_the_screen_of_a_turn_that_did_not_end_is_removed(tmp_path):
    with SessionJournal(tmp_path / "s", goal="g", facts={}) as journal:
        add(journal, 1)
        journal.begin(screen(2))
    assert [path.name for path in (tmp_path / "s" / "sshots").iterdir()] == ["step_0001_grid.png"]


def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    write = os.write
    with SessionJournal(tmp_path / "s", goal="g", facts={}) as journal:
        add(journal, 1)
        monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:40]))
        with pytest.raises(OSError, match=r"No space left on device.*journal\.jsonl"):
            add(journal, 2)
        monkeypatch.undo()
        add(journal, 2)
    session = read_session(tmp_path / "s")
    assert ([turn.number for turn in session.turns], session.problems) == ([1, 2], ())


def test_a_turn_that_cannot_be_synced_is_reported_with_the_next(tmp_path, monkeypatch):
    sync = os.fsync

    def fail(file):
        if Path(f"/proc/self/fd/{file}").readlink().name == "step_0003_grid.png":
            raise OSError(errno.EIO, "Input/output error")
        sync(file)

    monkeypatch.setattr(os, "fsync", fail)
    with SessionJournal(tmp_path / "s", goal="g", facts={}) as journal:
        for number in (1, 2, 3):
            add(journal, number)
        with pytest.raises(OSError, match=r"Input/output error.*step_0003_grid\.png"):
            add(journal, 4)


def test_each_turn_is_synced_picture_first(tmp_path, monkeypatch):
    synced, sync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(Path(f"/proc/self/fd/{file}").readlink()), sync(file)))
    with SessionJournal(tmp_path / "s", goal="g", facts={}) as journal:
        for number in (1, 2, 3):
            add(journal, number)
    names = [path.name for path in synced if not path.name.endswith(".part")]
    assert names == [name for number in (1, 2, 3) for name in (f"step_{number:04d}_grid.png", "journal.jsonl")]


def test_new_sessions_have_new_folders(tmp_path):
    first = new_session_folder(tmp_path)
    first.mkdir()
    assert new_session_folder(tmp_path) != first
    assert first.name.startswith("session_20")
