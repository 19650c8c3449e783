import json
import os
from pathlib import Path

import pytest

from pokegemma.data.decisions import REASONS, is_failed_action, read_decision
from pokegemma.data.eevee_v1.named_pictures import NamedPictures
from pokegemma.data.eevee_v1.screenshot_numbers import number_steps
from pokegemma.data.eevee_v1.sessions import read_session
from pokegemma.data.recordings.readers import find_recordings
from pokegemma.data.recordings.session import SessionError
from pokegemma.errors import PokegemmaError
from pokegemma.provenance import PROJECT_ROOT
from tests.conftest import failed_turn, raw_frame, turn_record, write_session


def find_sessions_below(folder):
    return [recording.path for recording in find_recordings(folder)]


def statuses(session):
    return [turn.decision.status for turn in session.turns]


def frame_names(session):
    return [turn.frames[0].name if turn.frames else None for turn in session.turns]


def test_the_real_sessions_have_503_decisions_and_154_turns_without_one(real_runs):
    sessions = [read_session(folder) for folder in find_sessions_below(real_runs)]
    counted = [status for session in sessions for status in statuses(session)]
    assert (counted.count("decision"), counted.count("parse_failed"), len(counted)) == (503, 154, 657)
    assert {session.numbering for session in sessions} == {"turn"}


# What v1 pressed


@pytest.mark.parametrize(
    ("asked", "status", "pressed"),
    [
        (["up"], "decision", ("up",)),
        (["UP", "Left"], "decision", ("up", "left")),
        (["up", " right"], "decision", ("up",)),  # v1 lower-cased names, and stripped nothing
        (" right", "invalid_button", ("b",)),
        ("right", "decision", ("right",)),
        (["a", "b", "up", "down"], "decision", ("a", "b", "up")),
        (["select"], "decision", ("select",)),
        (["jump", "a", "up"], "decision", ("a", "up")),
        (["x", "y", "z", "a"], "invalid_button", ("b",)),  # the fourth is never looked at
        (["up, up"], "invalid_button", ("b",)),
        ([None, 3, {"a": 1}], "invalid_button", ("b",)),
        ([], "no_button", ("b",)),
        ("", "no_button", ("b",)),
        (None, "no_button", ("b",)),
        ({"button": "a"}, "no_button", ("b",)),
        (["b"], "decision", ("b",)),
    ],
)
def test_pressed_are_the_first_three_that_are_buttons_and_b_without_any(asked, status, pressed):
    decision = read_decision(turn_record(1, button_presses=asked))
    assert (decision.status, decision.pressed) == (status, pressed)


@pytest.mark.parametrize("text", ["API Error: 503", "Exception: boom", "No game data available"])
@pytest.mark.parametrize("place", ["raw_text", "error", "reasoning", "plain"])
def test_an_answer_that_is_an_error_is_no_decision(text, place):
    if place == "reasoning":
        record = turn_record(1, ["b"])
        record["ai_analysis"]["parsed_json"]["reasoning"] = text
    else:
        record = failed_turn(1, **{"raw_text": {"text": text}, "error": {"error": text}}.get(place, {}))
        if place == "plain":
            record["ai_analysis"] = text
    decision = read_decision(record)
    assert (decision.status, decision.pressed) == ("failed_answer", ("b",))
    assert (decision.captured is False) == text.startswith("No game data")


def test_a_pathfinding_turn_is_no_decision_and_its_moves_are_unknown():
    answer = {"pathfinding_action": "find_path", "target_x": 3, "target_y": 4, "reasoning": "walk"}
    record = turn_record(1, ["up"])
    record["ai_analysis"]["parsed_json"] = answer
    decision = read_decision(record)
    assert (decision.status, decision.pressed) == ("pathfinding", ())


def test_an_answer_without_context_detected_is_a_decision_in_an_unknown_situation():
    record = turn_record(1, "left")
    del record["ai_analysis"]["parsed_json"]["context_detected"]
    decision = read_decision(record)
    assert (decision.status, decision.situation, decision.reasoning) == ("decision", "unknown", "secret-reasoning-1")


