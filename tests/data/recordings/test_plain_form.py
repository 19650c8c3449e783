import json
import re

import pytest

from pokegemma.data.convert import WindowOptions
from pokegemma.data.corpus import convert_corpus
from pokegemma.data.prompts import parse_answer
from pokegemma.data.recordings.plain_form import read_plain_form
from pokegemma.data.recordings.session import SessionError
from pokegemma.data.samples import read_samples
from pokegemma.provenance import PROJECT_ROOT
from tests.conftest import frame_png, red_of


def write_plain(folder, table, *, frames=None, name="actions.csv", info=None):
    """Write a recording: `frames` are the names of its pictures (default: 1.png, 2.png, ... as many as rows)."""
    (folder / "frames").mkdir(parents=True)
    (folder / name).write_text(table, encoding="utf-8")
    rows = len(table.strip().split("\n")) - (name == "actions.csv")
    for number, frame in enumerate([f"{at}.png" for at in range(1, rows + 1)] if frames is None else frames, 1):
        (folder / "frames" / frame).write_bytes(frame_png(number))
    if info is not None:
        (folder / "session.json").write_text(json.dumps(info))
    return folder


def decisions(session):
    return [(turn.decision.status, turn.decision.pressed) for turn in session.turns]


def convert(data_dir, output):
    report = convert_corpus(data_dir, output, window=WindowOptions(), eval_fraction=0.0, num_workers=1)
    return report, list(read_samples(output / "train.jsonl"))


def test_a_table_of_actions_becomes_samples(tmp_path):
    table = "time,button,reason,situation\n0.0,UP,the door,navigation\n1.5,a,a sign,\n3,,,\n4.5,start,,menu\n"
    write_plain(tmp_path / "runs" / "monday", table, info={"goal": "leave the house", "by": "human:anna"})
    report, samples = convert(tmp_path / "runs", tmp_path / "out")
    assert [sample.id for sample in samples] == ["monday/1", "monday/2", "monday/4"]
    answers = [parse_answer(sample.output) for sample in samples]
    assert [(answer.button, answer.reasoning, answer.context) for answer in answers] == [
        ("up", "the door", "navigation"),
        ("a", "a sign", "unknown"),
        ("start", "", "menu"),
    ]
    assert samples[2].previous_buttons == ["up", "a"]
    assert samples[2].metadata["frame_turns"] == [1, 2, 3, 4]
    assert [red_of(tmp_path / "out" / frame) for frame in samples[2].frames] == [1, 2, 3, 4]
    assert {sample.metadata["goal"] for sample in samples} == {"leave the house"}
    assert {sample.metadata["label_by"] for sample in samples} == {"human:anna"}
    assert (samples[1].metadata["timestamp"], report["turns_without_sample"]["no_button"]) == ("1.5", 1)
    assert report["labels_by"] == {"human:anna": 3}


def test_the_example_of_the_documentation_runs(tmp_path, monkeypatch, capsys):
    page = (PROJECT_ROOT / "docs" / "recordings.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "docs/recordings.md", "exec"), {})
    printed = re.search(r"print\(.*\)  # (.*)", example)[1]
    assert capsys.readouterr().out == printed + "\n"
    assert (tmp_path / "my_dataset" / "train.jsonl").exists()


def test_json_lines_are_read_as_a_table_is(tmp_path):
    lines = [
        {"time": "2026-11-29T19:00:00", "button": "up", "frame": "b.png", "by": "expert"},
        {"time": "2026-11-29T19:00:03", "button": ["left", "A"], "frame": "frames/a.png", "reason": "a wall"},
        {"time": None, "button": None},
    ]
    table = "".join(json.dumps(line) + "\n" for line in lines) + '{"time": 4, "but'
    folder = write_plain(tmp_path / "s", table, name="actions.jsonl", frames=["a.png", "b.png"])
    session = read_plain_form(folder)
    assert decisions(session) == [("decision", ("up",)), ("decision", ("left", "a")), ("no_button", ())]
    assert [[frame.name for frame in turn.frames] for turn in session.turns] == [["b.png"], ["a.png"], []]
    assert session.turns[1].decision.label_by is None
    assert (session.turns[0].decision.label_by, session.turns[1].time.second) == ("expert", 3)
    assert session.problems == ("s/actions.jsonl: its last line is cut off, and is not read",)


def test_frames_belong_to_rows_in_the_order_of_their_numbers(tmp_path):
    frames = ["10.png", "2.png", "1.jpg", "notes.txt"]
    folder = write_plain(tmp_path / "s", "time,button\n0,up\n1,down\n", frames=frames)
    session = read_plain_form(folder)
    assert [turn.frames[0].name for turn in session.turns] == ["1.jpg", "2.png"]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (["0,up up a"], [("decision", ("up", "up", "a"))]),
        (['0,"up, A"'], [("decision", ("up", "a"))]),
        (["0,b+right"], [("decision", ("right", "b"))]),
        (["0,B + Right a"], [("decision", ("right", "b", "a"))]),
        (["0,l a"], [("invalid_button", ("a",))]),
        (["0,a l"], [("decision", ("a",))]),
        (["0,none", "1,NOOP", "2, "], [("no_button", ())] * 3),
        # One row a frame: the button is pressed once.
        (["0,up", "0.017,up", "0.033,up"], [("decision", ("up",)), ("held", ()), ("held", ())]),
        (["0,up", "0.017,", "0.033,up"], [("decision", ("up",)), ("no_button", ()), ("decision", ("up",))]),
        (["0,right", "0.017,b+right"], [("decision", ("right",)), ("decision", ("b",))]),
        (["0,up", "0.05,up"], [("decision", ("up",)), ("decision", ("up",))]),
        (["0,up", ",up"], [("decision", ("up",)), ("decision", ("up",))]),
        (["1,up", "0.99,up"], [("decision", ("up",)), ("decision", ("up",))]),
    ],
)
def test_several_and_held_buttons_become_decisions(tmp_path, rows, expected):
    session = read_plain_form(write_plain(tmp_path / "s", "time,button\n" + "\n".join(rows)))
    assert decisions(session) == expected


