import base64
import json
from pathlib import Path

import pytest

from pokegemma.data.convert import WindowOptions
from pokegemma.data.corpus import convert_corpus
from pokegemma.data.prompts import parse_answer
from pokegemma.data.recordings.trajectory_log import read_trajectory_log
from pokegemma.data.samples import read_samples
from tests.conftest import frame_png, red_of


def press(*buttons, name="press_buttons", key="args", **arguments):
    return {"name": name, key: {"buttons": list(buttons), **arguments}}


def pokeagent_step(step, *calls, **changes):
    """Return a line of trajectory_history.jsonl as PokéAgent writes it."""
    return {
        "step": step,
        "timestamp": f"2026-04-08T19:57:{step % 60:02d}.120000",
        "reasoning": "Executed press_buttons",
        "action": {"type": "tool_calls", "tool_calls": list(calls)},
        "pre_state": {"location": "ROUTE 101", "player_coords": [12, 7], "context": "overworld", "is_in_battle": False},
        "outcome": {"success": True},
        "location": "ROUTE 101",
        **changes,
    }


def write_log(path, records, *, pictures=None):
    """Write a log and screenshots/step_NNNNN.png; `pictures` are step numbers, each the red of its picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in records))
    for step in pictures or ():
        (path.parent / "screenshots").mkdir(exist_ok=True)
        (path.parent / "screenshots" / f"step_{step:05d}.png").write_bytes(frame_png(step))
    return path


def read(tmp_path, records, *, pictures=(1, 2, 3, 4)):
    return read_trajectory_log(write_log(tmp_path / "run" / "log.jsonl", records, pictures=pictures))


def outcomes(session):
    return [(turn.decision.status, turn.decision.pressed) for turn in session.turns]


def as_base64(value):
    return base64.b64encode(frame_png(value)).decode()


def test_a_log_of_pokeagent_becomes_samples(tmp_path):
    records = [
        pokeagent_step(5, press("UP", "UP", reasoning="ANALYZE: the way is free")),
        pokeagent_step(6, {"name": "add_memory", "args": {"text": "a"}}),
        pokeagent_step(7, {"name": "get_game_state", "args": {}}, press("A")),
        pokeagent_step(8, {"name": "navigate_to", "args": {"x": 3, "y": 4}}, press("B")),
        pokeagent_step(9, press("LEFT"), {"name": "navigate_to", "args": {"x": 3, "y": 4}}, press("B")),
    ]
    log = tmp_path / "runs" / "run_20260408" / "trajectory_history.jsonl"
    write_log(log, records, pictures=range(5, 10))
    report = convert_corpus(
        tmp_path / "runs", tmp_path / "out", window=WindowOptions(), eval_fraction=0.0, num_workers=1
    )
    samples = list(read_samples(tmp_path / "out" / "train.jsonl"))
    assert [sample.id for sample in samples] == ["run_20260408/5", "run_20260408/7", "run_20260408/9"]
    answers = [parse_answer(sample.output) for sample in samples]
    assert [(answer.button, answer.reasoning, answer.context) for answer in answers] == [
        ("up", "ANALYZE: the way is free", "overworld"),
        ("a", "Executed press_buttons", "overworld"),
        ("left", "Executed press_buttons", "overworld"),
    ]
    assert samples[2].previous_buttons == ["up", "up", "a"]
    assert red_of(tmp_path / "out" / samples[1].frames[-1]) == 7
    assert (report["turns_without_sample"]["no_button"], report["turns_without_sample"]["pathfinding"]) == (1, 1)
    assert report["labels_by"] == {"model": 3}


@pytest.mark.parametrize(
    ("action", "pressed"),
    [
        ({"action": "UP"}, ("up",)),
        ({"actions": ["up", "a"]}, ("up", "a")),
        ({"action": {"button": "left", "hold_frames": 30}}, ("left",)),
        ({"action": {"type": "press", "button": "Start"}}, ("start",)),
        ({"action": {"buttons": [["b", "right"], "a"]}}, ("right", "b", "a")),
        ({"action": [{"button": "up", "frames": 8}, {"button": "down", "frames": 8}]}, ("up", "down")),
        ({"decision": {"chosen": {"action": "down"}}}, ("down",)),
        ({"tool_call": press("a", key="input")}, ("a",)),
        ({"tool_calls": [press("a", key="input"), press("b", key="input")]}, ("a", "b")),
        ({"tool_calls": [{"function": {"name": "press_button", "arguments": '{"button": "select"}'}}]}, ("select",)),
    ],
)
def test_an_action_is_found_wherever_it_is(tmp_path, action, pressed):
    # The state lists actions that are possible: they are not the one that was taken.
    session = read(tmp_path, [{"step": 1, "state": {"actions": ["start", "select"]}, **action}])
    assert outcomes(session) == [("decision", pressed)]


@pytest.mark.parametrize(
    "shown",
    [
        {"screenshot": as_base64(77)},
        {"screenshot_base64": "data:image/png;base64," + as_base64(77)},
        {"pre_state": {"image": {"data": as_base64(77)}}},
        {"observation": {"screenshot_path": "pictures/seen.png"}},
        {"screenshot": "/home/anna/run/screenshots/seen.png"},
        {"screenshot": "C:\\run\\seen.png"},
        {"post_state": {"screenshot": as_base64(9)}, "state": {"view": {"frame": "seen.png"}}},
    ],
)
def test_a_screenshot_is_found_wherever_it_is(tmp_path, shown):
    for name in ("pictures/seen.png", "screenshots/seen.png", "seen.png"):
        path = tmp_path / "runs" / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(frame_png(77))
    write_log(tmp_path / "runs" / "run" / "log.jsonl", [{"step": 1, "action": "up", **shown}])
    convert_corpus(tmp_path / "runs", tmp_path / "out", window=WindowOptions(), eval_fraction=0.0, num_workers=1)
    (sample,) = read_samples(tmp_path / "out" / "train.jsonl")
    assert red_of(tmp_path / "out" / sample.frames[-1]) == 77


@pytest.mark.parametrize(
    "shown",
    [
        {},
        {"result": {"screenshot": as_base64(9)}},
        {"screenshot": "../secret.png"},
        {"screenshot": "x" * 5000 + ".png"},
    ],
)
def test_a_screenshot_after_the_action_or_outside_the_folder_is_never_shown(tmp_path, shown):
    (tmp_path / "secret.png").write_bytes(frame_png(9))
    session = read(tmp_path, [{"step": 7, "action": "up", **shown}])
    assert [turn.decision.status for turn in session.turns] == ["frame_missing"]


def test_what_a_line_lacks_is_named(tmp_path):
    records = [
        {"goal": "win", "model": "gemini-3"},
        {"step": 1, "action": "up"},
        {"step": 2},
        {"step": "3", "action": "up"},
        {"action": "up"},
        {"step": 4, "action": {"button": 5}},
        "not JSON",
        [1],
        {"step": 5, "action": "x"},
    ]
    session = read(tmp_path, records)
    assert [turn.decision.status for turn in session.turns] == [
        "decision",
        *["malformed_turn"] * 6,
        "invalid_button",
    ]
    assert [turn.decision.problem for turn in session.turns[1:5]] == [
        "no action",
        "step '3' is not a whole number",
        "no step",
        "'5' is not a button",
    ]
    assert (session.goal, session.turns[0].decision.label_by) == ("win", "model:gemini-3")
    assert session.problems == (
        "log.jsonl line 7: not JSON",
        "run: 1 turns press first what is none of the 8 buttons: x (1)",
    )


def test_a_resumed_run_starts_anew_and_shows_a_picture_once(tmp_path):
    session = read(tmp_path, [{"step": step, "action": "up"} for step in (1, 2, 3, 2, 3, 4)])
    assert [turn.number for turn in session.turns] == [1, 2, 3, 4, 5, 6]
    assert [turn.new_start for turn in session.turns] == [False, False, False, True, False, False]
    assert [[Path(frame).stem[-1] for frame in turn.frames] for turn in session.turns] == [
        ["1"],
        [],
        [],
        ["2"],
        ["3"],
        ["4"],
    ]


def test_a_log_that_is_being_written_is_read_up_to_its_last_whole_line(tmp_path):
    path = write_log(tmp_path / "run" / "log.jsonl", [{"step": step, "action": "up"} for step in (1, 2)], pictures=[1])
    content = path.read_bytes()
    path.write_bytes(content[:-5])
    session = read_trajectory_log(path)
    assert len(session.turns) == 1
    assert session.problems == ("log.jsonl: its last line is cut off, and is not read",)


def test_who_decided_and_what_failed(tmp_path):
    records = [
        {"step": 1, "action": "up", "by": "human:anna"},
        {"step": 2, "action": "up", "decided_by": "random"},
        {"step": 3, "action": "up", "by": "anna"},
        {"step": 4, "action": "up", "outcome": {"success": False}, "model_info": {"model": "gemma"}},
    ]
    session = read(tmp_path, records)
    assert [(turn.decision.status, turn.decision.label_by) for turn in session.turns] == [
        ("decision", "human:anna"),
        ("blind_press", "random"),
        ("malformed_turn", None),
        ("action_failed", "model:gemma"),
    ]
    assert session.turns[3].decision.pressed == ()


def test_times_are_iso_or_seconds(tmp_path):
    records = [
        {"step": at, "action": "up", "timestamp": time} for at, time in enumerate(["2026-11-29T19:00:03Z", 3.5, "x"])
    ]
    session = read(tmp_path, records)
    assert [turn.time and turn.time.second for turn in session.turns] == [3, 3, None]
    assert [turn.timestamp for turn in session.turns] == ["2026-11-29T19:00:03Z", "3.5", "x"]