def test_parsing_success_false_is_no_decision_even_with_buttons():
    record = turn_record(1, "left")
    record["ai_analysis"]["parsing_success"] = False
    assert read_decision(record).status == "parse_failed"


def test_an_unpublished_answer_presses_nothing_that_is_known():
    assert read_decision(failed_turn(1, button_presses=[])).pressed == ()


def test_a_failed_action_is_no_decision_and_pressed_nothing():
    decision = read_decision(turn_record(1, "left", action_result=False))
    assert (decision.status, decision.pressed) == ("action_failed", ())


@pytest.mark.parametrize(
    ("result", "failed"),
    [
        (True, False),
        (None, False),
        ("Pressed up successfully", False),
        ("Buttons sent: up", False),
        ("", False),
        ({"success": True}, False),
        ([], False),
        (1, False),
        (float("nan"), False),
        (False, True),
        (0, True),
        ("Failed to press up", True),
        ("Error: emulator not connected", True),
        ("Invalid button", True),
        ("Action could not be executed", True),
        ("Connection timed out", True),
        ("No buttons pressed", True),
        ("False", True),
        ({"success": False}, True),
        ("Pressed a: no errors", False),
        ("Successfully pressed up without error", False),
        ("Pressed a, error: none", False),
        ("Pressed b: menu closed", False),
        ("0 errors", False),
        ("Pressed a without errors, then failed", True),
        ("Not successful", True),
        ("connection lost", True),
        ("Lost connection to mGBA", True),
        ("Game is not running", True),
        ("Socket closed", True),
        ("The emulator isn't running", True),
        ("Did not press a", True),
        ("Error: no errors were logged", True),
    ],
)
def test_a_sentence_that_speaks_of_failure_is_a_failed_action(result, failed):
    assert is_failed_action(result) is failed


@pytest.mark.parametrize(
    ("analysis", "asked", "status", "reasoning"),
    [
        ('{"button_presses": ["up"], "reasoning": "why"}', ["up"], "decision", "why"),
        ('Sure:\n```json\n{"button_presses": ["b"], "reasoning": "back"}\n```', ["b"], "decision", "back"),
        ('{"pathfinding_action": "find_path", "target_x": 1}', ["b"], "pathfinding", ""),
        # Without JSON, a lone "b" may be v1's fallback; anything else it can only have read from the answer.
        ("I press up, towards the door", ["up"], "decision", "I press up, towards the door"),
        ("I can't tell", ["b"], "parse_failed", "I can't tell"),
        ("cut { off", ["b"], "parse_failed", "cut { off"),
        (None, ["a"], "decision", ""),
        (None, ["b"], "parse_failed", ""),
        (None, [], "parse_failed", ""),
        ([1], ["a"], "malformed_turn", ""),
    ],
)
def test_a_plain_text_analysis_is_a_decision_where_it_shows_one(analysis, asked, status, reasoning):
    decision = read_decision(turn_record(1, asked, ai_analysis=analysis))
    assert (decision.status, decision.reasoning) == (status, reasoning)


@pytest.mark.parametrize(("value", "kept"), [("high", "high"), (0.5, 0.5), (float("nan"), None), (10**400, None)])
def test_a_confidence_that_json_cannot_hold_is_left_out(value, kept):
    record = turn_record(1)
    record["ai_analysis"]["parsed_json"]["confidence"] = value
    assert read_decision(record).confidence == kept


# Shapes on disk


def test_the_oldest_shape_is_read(make_session):
    turns = [
        turn_record(
            turn,
            "up",
            ai_analysis="I go up",
            execution_time=1.5,
            action_result="Pressed up",
            screenshot_path=f"/home/ash/runs/x/step_{turn:04d}_grid.png",
        )
        for turn in (1, 2)
    ]
    folder = make_session(
        "old", turns, screenshots=".", turns_key="gameplay_history", session_metadata=None, enhanced_turns=None
    )
    session = read_session(folder)
    assert statuses(session) == ["decision", "decision"]
    assert frame_names(session) == ["step_0001_grid.png", "step_0002_grid.png"]
    assert session.goal == "heal your pokemon"