def test_rows_that_say_held_press_nothing_and_show_no_frame(tmp_path):
    table = "time,button,held\n0,up,\n1,up,yes\n2,up,no\n3,up,maybe\n4,,\n"
    session = read_plain_form(write_plain(tmp_path / "s", table))
    assert [turn.decision.status for turn in session.turns] == [
        "decision",
        "held",
        "decision",
        "malformed_turn",
        "no_button",
    ]
    assert [len(turn.frames) for turn in session.turns] == [1, 0, 1, 1, 1]
    assert "held 'maybe'" in session.turns[3].decision.problem


def test_frames_between_presses_of_a_frame_by_frame_table_are_not_shown(tmp_path):
    rows = [f"{at / 60:.3f},{'up' if at % 30 < 12 else ''}" for at in range(90)]
    write_plain(tmp_path / "runs" / "s", "time,button\n" + "\n".join(rows) + "\n")
    report, samples = convert(tmp_path / "runs", tmp_path / "out")
    assert [sample.metadata["frame_turns"] for sample in samples] == [[1, 1, 1, 1], [1, 1, 1, 31], [1, 1, 31, 61]]
    assert report["turns_without_sample"]["held"] == 33
    assert report["turns_without_sample"]["no_button"] == 54


@pytest.mark.parametrize("by", ["random", "noise"])
def test_blind_rows_are_no_samples(tmp_path, by):
    session = read_plain_form(write_plain(tmp_path / "s", f"time,button,by\n0,up,{by}\n1,up,human\n2,up,\n"))
    assert [turn.decision.status for turn in session.turns] == ["blind_press", "decision", "decision"]
    assert [turn.decision.label_by for turn in session.turns] == [by, "human", None]


def test_what_is_not_read_is_named(tmp_path):
    table = "time,button,reasn,by\n0,up,why,somebody\n1,x,,\n2,l,,\n3,x,,\n"
    write_plain(tmp_path / "runs" / "s", table + "4,a,,\n")
    report, samples = convert(tmp_path / "runs", tmp_path / "out")
    assert report["problems"] == [
        "s/actions.csv: its column 'reasn' is not read",
        "s: 3 turns press first what is none of the 8 buttons: l (1), x (2)",
        "s turn 1: by 'somebody' is unknown",
    ]
    assert [sample.metadata["turn"] for sample in samples] == [5]


def test_a_frame_that_a_row_names_stays_in_the_folder(tmp_path):
    (tmp_path / "secret.png").write_bytes(frame_png(9))
    names = ["1.png", "missing.png", "../../secret.png", str(tmp_path / "secret.png"), "a" * 5000, "a\\u0000b"]
    lines = "".join(f'{{"time": {at}, "button": "up", "frame": "{name}"}}\n' for at, name in enumerate(names))
    folder = write_plain(tmp_path / "s", lines, name="actions.jsonl", frames=["1.png"])
    assert [turn.decision.status for turn in read_plain_form(folder).turns] == ["decision"] + ["frame_missing"] * 5


@pytest.mark.parametrize(
    ("table", "frames", "problem"),
    [
        ("when,button\n0,up\n", None, "s/actions.csv: no column time; found when, button"),
        ("", [], "s/actions.csv: no column time and no column button; found none"),
        ("time,button\n0,up\n1,up\n", ["1.png"], "s: 2 actions and 1 frames; without a column 'frame' "),
        ("time,button\n0,up\n", ["1.png", "2.png", "3.png"], "s: 1 actions and 3 frames"),
        ('time,button\n0,"up\n', None, "s/actions.csv is not a table"),
        ("time,button\n0,up\x00\n", ["1.png"], None),
    ],
)
def test_a_recording_that_cannot_be_matched_is_refused(tmp_path, table, frames, problem):
    folder = write_plain(tmp_path / "s", table, frames=frames)
    if problem is None:
        assert [turn.decision.status for turn in read_plain_form(folder).turns] == ["invalid_button"]
        return
    with pytest.raises(SessionError, match=re.escape(problem)) as error:
        read_plain_form(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("info", ["{", "[]", "[" * 100_000])
def test_a_damaged_session_json_is_refused(tmp_path, info):
    folder = write_plain(tmp_path / "s", "time,button\n0,up\n")
    (folder / "session.json").write_text(info)
    with pytest.raises(SessionError, match=r"s/session\.json is not "):
        read_plain_form(folder)
