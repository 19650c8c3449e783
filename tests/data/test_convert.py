import copy
import dataclasses
import hashlib
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pokegemma.data import corpus
from pokegemma.data.convert import WindowOptions, convert_session
from pokegemma.data.corpus import convert_corpus, session_ids
from pokegemma.data.eevee_v1.sessions import read_session
from pokegemma.data.prompts import parse_answer
from pokegemma.data.samples import read_samples, scan_samples
from pokegemma.data.split import choose_eval_sessions
from pokegemma.errors import CheckFailedError, PokegemmaError
from pokegemma.provenance import PROJECT_ROOT
from tests.conftest import conversion_command, failed_turn, frame_png, raw_frame, red_of, turn_record, write_session
from tests.processes import WAIT_S, killed_after, take_sigint, wait_until


def convert(data_dir, output, *, num_workers=1, eval_fraction=0.0, overwrite=False, **window):
    return convert_corpus(
        data_dir,
        output,
        window=WindowOptions(**window),
        eval_fraction=eval_fraction,
        num_workers=num_workers,
        overwrite=overwrite,
    )


def convert_turns(make_session, tmp_path, turns, *, session=None, **window):
    """Return the samples of a single session with these turns."""
    make_session("s", turns, **(session or {}))
    convert(tmp_path / "runs", tmp_path / "out", **window)
    return list(read_samples(tmp_path / "out" / "train.jsonl"))