def test_a_session_without_turns_is_read(make_session):
    folder = make_session("empty", [], session_metadata=None, enhanced_turns=None)
    assert read_session(folder).turns == ()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'{"turns": [{"turn": 1, "ai_ana', "is cut off or not JSON (30 bytes)"),
        (b"", "is cut off or not JSON (0 bytes)"),
        (b"\xff\xfe\x00", "is cut off or not JSON (3 bytes)"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[]", "a JSON list, not an object"),
        (b'{"turns": {"1": {}}}', "turns are not a list"),
        (b'{"turns": [' + b"9" * 5000 + b"]}", "is cut off or not JSON"),
    ],
)
def test_a_broken_session_file_is_one_clear_error(tmp_path, content, problem):
    (tmp_path / "session_data.json").write_bytes(content)
    with pytest.raises(SessionError) as error:
        read_session(tmp_path)
    assert problem in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_without_session_file_is_named(tmp_path):
    with pytest.raises(SessionError, match=r"session_data.json cannot be read: No such file"):
        read_session(tmp_path)


@pytest.mark.parametrize(
    "bad",
    [
        None,
        3,
        "turn",
        [],
        {},
        {"turn": "4"},
        {"turn": -1},
        {"turn": 10**30},
        {"turn": True},
        {"turn": 2.0},
        {"turn": 1},
    ],
)
def test_a_turn_without_a_usable_number_is_malformed_and_others_are_read(make_session, bad):
    session = read_session(make_session("s", [turn_record(1), bad, turn_record(3)]))
    assert statuses(session) == ["decision", "malformed_turn", "decision"]
    assert [turn.number for turn in session.turns] == [1, None, 3]


def test_the_raw_frame_comes_before_the_screenshot(make_session):
    folder = make_session("s", [turn_record(1), turn_record(2)], enhanced_turns=[raw_frame(2, 200), None, {}, 3])
    first, second = read_session(folder).turns
    assert [Path(frame).name for frame in first.frames] == ["step_0001_grid.png"]
    assert (second.frames[0], second.frames[1].name) == (raw_frame(2, 200)["screenshot_base64"], "step_0002_grid.png")


def test_a_turn_without_a_picture_has_no_frame(make_session):
    session = read_session(make_session("s", [turn_record(1), turn_record(2)], steps=[1]))
    assert statuses(session) == ["decision", "frame_missing"]


def test_an_undecided_turn_without_a_picture_keeps_its_first_reason(make_session):
    assert statuses(read_session(make_session("s", [failed_turn(1)], steps=[]))) == ["parse_failed"]


# screenshot_path


def test_a_named_screenshot_is_found_in_the_session_by_its_file_name(make_session, tmp_path):
    paths = ["/home/ash/shots/one.png", "C:\\shots\\two.png", "../../etc/passwd", "..", "a\0b", "\ud800", "x" * 5000]
    folder = make_session("s", [turn_record(i + 1, screenshot_path=path) for i, path in enumerate(paths)], steps=[])
    (folder / "one.png").write_bytes(b"")
    (folder / "sshots" / "two.png").write_bytes(b"")
    assert frame_names(read_session(folder)) == ["one.png", "two.png", None, None, None, None, None]


def test_an_absolute_screenshot_path_is_followed_inside_the_data_folder_only(make_session, tmp_path):
    inside, outside = tmp_path / "runs" / "shots" / "one.png", tmp_path / "two.png"
    inside.parent.mkdir(parents=True)
    for path in (inside, outside):
        path.write_bytes(b"")
    turns = [
        turn_record(1, screenshot_path=str(inside)),
        turn_record(2, screenshot_path=str(outside)),
        turn_record(3, screenshot_path=str(tmp_path / "runs" / ".." / "two.png")),
    ]
    folder = make_session("s", turns, steps=[])
    assert frame_names(read_session(folder, pictures=NamedPictures(tmp_path / "runs"))) == ["one.png", None, None]
    assert frame_names(read_session(folder)) == [None, None, None]


