import json
import os

import pytest

from pokegemma.data.convert import WindowOptions
from pokegemma.data.corpus import convert_corpus
from pokegemma.data.recordings.readers import find_recordings, read_recordings
from pokegemma.errors import PokegemmaError
from tests.conftest import frame_png, turn_record, write_session
from tests.processes import call_script


def write_all_kinds(runs):
    """Write a recording of each kind, of two turns each."""
    write_session(runs / "session_v1", [turn_record(1), turn_record(2)])
    plain = runs / "deep" / "plain"
    (plain / "frames").mkdir(parents=True)
    (plain / "actions.csv").write_text("time,button\n0,up\n1,a\n")
    log = runs / "harness" / "walk.jsonl"
    (log.parent / "screenshots").mkdir(parents=True)
    log.write_text("".join(json.dumps({"step": step, "action": "left"}) + "\n" for step in (1, 2)))
    for step in (1, 2):
        (plain / "frames" / f"{step}.png").write_bytes(frame_png(step))
        (log.parent / "screenshots" / f"{step}.png").write_bytes(frame_png(10 + step))


def test_one_dataset_comes_from_all_kinds_of_recordings(tmp_path):
    write_all_kinds(tmp_path / "runs")
    report = convert_corpus(
        tmp_path / "runs", tmp_path / "out", window=WindowOptions(), eval_fraction=0.0, num_workers=2
    )
    assert report["samples"] == 6
    assert [session["session"] for session in report["per_session"]] == ["v1", "plain", "walk"]
    # The dataset and its files are no recordings.
    assert len(find_recordings(tmp_path)) == 3


def test_read_returns_the_sessions_of_a_folder(tmp_path):
    write_all_kinds(tmp_path)
    assert [[turn.decision.label for turn in session.turns] for session in read_recordings(tmp_path)] == [
        ["up", "up"],
        ["up", "a"],
        ["left", "left"],
    ]


def test_sessions_of_pokegemma_are_found_by_their_journal_alone(tmp_path):
    (tmp_path / "session_s").mkdir()
    (tmp_path / "session_s" / "journal.jsonl").write_text('{"session": {"goal": "g"}}\n')
    (session,) = read_recordings(tmp_path)
    assert (session.goal, session.turns) == ("g", ())


def test_an_unknown_folder_is_refused_with_what_is_read_and_what_was_found(tmp_path):
    (tmp_path / "videos").mkdir()
    for name in ("a.mp4", "b.MP4", "videos/c.json", "README", "data.jsonl"):
        (tmp_path / name).write_text('{"step": 1, "loss": 0.5}\n')
    done = call_script("convert_eevee_data_v2", "--recordings_dir", tmp_path, "--output_dir", tmp_path / "out")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    for text in ("session_data.json", "actions.csv", "*.jsonl", "docs/recordings.md", "Found: 2 .mp4, 1 "):
        assert text in done.stderr
    assert "1 .json" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("lines", "is_log"),
    [
        (['{"step": 1, "action": "up", "screenshot": "x.png"}'], True),
        (['{"goal": "win"}', '{"step": 1, "action": "up", "screenshot": "x.png"}'], True),
        (['{"step": 1, "action": "up"}'], False),
        (['{"action": "up", "screenshot": "x.png"}'], False),
        (['{"step": 1, "screenshot": "x.png"}'], False),
        (['{"step": 1, "loss": 2.5}'], False),
        (["not JSON"], False),
        (["[" * 100_000], False),
        ([], False),
    ],
)
def test_a_log_is_known_by_its_first_lines(tmp_path, lines, is_log):
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + "\n")
    if is_log:
        assert [recording.path.name for recording in find_recordings(tmp_path)] == ["log.jsonl"]
    else:
        with pytest.raises(PokegemmaError, match="no session found"):
            find_recordings(tmp_path)


def test_a_damaged_recording_is_named_and_the_others_are_converted(tmp_path):
    write_all_kinds(tmp_path / "runs")
    (tmp_path / "runs" / "deep" / "plain" / "frames" / "1.png").unlink()
    report = convert_corpus(
        tmp_path / "runs", tmp_path / "out", window=WindowOptions(), eval_fraction=0.0, num_workers=1
    )
    assert (report["samples"], report["sessions"]["unreadable"]) == (4, 1)
    assert "plain: 2 actions and 1 frames" in report["problems"][0]


def test_pipes_and_links_to_nothing_are_no_recordings(tmp_path):
    write_all_kinds(tmp_path)
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    assert len(find_recordings(tmp_path)) == 3
