"""Replays, opened in a browser."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pokegemma.data.convert import WindowOptions
from pokegemma.data.corpus import convert_corpus
from pokegemma.data.prompts import parse_answer
from pokegemma.data.recordings.corrections import Correction, read_corrections
from pokegemma.data.recordings.readers import find_recordings
from pokegemma.data.samples import read_samples
from pokegemma.play.command.options import PlayOptions
from pokegemma.play.command.session import play_session
from pokegemma.play.replay import pages
from pokegemma.play.replay.turns import find_stuck, read_replay
from tests.browser import open_browser
from tests.conftest import raw_frame, turn_record, write_session


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a session in which 40 random buttons were pressed, and corrected by the expert."""
    options = PlayOptions(
        player="random", seed=7, record=str(tmp_path_factory.mktemp("runs")), correct=True, max_turns=40, quiet=True
    )
    return play_session(options).session


def data_of(page: Path) -> dict[str, Any]:
    text = page.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', text)[1])


def test_a_recorded_session_has_a_replay_with_each_turn_and_each_screen_once(session: Path) -> None:
    (shown,) = data_of(session / "replay.html")["sessions"]
    assert [turn["n"] for turn in shown["turns"]] == list(range(1, 41))
    (recording,) = find_recordings(session)
    replay = read_replay(recording)
    assert len(replay.screens) == len({turn.screen for turn in replay.turns}) < 40
    mistakes = [turn for turn in replay.turns if turn.is_mistake]
    assert len(mistakes) > 20
    assert all(turn.pressed[0] != turn.right for turn in mistakes)
    assert [bool(turn.get("bad")) for turn in shown["turns"]] == [turn.is_mistake for turn in replay.turns]


def test_keys_and_clicks_go_through_the_turns(session: Path, tmp_path: Path) -> None:
    turns = data_of(session / "replay.html")["sessions"][0]["turns"]
    with open_browser(tmp_path) as browser:
        browser.open(session / "replay.html")
        assert browser.text("#turn") == "turn 1 of 40"
        browser.press("ArrowRight")
        browser.press("ArrowRight")
        browser.press("ArrowLeft")
        browser.click("#next")
        assert browser.text("#turn") == "turn 3 of 40"
        assert f"pressed {turns[2]['p'][0]} (random)" in browser.text("#note")
        browser.click("#mistake")
        place = next(number for number in range(3, 40) if turns[number].get("bad"))
        assert browser.text("#turn") == f"turn {place + 1} of 40"
        assert f"mistake: {turns[place]['r']} was right" in browser.text("#note")
        browser.click("#stuck")
        assert "stuck" in browser.text("#note")
        browser.click("#scrubber")
        assert browser.text("#turn") == "turn 21 of 40"
        assert browser.evaluate("document.querySelector('#screen').naturalWidth") == 240
        assert (browser.problems, browser.requests) == ([], [])


def test_corrections_that_were_made_on_the_page_are_labels(session: Path, tmp_path: Path) -> None:
    with open_browser(tmp_path / "browser") as browser:
        browser.open(session / "replay.html")
        assert browser.evaluate("document.querySelector('#save').disabled")
        browser.press("1")
        browser.press("3")  # the later one counts
        assert "corrected: left is right" in browser.text("#note")
        browser.press("ArrowRight")
        browser.click("#rows button:nth-of-type(6)")
        browser.press("ArrowRight")
        browser.press("2")
        browser.press("2")  # taken back
        assert browser.text("#save") == "save corrections (2)"
        lines = browser.evaluate("correctionLines()")
        assert browser.problems == []
    file = tmp_path / "corrections.jsonl"
    file.write_text(lines, encoding="utf-8")
    corrections = read_corrections(file)
    assert corrections == {session.name: {1: Correction("left", "human"), 2: Correction("b", "human")}}
    convert_corpus(
        *(session, tmp_path / "out"),
        window=WindowOptions(),
        eval_fraction=0.0,
        num_workers=1,
        corrections=file,
    )
    first, second = list(read_samples(tmp_path / "out" / "train.jsonl"))[:2]
    assert [parse_answer(sample.output).button for sample in (first, second)] == ["left", "b"]
    assert first.metadata["label_by"] == "human"


def test_many_turns_become_pages_with_an_index(session: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "MAX_TURNS", 15)
    (recording,) = find_recordings(session)
    written = pages.write_replay([recording, recording], tmp_path / "replay.html")
    assert [path.name for path in written] == ["replay.html", *(f"replay_{number:03d}.html" for number in range(1, 7))]
    assert [len(data_of(path)["sessions"][0]["turns"]) for path in written[1:]] == [15, 15, 10] * 2
    with open_browser(tmp_path / "browser") as browser:
        browser.open(written[0])
        assert browser.count("a") == 6
        browser.click("a[href='replay_003.html']")
        browser.wait_until("document.querySelector('#turn')?.textContent === 'turn 31 of 40'")
        assert browser.problems == []


def test_a_raw_frame_may_be_a_data_url(tmp_path: Path) -> None:
    raw = {"turn_number": 1, "screenshot_base64": "data:image/png;base64," + raw_frame(1, 200)["screenshot_base64"]}
    write_session(tmp_path / "session_s", [turn_record(1)], steps=[], enhanced_turns=[raw])
    (recording,) = find_recordings(tmp_path)
    assert len(read_replay(recording).screens) == 1


def test_sessions_that_fit_share_a_page(session: Path, tmp_path: Path) -> None:
    (recording,) = find_recordings(session)
    assert pages.write_replay([recording, recording], tmp_path / "replay.html") == [tmp_path / "replay.html"]
    assert len(data_of(tmp_path / "replay.html")["sessions"]) == 2


def test_text_of_a_session_cannot_end_the_script(tmp_path: Path) -> None:
    goal = "</script><!-- leave"
    options = PlayOptions(player="random", goal=goal, record=str(tmp_path), max_turns=1, quiet=True)
    page = play_session(options).session / "replay.html"
    assert data_of(page)["sessions"][0]["goal"] == goal


def test_a_loop_over_several_screens_is_one_stuck_stretch() -> None:
    screens = ["x", "a", "b", "a", "b", "a", "b", "y"]
    pressed = [("up",), ("left",), ("right",), ("left",), ("right",), ("left",), ("right",), ("up",)]
    assert find_stuck(screens, pressed) == [False, True, True, True, True, True, True, False]
    assert find_stuck(["a"] * 3, [("up",), ("down",), ("up",)]) == [False] * 3
    assert find_stuck([None] * 3, [("up",)] * 3) == [False] * 3
