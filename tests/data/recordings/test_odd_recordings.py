"""Whatever a recording contains, each of its turns is counted once, or it is refused in one line."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pokegemma.data.convert import SessionResult, WindowOptions, convert_session
from pokegemma.data.eevee_v1.sessions import read_session
from pokegemma.data.prompts import parse_answer
from pokegemma.data.recordings.plain_form import read_plain_form
from pokegemma.data.recordings.session import Session, SessionError
from pokegemma.data.recordings.trajectory_log import read_trajectory_log
from pokegemma.data.samples import scan_samples
from tests.conftest import frame_png, raw_frame, turn_record

KEYS = [
    *("step", "turn", "time", "timestamp", "action", "actions", "button", "buttons", "tool_calls", "name", "args"),
    *("function", "arguments", "screenshot", "frame", "image", "data", "reason", "reasoning", "by", "held", "goal"),
    *("pre_state", "outcome", "success", "model", "situation", "context", "correction", "decided_by"),
]
ODD = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(
        [
            *(10**400, -1, "\ud800", "../../x.png", "a\0b.png", "x" * 5000 + ".png", "UP", "a", "b+right up", "1.png"),
            *("press_buttons", "navigate_to", "2025-06-25T18:00:00Z", "1e999", "nan", "human:\ud800", "random"),
            *("<end_of_turn>", '{"buttons": "a"}', raw_frame(1, 9)["screenshot_base64"]),
        ]
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=10,
)
RECORD = st.dictionaries(st.sampled_from(KEYS), ODD, max_size=8) | ODD
STEP = st.builds(
    lambda step, action, more: {**more, "step": step, "action": action},
    *(st.integers(0, 5) | ODD, st.sampled_from(["up", ["a", "b"]]) | ODD, st.dictionaries(st.sampled_from(KEYS), ODD)),
)
ROW = st.builds(
    lambda time, button, more: {**more, "time": time, "button": button},
    *(st.floats(0, 1) | ODD, st.sampled_from(["up", "a b"]) | ODD, st.dictionaries(st.sampled_from(KEYS), ODD)),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("odd") / "session_s"
    for name in ("screenshots/1.png", "screenshots/2.png", "frames/1.png", "frames/2.png", "sshots/step_0001_grid.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(frame_png(1))
    (folder / "frames" / "3.png").write_bytes(b"broken")
    return folder


def check(session: Session, folder: Path) -> SessionResult:
    output = folder.parent / "out"
    output.mkdir(exist_ok=True)
    shard = output / "shard.jsonl"
    options = WindowOptions(grid_images=False)
    result = convert_session(session, "s", shard=shard, output=output, options=options)
    assert result.num_samples + sum(result.reasons.values()) == result.num_turns == len(session.turns)
    lines = list(scan_samples(shard))
    assert len(lines) == result.num_samples == sum(result.buttons.values())
    for _, sample, problems in lines:
        assert not problems
        parse_answer(sample.output)
        json.loads(sample.to_json(), parse_constant=pytest.fail)
    assert all("\n" not in problem for problem in result.problems)
    return result


@pytest.mark.slow(4)
@settings(max_examples=300, deadline=None)
@given(st.lists(STEP | RECORD, max_size=5))
def test_no_line_of_a_trajectory_log_is_lost(folder: Path, records: list) -> None:
    path = folder / "log.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    check(read_trajectory_log(path), folder)


@settings(max_examples=300, deadline=None)
@given(st.lists(ROW | RECORD, max_size=5), RECORD)
@pytest.mark.slow(4)
def test_no_row_of_the_plain_form_is_lost(folder: Path, rows: list, info: object) -> None:
    (folder / "actions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "session.json").write_text(json.dumps(info))
    try:
        session = read_plain_form(folder)
    except SessionError as error:
        assert "\n" not in str(error)
        return
    check(session, folder)
    assert len(session.turns) == len(rows)


TURN = st.builds(
    lambda number, more: {**turn_record(number), **more}, st.integers(0, 4), st.dictionaries(st.sampled_from(KEYS), ODD)
)
JOURNAL = b"".join(
    json.dumps(line).encode() + b"\n"
    for line in ({"session": {"goal": "g"}}, turn_record(1), {"resumed": {"turn": 2}}, turn_record(2), turn_record(3))
)


@settings(max_examples=200, deadline=None)
@given(st.lists(TURN | RECORD, max_size=5))
def test_no_line_of_a_journal_is_lost(folder: Path, turns: list) -> None:
    (folder / "journal.jsonl").write_text("".join(json.dumps(turn) + "\n" for turn in [{"session": {}}, *turns]))
    check(read_session(folder), folder)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(JOURNAL)), st.binary(max_size=3))
def test_a_damaged_journal_is_read(folder: Path, position: int, noise: bytes) -> None:
    for content in (JOURNAL[:position] + noise, JOURNAL[:position] + noise + JOURNAL[position + len(noise) :]):
        (folder / "journal.jsonl").write_bytes(content)
        check(read_session(folder), folder)