def run_script(monkeypatch, tmp_path, *flags):
    """Run the script's main on tmp_path/runs; it writes to tmp_path/out."""
    folders = ["--eevee_data_dir", os.fspath(tmp_path / "runs"), "--output_dir", os.fspath(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["convert_eevee_data_v2.py", *folders, "--num_workers", "1", *flags])
    runpy.run_path(str(PROJECT_ROOT / "scripts" / "convert_eevee_data_v2.py"))["main"]()


def folder_hashes(folder):
    """Return the SHA-256 of every file but run.json, which holds the time."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "run.json"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# The sample


def test_a_sample_holds_its_window_and_its_answer(make_session, tmp_path):
    sample = convert_turns(make_session, tmp_path, [turn_record(turn, ["up", "a"]) for turn in range(1, 6)])[4]
    assert sample.id == "s/5"
    assert sample.frames == tuple(f"frames/s/000{turn}.png" for turn in (2, 3, 4, 5))
    assert sample.image == "grid_images/s_0005.png"
    assert (parse_answer(sample.output).button, parse_answer(sample.output).reasoning) == ("up", "secret-reasoning-5")
    assert sample.metadata == {
        "session": "s",
        "turn": 5,
        "goal": "heal your pokemon",
        "buttons": ["up", "a"],
        "previous_buttons": ["up", "a"] * 4,
        "situation": "navigation",
        "timestamp": "2025-06-25T18:00:05",
        "template": "exploration_strategy",
        "confidence": "high",
        "frame_turns": [2, 3, 4, 5],
    }
    assert [red_of(tmp_path / "out" / frame) for frame in sample.frames] == [4, 6, 8, 10]
    assert (tmp_path / "out" / sample.frames[0]).read_bytes() == frame_png(4)


def test_the_first_frame_is_repeated_up_to_min_frames(make_session, tmp_path):
    turns = [turn_record(turn) for turn in (1, 2, 3)]
    samples = convert_turns(make_session, tmp_path, turns)
    assert [sample.metadata["frame_turns"] for sample in samples] == [[1, 1, 1, 1], [1, 1, 1, 2], [1, 1, 2, 3]]
    shutil.rmtree(tmp_path / "out")
    samples = convert_turns(make_session, tmp_path, turns, min_frames=1, num_frames=2)
    assert [sample.metadata["frame_turns"] for sample in samples] == [[1], [1, 2], [2, 3]]


def test_turns_without_a_decision_give_frames_and_no_buttons(make_session, tmp_path):
    turns = [
        turn_record(1, "up"),
        failed_turn(2),  # pressed "b"
        turn_record(3, "left", action_result=False),  # pressed nothing
        turn_record(4, ["jump"]),  # pressed "b"
        turn_record(5, "down"),
    ]
    samples = convert_turns(make_session, tmp_path, turns)
    assert [sample.metadata["turn"] for sample in samples] == [1, 5]
    assert samples[1].metadata["frame_turns"] == [2, 3, 4, 5]
    assert samples[1].question == "Buttons pressed so far: up, b, b\nNext button?"


def test_a_turn_without_its_frame_is_no_frame_of_the_window(make_session, tmp_path):
    turns = [turn_record(turn) for turn in range(1, 5)]
    samples = convert_turns(make_session, tmp_path, turns, session={"steps": [1, 2, 4]})
    assert [sample.metadata["frame_turns"] for sample in samples] == [[1, 1, 1, 1], [1, 1, 1, 2], [1, 1, 2, 4]]


@pytest.mark.parametrize(
    ("times", "frame_turns"),
    [
        (["18:00:00", "18:00:30", "18:01:00"], [1, 1, 2, 3]),
        (["18:00:00", "18:00:30", "18:01:01"], [3, 3, 3, 3]),
        (["18:00:00", "18:05:00", "18:05:01"], [2, 2, 2, 3]),
        (["18:00:00", "garbage", "18:01:00"], [1, 1, 2, 3]),  # 60 s in two turns
        (["18:00:00", "garbage", "18:01:01"], [3, 3, 3, 3]),
        (["18:09:00", "18:00:00", "18:00:01"], [2, 2, 2, 3]),  # the clock was set back
        (["18:00:00", "18:00:01+00:00", "18:00:02"], [1, 1, 2, 3]),  # the clock's face is compared
        (["18:00:00", "18:00:01+00:00", "23:00:00"], [3, 3, 3, 3]),
        (["18:00:00+00:00", "20:00:01+02:00", "20:00:09+02:00"], [1, 1, 2, 3]),
        (["", "", ""], [1, 1, 2, 3]),
    ],
)
def test_a_long_pause_starts_a_new_window(make_session, tmp_path, times, frame_turns):
    turns = [turn_record(i + 1, timestamp=f"2025-06-25T{value}") for i, value in enumerate(times)]
    assert convert_turns(make_session, tmp_path, turns)[-1].metadata["frame_turns"] == frame_turns


def test_a_window_ends_at_a_long_gap_of_missing_frames(make_session, tmp_path):
    turns = [turn_record(i, timestamp=f"2025-06-25T18:{i * 25 // 60:02d}:{i * 25 % 60:02d}") for i in range(1, 25)]
    samples = convert_turns(make_session, tmp_path, turns, session={"steps": [1, 2, 22, 23, 24]})
    assert {sample.metadata["turn"]: sample.metadata["frame_turns"] for sample in samples} == {
        1: [1, 1, 1, 1],
        2: [1, 1, 1, 2],
        22: [22, 22, 22, 22],
        23: [22, 22, 22, 23],
        24: [22, 22, 23, 24],
    }


@pytest.mark.parametrize(("flags", "num_shown"), [(["1"], 1), (["2"], 2), (["6"], 4), (["2", "--min_frames", "1"], 1)])
def test_min_frames_is_four_or_num_frames_if_that_is_less(make_session, tmp_path, monkeypatch, flags, num_shown):
    make_session("s", [turn_record(1)])
    run_script(monkeypatch, tmp_path, "--num_frames", *flags)
    (sample,) = read_samples(tmp_path / "out" / "train.jsonl")
    assert sample.metadata["frame_turns"] == [1] * num_shown
    assert json.loads((tmp_path / "out" / "run.json").read_text())["options"]["min_frames"] == num_shown


@pytest.mark.parametrize("min_frames", ["0", "3"])
def test_min_frames_above_num_frames_is_refused(make_session, tmp_path, monkeypatch, min_frames):
    make_session("s", [turn_record(1)])
    with pytest.raises(PokegemmaError, match=f"--min_frames {min_frames}: must be at least 1 and at most 2"):
        run_script(monkeypatch, tmp_path, "--num_frames", "2", "--min_frames", min_frames)


def test_a_corrupt_frame_is_missing_and_named(make_session, tmp_path):
    folder = make_session("s", [turn_record(turn) for turn in (1, 2, 3)])
    (folder / "sshots" / "step_0002_grid.png").write_bytes(frame_png(4)[:100])
    report = convert(tmp_path / "runs", tmp_path / "out")
    assert report["turns_without_sample"]["frame_unreadable"] == 1
    assert report["problems"] == ["session_s turn 2: step_0002_grid.png unreadable: PNG is cut off"]
    samples = list(read_samples(tmp_path / "out" / "train.jsonl"))
    assert samples[-1].metadata["frame_turns"] == [1, 1, 1, 3]


def test_a_corrupt_raw_frame_gives_way_to_the_screenshot_and_is_named(make_session, tmp_path):
    raw = [raw_frame(1, 200), {"turn_number": 2, "screenshot_base64": "not base64 \ud800!"}]
    samples = convert_turns(make_session, tmp_path, [turn_record(1), turn_record(2)], session={"enhanced_turns": raw})
    assert [red_of(tmp_path / "out" / frame) for frame in samples[1].frames] == [200, 200, 200, 4]
    report = json.loads((tmp_path / "out" / "conversion_report.json").read_text())
    assert report["problems"] == ["session_s turn 2: its raw frame unreadable: not base64"]


def test_frames_of_an_odd_size_are_kept_and_fit_the_grid(make_session, tmp_path):
    folder = make_session("s", [turn_record(1)])
    content = frame_png(77, size=(160, 144))
    (folder / "sshots" / "step_0001_grid.png").write_bytes(content)
    convert(tmp_path / "runs", tmp_path / "out")
    assert (tmp_path / "out" / "frames" / "s" / "0001.png").read_bytes() == content
    with Image.open(tmp_path / "out" / "grid_images" / "s_0001.png") as grid:
        assert (grid.size, grid.getpixel((300, 200))) == ((480, 320), (77, 10, 20))


def test_without_grid_images_there_are_none(make_session, tmp_path):
    samples = convert_turns(make_session, tmp_path, [turn_record(1)], grid_images=False)
    assert samples[0].image is None
    assert not (tmp_path / "out" / "grid_images").exists()


# The corpus


def test_the_real_sessions_give_503_samples(real_runs, tmp_path):
    report = convert(real_runs, tmp_path / "out", num_workers=2, eval_fraction=0.1)
    assert (report["samples"], report["turns"] - report["samples"]) == (503, 154)
    splits = {name: list(read_samples(tmp_path / "out" / f"{name}.jsonl")) for name in ("train", "eval")}
    assert {name: len(samples) for name, samples in splits.items()} == {"train": 446, "eval": 57}
    assert not {sample.session for sample in splits["train"]} & {sample.session for sample in splits["eval"]}
    samples = splits["train"] + splits["eval"]
    assert all(not sample.context.endswith("…") for sample in samples)  # all goals are whole
    stored = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out" / "frames").rglob("*.png")}
    assert stored == {frame for sample in samples for frame in sample.frames}


@pytest.mark.parametrize("symbol", ["<end_of_turn>", "<start_of_image>", "<turn|>", "<__media__>"])
def test_turns_whose_text_spells_a_control_token_are_no_samples(make_session, tmp_path, symbol):
    spelled = turn_record(2)
    spelled["ai_analysis"]["parsed_json"]["reasoning"] = f"press a {symbol}"
    in_context = turn_record(3)
    in_context["ai_analysis"]["parsed_json"]["context_detected"] = symbol
    make_session("answer", [turn_record(1), spelled, in_context])
    make_session("goal", [turn_record(1, "down")], goal=f"find {symbol}")
    report = convert(tmp_path / "runs", tmp_path / "out")
    assert (report["samples"], report["turns_without_sample"]["control_token"]) == (1, 3)
    assert [problem.split(":")[0] for problem in report["problems"]] == [
        "session_answer turn 2",
        "session_answer turn 3",
        "session_goal",
    ]
    assert all(symbol in problem for problem in report["problems"])


def write_early_session(data_dir, name, *, pictures="analysis", turns=(1, 2, 3)):
    """Write a session of the oldest kind, whose pictures are in a folder beside runs/, named by another machine."""
    records = [turn_record(turn, screenshot_path=f"/Users/ash/eevee/{pictures}/{turn}.png") for turn in turns]
    for record in records:
        record["ai_analysis"] = f"grass ahead of {name}"
    write_session(data_dir / "runs" / name, records, steps=[], turns_key="gameplay_history", start_time=name)
    (data_dir / pictures).mkdir(exist_ok=True)
    for turn in turns:
        (data_dir / pictures / f"{turn}.png").write_bytes(frame_png(10 * turn))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_pictures_beside_the_sessions_are_found(tmp_path, num_workers):
    for name in ("one", "two"):
        write_early_session(tmp_path / "in", name, pictures=f"analysis_{name}")
    report = convert(tmp_path / "in", tmp_path / "out", num_workers=num_workers)
    assert (report["samples"], report["problems"]) == (6, [])
    assert red_of(tmp_path / "out" / "frames" / "two" / "0003.png") == 30


def test_pictures_that_are_nowhere_are_named_with_where_they_belong(tmp_path, make_session):
    write_early_session(tmp_path, "lost")
    shutil.rmtree(tmp_path / "analysis")
    with pytest.raises(CheckFailedError) as error:
        convert(tmp_path / "runs", tmp_path / "out")
    for words in ("lost: 3 decisions without a picture", "1.png", "sshots/"):
        assert words in str(error.value)
    make_session("whole", [turn_record(1)])
    (problem,) = convert(tmp_path / "runs", tmp_path / "out")["problems"]
    assert problem.startswith("lost: 3 decisions without a picture; 1.png ")


def test_a_picture_that_two_sessions_name_is_told(tmp_path):
    for name in ("one", "two"):
        write_early_session(tmp_path, name, turns=[1, 2] if name == "one" else [2, 3])
    problems = convert(tmp_path, tmp_path / "out")["problems"]
    assert [problem.split(" is named by ")[0] for problem in problems] == ["analysis/2.png"]


def test_a_picture_that_two_sessions_name_by_absolute_path_is_reported(tmp_path, monkeypatch):
    (tmp_path / "in" / "shared").mkdir(parents=True)
    (tmp_path / "in" / "shared" / "odd.png").write_bytes(frame_png(7))
    for name, button in (("one", "up"), ("two", "down")):
        turn = turn_record(1, button, screenshot_path=str(tmp_path / "in" / "shared" / "odd.png"))
        write_session(tmp_path / "in" / f"session_{name}", [turn], steps=[], goal=name)
    monkeypatch.chdir(tmp_path)
    problems = convert(Path("in"), tmp_path / "out")["problems"]
    assert [problem.split(" is named by ")[0] for problem in problems] == ["shared/odd.png"]


def test_the_files_are_the_same_for_any_number_of_workers_and_after_overwriting(make_session, tmp_path):
    for name in ("a", "b", "c"):
        make_session(name, [turn_record(turn, timestamp="") for turn in range(1, 4)])
    convert(tmp_path / "runs", tmp_path / "one", num_workers=1, eval_fraction=0.3)
    convert(tmp_path / "runs", tmp_path / "three", num_workers=3, eval_fraction=0.3)
    before = folder_hashes(tmp_path / "one")
    assert folder_hashes(tmp_path / "three") == before
    convert(tmp_path / "runs", tmp_path / "one", eval_fraction=0.3, overwrite=True)
    assert folder_hashes(tmp_path / "one") == before
    assert len(before) == 9 + 9 + 3


def test_a_broken_session_is_named_and_the_rest_goes_on(make_session, tmp_path):
    make_session("good", [turn_record(1)])
    make_session("empty", [])
    broken = make_session("broken", [turn_record(1)])
    (broken / "session_data.json").write_text('{"turns": [')
    report = convert(tmp_path / "runs", tmp_path / "out", num_workers=2)
    assert report["sessions"] == {"found": 3, "with_samples": 1, "without_samples": 1, "unreadable": 1}
    assert len(report["problems"]) == 1
    assert report["problems"][0].startswith("session_broken/session_data.json is cut off")


def test_if_nothing_could_be_converted_the_check_fails_with_every_cause(make_session, tmp_path):
    make_session("undecided", [failed_turn(1)])
    broken = make_session("broken", [])
    (broken / "session_data.json").write_text("")
    with pytest.raises(CheckFailedError) as error:
        convert(tmp_path / "runs", tmp_path / "out")
    assert "session_broken/session_data.json is cut off" in str(error.value)
    assert "session_undecided: 1 turns" in str(error.value)
    assert "1 parse_failed" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_one_session_has_no_eval_split_and_says_so(make_session, tmp_path):
    make_session("s", [turn_record(1)])
    report = convert(tmp_path / "runs", tmp_path / "out", eval_fraction=0.5)
    assert report["splits"]["eval"]["samples"] == 0
    assert not (tmp_path / "out" / "eval.jsonl").exists()


def test_run_json_tells_how_the_dataset_was_made(make_session, tmp_path):
    make_session("s", [turn_record(1)])
    convert(tmp_path / "runs", tmp_path / "out")
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    expected = hashlib.sha256((tmp_path / "out" / "train.jsonl").read_bytes()).hexdigest()
    assert (record["stage"], record["dataset_sha256"]) == ("convert", {"train.jsonl": expected})


# Where it is written


def test_other_files_in_the_output_folder_stay(make_session, tmp_path):
    make_session("s", [turn_record(1)])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("keep me")
    convert(tmp_path / "runs", tmp_path / "out")
    convert(tmp_path / "runs", tmp_path / "out", overwrite=True)
    written = set(corpus.OUTPUTS) - {"eval.jsonl"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"README.md", *written}
    assert (tmp_path / "out" / "README.md").read_text() == "keep me"


def test_an_earlier_conversion_is_not_overwritten_without_the_flag(make_session, tmp_path):
    make_session("a", [turn_record(1), turn_record(2)])
    make_session("b", [turn_record(1, "down")])
    convert(tmp_path / "runs", tmp_path / "out", eval_fraction=0.5)
    with pytest.raises(PokegemmaError, match=r"out/train\.jsonl exists; .* --overwrite"):
        convert(tmp_path / "runs", tmp_path / "out")
    shutil.rmtree(tmp_path / "runs" / "session_b")
    convert(tmp_path / "runs", tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "eval.jsonl").exists()
    assert [path.name for path in (tmp_path / "out" / "frames").iterdir()] == ["a"]


def test_a_folder_called_frames_that_is_not_ours_is_never_deleted(make_session, tmp_path):
    make_session("s", [turn_record(1)])
    (tmp_path / "out" / "frames").mkdir(parents=True)
    with pytest.raises(PokegemmaError, match="out was not created by this script"):
        convert(tmp_path / "runs", tmp_path / "out", overwrite=True)


def test_recordings_inside_the_outputs_are_never_overwritten(tmp_path):
    write_session(tmp_path / "frames" / "session_s", [turn_record(1)])
    (tmp_path / "run.json").write_text('{"stage": "convert"}')
    with pytest.raises(PokegemmaError, match=r"frames contains the input .*session_s"):
        convert(tmp_path / "frames", tmp_path, overwrite=True)
    assert (tmp_path / "frames" / "session_s" / "session_data.json").exists()


def test_a_full_disk_is_one_line_and_leaves_nothing(make_session, tmp_path, monkeypatch):
    make_session("s", [turn_record(1)])
    monkeypatch.setattr(corpus, "convert_session", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(PokegemmaError, match="disk is full"):
        convert(tmp_path / "runs", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ctrl_c_leaves_nothing(tmp_path):
    for index in range(2):
        write_session(
            tmp_path / "runs" / f"session_{index}", [turn_record(turn) for turn in range(1, 9)], steps=range(1, 9)
        )
    big = [turn_record(turn, screenshot_path=f"x{turn}") for turn in range(1, 3000)]
    data = json.loads((tmp_path / "runs" / "session_0" / "session_data.json").read_text())
    content = raw_frame(1, 5)["screenshot_base64"]
    raw = [{"turn_number": turn, "screenshot_base64": content} for turn in range(1, 3000)]
    for index in range(2):
        path = tmp_path / "runs" / f"session_{index}" / "session_data.json"
        path.write_text(json.dumps({**data, "turns": big, "enhanced_turns": raw}))
    command = conversion_command(tmp_path)
    process = subprocess.Popen(
        command,
        cwd=PROJECT_ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=take_sigint,
    )
    with killed_after(process):
        wait_until(lambda: list(tmp_path.glob(".out.*/new/out/frames/*/*.png")), process)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=WAIT_S)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()


# Session ids and splits


def test_session_ids_are_safe_in_a_path_and_never_collide():
    names = [
        "session_1",
        "1",
        "session_..",
        "session_",
        "session_a/../b",
        "session_A",
        "session_a",
        "s:x",
        "s\\x",
        "é",
        "session_.hidden",
        "x" * 300,
        "\udcff",
    ]
    ids = session_ids([Path("runs") / name for name in names] + [Path("other/session_1")])
    assert len({session_id.casefold() for session_id in ids}) == len(ids)
    assert all(
        set(session_id) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")
        for session_id in ids
    )
    assert not any(session_id.startswith(".") or len(session_id) > 120 for session_id in ids)
    assert ids[0] == "1"


@settings(max_examples=300)
@given(
    st.dictionaries(st.text("abc123", min_size=1, max_size=6), st.integers(0, 200), max_size=40),
    st.floats(0, 0.99, allow_nan=False),
)
def test_the_split_is_deterministic_and_neither_side_is_empty(counts, fraction):
    chosen = choose_eval_sessions(counts, eval_fraction=fraction)
    assert chosen == choose_eval_sessions(dict(reversed(counts.items())), eval_fraction=fraction)
    convertible = {session for session, count in counts.items() if count}
    assert chosen <= convertible
    if len(convertible) >= 2 and fraction > 0:
        assert chosen
        assert convertible - chosen
    else:
        assert not chosen


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.25, 0.5])
def test_the_split_comes_close_to_the_fraction(fraction):
    counts = {f"2025_{index}": 1 + index * 7 % 60 for index in range(100)}
    chosen = choose_eval_sessions(counts, eval_fraction=fraction)
    share = sum(counts[session] for session in chosen) / sum(counts.values())
    assert fraction <= share <= 1.25 * fraction


# Malformed sessions

BUTTONS = st.sampled_from(["up", "DOWN", "a", "b", "jump", "", "select"])
KEYS = ["turn", "button_presses", "parsed_json", "pathfinding_action", "raw_text", "success", "goal"]
ODD = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | BUTTONS
    | st.sampled_from([10**40, "\ud800", "../../x", "/etc/passwd", "a\0b", "2025-06-25T18:00:00Z", "No game data"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=6,
)
TURN = st.builds(
    lambda turn, changes: {key: value for key, value in {**turn, **changes}.items() if value != "delete"},
    st.builds(turn_record, st.integers(-1, 6), st.lists(BUTTONS, max_size=5) | BUTTONS)
    | st.builds(failed_turn, st.integers(0, 6)),
    st.dictionaries(st.sampled_from(list(turn_record(1))), ODD | st.just("delete"), max_size=3),
)
RAW = st.fixed_dictionaries(
    {"turn_number": st.integers(0, 6) | ODD},
    optional={"screenshot_base64": st.sampled_from([raw_frame(1, 9)["screenshot_base64"], "", "####", "AAAA"]) | ODD},
)
SESSION = st.fixed_dictionaries(
    {"turns": st.lists(TURN | ODD, max_size=7) | ODD},
    optional={
        "gameplay_history": st.lists(TURN, max_size=3) | ODD,
        "enhanced_turns": st.lists(RAW | ODD, max_size=4) | ODD,
        "session_metadata": ODD,
        "goal": ODD,
    },
)


@pytest.fixture(scope="module")
def session_with_frames(tmp_path_factory):
    folder = write_session(tmp_path_factory.mktemp("malformed") / "session_s", [], steps=[1, 2, 3, 5])
    (folder / "sshots" / "step_0004_grid.png").write_bytes(b"broken")
    (folder / "step_0006_grid.png").mkdir()
    return folder


def convert_record(folder, content):
    """Convert a session with this session_data.json; return its result and its samples."""
    (folder / "session_data.json").write_bytes(content)
    output = folder.parent / "out"
    output.mkdir(exist_ok=True)
    shard = output / "shard.jsonl"
    result = convert_session(
        read_session(folder), "s", shard=shard, output=output, options=WindowOptions(grid_images=False)
    )
    return result, list(scan_samples(shard))


@pytest.mark.slow(5)
@settings(max_examples=1000, deadline=None)
@given(record=SESSION)
def test_any_session_converts_or_is_reported_and_no_turn_is_lost(record, session_with_frames):
    try:
        result, lines = convert_record(session_with_frames, json.dumps(record).encode())
    except PokegemmaError as error:
        assert "\n" not in str(error)
        return
    turns = record["turns"] or record.get("gameplay_history") or []
    assert result.num_samples + sum(result.reasons.values()) == result.num_turns == len(turns)
    assert sum(result.buttons.values()) == result.num_samples == len(lines)
    for _, sample, problems in lines:
        assert not problems
        assert parse_answer(sample.output).button in sample.metadata["buttons"]
        json.loads(sample.to_json(), parse_constant=pytest.fail)
    json.dumps(dataclasses.asdict(result), ensure_ascii=False).encode("utf-8", "strict")


WHOLE = json.dumps(
    {"goal": "g", "turns": [turn_record(1), failed_turn(2)], "enhanced_turns": [raw_frame(1, 3)]}
).encode()


@settings(max_examples=500, deadline=None)
@given(st.integers(0, len(WHOLE)), st.binary(max_size=3))
def test_a_damaged_session_file_is_read_or_refused(session_with_frames, position, noise):
    for content in (WHOLE[:position] + noise, WHOLE[:position] + noise + WHOLE[position + len(noise) :]):
        try:
            result, _ = convert_record(session_with_frames, content)
        except PokegemmaError:
            continue
        assert result.num_samples + sum(result.reasons.values()) == result.num_turns


def test_the_same_turn_twice_counts_once(make_session, tmp_path):
    turns = [turn_record(1), turn_record(2), copy.deepcopy(turn_record(2)), turn_record(3)]
    make_session("s", turns, steps=[1, 2, 3])
    report = convert(tmp_path / "runs", tmp_path / "out")
    assert (report["samples"], report["turns_without_sample"]["malformed_turn"]) == (3, 1)


@pytest.mark.parametrize("name", ["x" * 300, "x" * 300 + "/out", "a\0b"])
def test_an_impossible_output_folder_is_one_line(make_session, tmp_path, name):
    make_session("s", [turn_record(1)])
    with pytest.raises(PokegemmaError, match="could not be written: ") as error:
        convert(tmp_path / "runs", tmp_path / name)
    assert "\n" not in str(error.value)


def test_the_script_prints_a_folder_name_that_is_not_utf8(make_session, tmp_path, monkeypatch, capfd):
    make_session("s", [turn_record(1)])
    run_script(monkeypatch, tmp_path, "--output_dir", str(tmp_path / os.fsdecode(b"caf\xe9")))
    assert "caf? (details: conversion_report.json)" in capfd.readouterr().out


def test_a_raw_frame_may_be_a_data_url(make_session, tmp_path):
    raw = {"turn_number": 1, "screenshot_base64": "data:image/png;base64," + raw_frame(1, 200)["screenshot_base64"]}
    (sample,) = convert_turns(make_session, tmp_path, [turn_record(1)], session={"enhanced_turns": [raw]})
    assert red_of(tmp_path / "out" / sample.frames[0]) == 200