def test_one_screenshot_named_by_several_turns_belongs_to_none(make_session):
    folder = make_session("s", [turn_record(turn, screenshot_path="latest.png") for turn in (1, 2)], steps=[])
    (folder / "latest.png").write_bytes(b"")
    assert frame_names(read_session(folder)) == [None, None]


def write_early_session(data_dir, *, paths, files):
    """Write a session of the oldest kind, whose pictures are elsewhere in the data folder."""
    turns = [turn_record(i + 1, screenshot_path=path) for i, path in enumerate(paths)]
    folder = write_session(data_dir / "runs" / "20250618_000000", turns, steps=[], turns_key="gameplay_history")
    for name in files:
        (data_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (data_dir / name).write_bytes(b"")
    return folder


@pytest.mark.parametrize(
    ("path", "files", "expected"),
    [
        ("/Users/ash/eevee/analysis/one.png", ["analysis/one.png"], "analysis/one.png"),
        ("C:\\eevee\\analysis\\one.png", ["analysis/one.png"], "analysis/one.png"),
        ("eevee/analysis/one.png", ["pictures/one.png"], "pictures/one.png"),
        ("/Users/ash/eevee/analysis/one.png", ["a/analysis/one.png", "b/one.png"], "a/analysis/one.png"),
        ("/Users/ash/a/analysis/one.png", ["a/analysis/one.png", "b/analysis/one.png"], "a/analysis/one.png"),
        ("/Users/ash/analysis/one.png", ["a/analysis/one.png", "b/analysis/one.png"], None),
        ("/Users/ash/analysis/one.png", ["a/one.png", "b/one.png"], None),
        ("/Users/ash/one.png", ["runs/20250618_000000/own/one.png", "b/one.png"], "runs/20250618_000000/own/one.png"),
        # another session's, a dataset's, one that v1 never wrote
        ("/Users/ash/one.png", ["runs/other/session_data.json", "runs/other/sshots/one.png"], None),
        ("/Users/ash/one.png", ["out/conversion_report.json", "out/frames/one.png"], None),
        ("one.png", ["analysis/one.png"], None),
    ],
)
def test_a_named_screenshot_is_found_below_the_data_folder_by_the_end_of_its_path(tmp_path, path, files, expected):
    folder = write_early_session(tmp_path, paths=[path], files=files)
    (turn,) = read_session(folder, pictures=NamedPictures(tmp_path)).turns
    assert turn.frames == (() if expected is None else (tmp_path / expected,))


def test_a_picture_that_two_turns_name_by_different_paths_belongs_to_neither(tmp_path):
    folder = write_early_session(
        tmp_path, paths=["/a/one.png", "/b/one.png", "/a/two.png"], files=["analysis/one.png", "analysis/two.png"]
    )
    assert frame_names(read_session(folder, pictures=NamedPictures(tmp_path))) == [None, None, "two.png"]


def test_a_data_folder_is_listed_once_and_only_where_a_picture_is_missing(make_session, tmp_path, monkeypatch):
    listed = []
    walk = os.walk
    monkeypatch.setattr(os, "walk", lambda root: listed.append(Path(root).name) or walk(root))
    pictures = NamedPictures(tmp_path)
    whole = make_session("s", [turn_record(1, screenshot_path="/Users/ash/analysis/one.png"), turn_record(2)])
    read_session(whole, pictures=pictures)
    assert listed == []
    early = write_early_session(tmp_path, paths=[f"/Users/ash/analysis/{n}.png" for n in range(3)], files=["x/1.png"])
    for _ in range(2):
        assert frame_names(read_session(early, pictures=pictures)) == [None, "1.png", None]
    assert listed == ["20250618_000000", tmp_path.name, "20250618_000000"]


# Step numbers


@pytest.mark.parametrize(
    ("numbers", "captured", "files", "steps", "rule"),
    [
        # nothing happened; and a crash after the fourth capture
        ([1, 2, 3], [True] * 3, [1, 2, 3], (1, 2, 3), "turn"),
        ([1, 2, 3], [True] * 3, [1, 2, 3, 4], (1, 2, 3), "turn"),
        # published sessions: turn 3 was left out, and its screenshot too
        ([1, 2, 4, 5], [True] * 4, [1, 2, 4, 5], (1, 2, 4, 5), "turn"),
        # paused at turn 3; paused for long; paused, then a crash after a capture
        ([1, 2, 4, 5], [True] * 4, [1, 2, 3, 4], (1, 2, 3, 4), "ordinal"),
        ([1, 2, 40, 41], [True] * 4, [1, 2, 3, 4], (1, 2, 3, 4), "ordinal"),
        ([1, 2, 4, 5], [True] * 4, [1, 2, 3, 4, 5], (1, 2, 3, 4), "ordinal"),
        # the capture of turn 2 failed, certainly or (no visual analysis, an error) perhaps; the same and a crash
        ([1, 2, 3, 4], [True, False, True, True], [1, 2, 3], (1, None, 2, 3), "ordinal"),
        ([1, 2, 3, 4], [True, None, True, True], [1, 2, 3], (1, None, 2, 3), "ordinal"),
        ([1, 2, 3, 4], [True, False, True, True], [1, 2, 3, 4], (1, None, 2, 3), "ordinal"),
        # an answer failed, but its screen was captured
        ([1, 2, 3, 4], [True, None, True, True], [1, 2, 3, 4], (1, 2, 3, 4), "turn"),
        # a screenshot was lost: with and without a pause
        ([1, 2, 3, 4], [True] * 4, [1, 3, 4], (1, None, 3, 4), "turn"),
        ([1, 2, 3, 4], [True] * 4, [1, 2, 3], (1, 2, 3, None), "turn"),
        ([1, 2, 3, 5, 6], [True] * 5, [1, 2, 4, 5], (1, 2, None, 4, 5), "ordinal"),
        # left out or paused, and one lost: only turns 1 and 2 are certain
        ([1, 2, 4, 5], [True] * 4, [1, 2, 4], (1, 2, None, None), "ambiguous"),
        ([1, 2], [True] * 2, [], (None, None), "none"),
        ([], [], [1], (), "turn"),
    ],
)
def test_step_numbers_are_matched_to_turns(numbers, captured, files, steps, rule):
    numbering = number_steps(numbers, captured, files)
    assert (numbering.steps, numbering.rule) == (steps, rule)


def test_frames_after_a_failed_capture_belong_to_the_right_turns(make_session):
    turns = [turn_record(1), failed_turn(2, text="No game data"), turn_record(3)]
    assert frame_names(read_session(make_session("s", turns, steps=[1, 2]))) == [
        "step_0001_grid.png",
        None,
        "step_0002_grid.png",
    ]


# Finding sessions


def test_sessions_are_found_from_runs_its_parent_or_one_session(tmp_path):
    folders = [write_session(tmp_path / "runs" / f"session_{name}", [turn_record(1)]) for name in ("b", "a")]
    (tmp_path / "runs" / "notes").mkdir()
    (tmp_path / "runs" / "session_crashed").mkdir()
    expected = [tmp_path / "runs" / f"session_{name}" for name in ("a", "b", "crashed")]
    assert find_sessions_below(tmp_path / "runs") == expected
    assert find_sessions_below(tmp_path) == expected
    assert find_sessions_below(folders[0]) == [folders[0]]


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_a_folder_without_sessions_is_a_user_error(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(PokegemmaError, match=r"no such folder|no session found"):
        find_recordings(tmp_path / name)


def test_every_reason_is_documented_in_the_sample_format():
    text = (PROJECT_ROOT / "docs" / "format_spec.md").read_text(encoding="utf-8")
    assert [reason for reason in REASONS if f"`{reason}`" not in text] == []


def test_text_with_a_lone_surrogate_can_be_written(make_session):
    folder = make_session("s", [turn_record(1)])
    path = folder / "session_data.json"
    record = json.loads(path.read_text())
    record["session_metadata"]["goal"] = "go \ud800 north 😀"
    path.write_text(json.dumps(record))
    assert read_session(folder).goal == "go ? north 😀"
