"""The inspection page, opened in a browser and clicked through."""

import json
from pathlib import Path

import pytest
from PIL import Image

from pokegemma.data.inspection.views import SessionView, find_marks, summarise
from tests.browser import Browser, open_browser
from tests.conftest import failed_turn, frame_png, raw_frame, turn_record, write_session
from tests.processes import call_script

BUTTONS = ["up", "up", "a", "b", "up"]
SCREENS = [5, 5, 9, 60, 90]


def write_recordings(runs: Path) -> None:
    """Write two sessions: in the first a press without effect and a failed answer; the second shows a screen of it."""
    turns = [turn_record(number, button) for number, button in enumerate(BUTTONS, start=1)] + [failed_turn(6)]
    raw = [raw_frame(number, red) for number, red in enumerate([*SCREENS, 120], start=1)]
    write_session(runs / "session_first", turns, steps=[], enhanced_turns=raw, goal="go <b>north</b> & home")
    battle = turn_record(1, "down")
    battle["ai_analysis"]["parsed_json"] |= {"context_detected": "battle", "reasoning": "</script><i>flee</i>"}
    write_session(runs / "session_second", [battle], steps=[], enhanced_turns=[raw_frame(1, 60)], start_time="2")


def inspect(*arguments: object) -> Path:
    page = Path(str(arguments[-1]))
    done = call_script("inspect_data", "--num_workers", 1, "--data_path", *arguments[:-1], "--output_file", page)
    assert done.returncode == 0, done.stderr
    return page


def shown_turns(browser: Browser) -> list[str]:
    """Return the turns whose thumbnails are shown."""
    shown = "[...document.querySelectorAll('.thumb')].filter(thumb => thumb.getClientRects().length)"
    return browser.evaluate(f"{shown}.map(thumb => thumb.dataset.turn)")


def test_a_page_of_recordings_is_clicked_through(tmp_path: Path) -> None:
    write_recordings(tmp_path / "runs")
    page = inspect(tmp_path / "runs", tmp_path / "page.html")
    with open_browser(tmp_path) as browser:
        browser.open(page)
        assert browser.text("h1") == "6 samples from 7 turns of 2 sessions"
        assert browser.text(".session .goal") == "go <b>north</b> & home"
        assert len(shown_turns(browser)) == 7
        browser.click("#chips button[value=up]")
        assert shown_turns(browser) == ["first/1", "first/2", "first/5"]
        browser.click("#transitions [data-pair='b up']")
        assert shown_turns(browser) == ["first/5"]
        assert browser.text("#count") == "1 of 7 turns"
        browser.click("#reset")
        browser.choose("#situation", "battle")
        assert shown_turns(browser) == ["second/1"]
        browser.click("#reset")
        browser.choose("#goal", "heal your pokemon")
        assert shown_turns(browser) == ["second/1"]
        browser.click("#reset")
        browser.click("#reasons [data-name=parse_failed]")
        assert shown_turns(browser) == ["first/6"]
        browser.click("#reset")
        browser.click("#figures button:nth-child(3)")
        assert shown_turns(browser) == ["first/1"]  # without effect
        for mark, turns in (("repeat", ["first/2"]), ("duplicate", ["first/4", "second/1"])):
            browser.choose("#mark", mark)
            assert shown_turns(browser) == turns
        browser.choose("#mark", "")
        browser.choose("#search", "FLEE")
        assert shown_turns(browser) == ["second/1"]
        assert (browser.problems, browser.requests) == ([], [])


def test_a_turn_is_opened_with_its_conversation_and_its_screen_elsewhere(tmp_path: Path) -> None:
    write_recordings(tmp_path / "runs")
    page = inspect(tmp_path / "runs", tmp_path / "page.html")
    with open_browser(tmp_path) as browser:
        browser.open(page, fragment="mark=duplicate")
        assert shown_turns(browser) == ["first/4", "second/1"]
        browser.click(".thumb[data-turn='first/4']")
        assert browser.text("#detail h2") == "b\nfirst/4"
        assert browser.count("#detail .window .picture") == 4
        assert browser.evaluate("document.querySelectorAll('.block')[0].innerText").split("\n")[-3:] == [
            "Buttons pressed so far: up, up, a",
            "Next button?",
            "",
        ]
        assert json.loads(browser.text(".block.learned pre"))["button"] == "b"
        browser.click("#detail dd a")
        assert browser.text("#detail h2") == "down\nsecond/1"
        assert "</script><i>flee</i>" in browser.text(".block.learned pre")
        browser.press("ArrowLeft")
        assert browser.text("#detail h2") == "b\nfirst/4"
        browser.press("Escape")
        assert browser.count("#detail") == 0
        browser.click(".timeline i[data-turn='first/6']")
        assert browser.text("#prompt") == "Not a sample."
        assert (browser.problems, browser.requests) == ([], [])


def test_each_thumbnail_shows_the_pixels_of_its_frame(tmp_path: Path) -> None:
    turns = [turn_record(number) for number in range(1, 41)]  # in two strips
    raw = [raw_frame(number, 2 * number) for number in range(1, 41)]
    write_session(tmp_path / "runs" / "session_s", turns, steps=[], enhanced_turns=raw)
    page = inspect(tmp_path / "runs", tmp_path / "page.html")
    with open_browser(tmp_path) as browser:
        browser.open(page)
        for number in (1, 17, 32, 33, 40):
            picture = f"document.querySelector(\".thumb[data-turn='s/{number}'] .picture\")"
            browser.evaluate(f"{picture}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
            left, top = browser.evaluate(f"[{picture}.getBoundingClientRect().x, {picture}.getBoundingClientRect().y]")
            with Image.open(browser.screenshot(tmp_path / "shot.png")) as shot:
                colours = {shot.convert("RGB").getpixel((left + 20, top + offset)) for offset in (3, 50, 95)}
            assert colours == {(2 * number, 10, 20)}, number


@pytest.mark.parametrize("layout", ["grid", "frames", "trajectory"])
def test_the_chat_template_writes_what_is_trained(toy_dataset: Path, tiny_model: Path, tmp_path: Path, layout) -> None:
    from pokegemma.data.samples import read_samples
    from pokegemma.gemma.batches.conversation_texts import conversation_texts
    from pokegemma.gemma.loading import open_checkpoint

    samples = list(read_samples(toy_dataset / "train.jsonl"))[:4]
    collator = open_checkpoint(tiny_model).collator(layout=layout, dataset_folder=toy_dataset)
    texts = conversation_texts(collator, samples)
    assert list(texts) == [sample.id for sample in samples]
    if layout == "trajectory":
        assert [len(texts[sample.id]) for sample in samples] == [2, 4, 6, 8]
        return
    (_, [prompt]), (_, [answer]) = texts[samples[0].id]
    row = collator.tokenize(samples[0])
    decode = collator.processor.tokenizer.decode
    assert decode(row.ids[row.num_prompt :]) == answer == f"{samples[0].output}<end_of_turn>\n"
    assert prompt.startswith("<bos><start_of_turn>user\n") and prompt.endswith("<start_of_turn>model\n")
    assert prompt.count("<start_of_image>") == (1 if layout == "grid" else 4)


def test_a_page_of_a_dataset_shows_the_model_s_text(toy_dataset: Path, tiny_model: Path, tmp_path: Path) -> None:
    page = inspect(toy_dataset, "--model_name_or_path", tiny_model, tmp_path / "page.html")
    with open_browser(tmp_path) as browser:
        browser.open(page)
        browser.choose("#split", "eval")
        assert len({turn.partition("/")[0] for turn in shown_turns(browser)}) == 1
        browser.click(".session:not([hidden]) .thumb:not(.other)")
        assert browser.text(".block pre").startswith("<bos><start_of_turn>user\nYou play")
        assert browser.text(".block.learned pre").rstrip().endswith("<end_of_turn>")
        assert (browser.problems, browser.requests) == ([], [])


# Without a browser


def summary(*arguments: object) -> dict:
    done = call_script("inspect_data", "--json", "--num_workers", 1, "--data_path", *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_recordings_and_their_dataset_have_the_same_counts(tmp_path: Path) -> None:
    write_recordings(tmp_path / "runs")
    folders = ("--eevee_data_dir", tmp_path / "runs", "--output_dir", tmp_path / "data")
    assert call_script("convert_eevee_data_v2", *folders, "--num_workers", "1").returncode == 0
    page = ("--output_file", tmp_path / "page.html")
    recorded, converted = summary(tmp_path / "runs", *page), summary(tmp_path / "data", *page)
    assert recorded["turns_without_sample"] == {"parse_failed": 1}
    assert recorded["samples_without_effect"] == recorded["repeated_samples"] == 1
    assert recorded["turns_on_duplicate_screens"] == 2
    assert recorded["screens_with_different_buttons"] == 1
    changing = {"distinct_screens", "picture_bytes"}  # the screen of the last turn is in no window
    assert {key: recorded[key] for key in recorded.keys() - changing} == {
        key: converted[key] for key in converted.keys() - changing
    }


def test_the_real_sessions_have_the_counts_of_the_converter(real_runs: Path, tmp_path: Path) -> None:
    counts = summary(real_runs, "--output_file", tmp_path / "page.html")
    assert [counts[name] for name in ("turns", "samples", "samples_without_effect", "repeated_samples")] == [
        657,
        503,
        53,
        23,
    ]
    assert (tmp_path / "page.html").stat().st_size < 4_000_000


def test_of_many_sessions_some_are_shown(tmp_path: Path) -> None:
    for number in range(5):
        write_session(tmp_path / "runs" / f"session_{number}", [turn_record(1)], start_time=str(number))
    done = call_script(
        "inspect_data", "--data_path", tmp_path / "runs", "--max_sessions", 2, "--output_file", tmp_path / "page.html"
    )
    assert "2 of 5, evenly spread" in done.stdout
    assert "5 sessions were found" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda folder: None, "no such file or folder"),
        (lambda folder: folder.mkdir(), "no session found"),
        (lambda folder: folder.write_text("{}\n"), "none of its lines is a sample"),
        (lambda folder: write_session(folder / "session_s", [], steps=[]), "no turn"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, make, named) -> None:
    make(tmp_path / "data.jsonl")
    done = call_script("inspect_data", "--data_path", tmp_path / "data.jsonl", "--output_file", tmp_path / "page.html")
    errors = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("reading")]
    assert (done.returncode, len(errors)) == (2, 1), done.stderr
    assert named in errors[0]
    assert not (tmp_path / "page.html").exists()


def test_only_a_page_is_replaced(tmp_path: Path) -> None:
    write_session(tmp_path / "runs" / "session_s", [turn_record(1)])
    (tmp_path / "page.html").write_text("mine")
    arguments = ("--data_path", tmp_path / "runs", "--output_file", tmp_path / "page.html")
    assert call_script("inspect_data", *arguments).returncode == 2
    assert (tmp_path / "page.html").read_text() == "mine"
    (tmp_path / "page.html").unlink()
    assert [call_script("inspect_data", *arguments).returncode for _ in range(2)] == [0, 0]


def test_damaged_sessions_and_pictures_are_named(tmp_path: Path) -> None:
    write_session(tmp_path / "runs" / "session_good", [turn_record(1), turn_record(2)])
    (tmp_path / "runs" / "session_good" / "sshots" / "step_0002_grid.png").write_bytes(frame_png(4)[:60])
    write_session(tmp_path / "runs" / "session_cut", [turn_record(1)])
    (tmp_path / "runs" / "session_cut" / "session_data.json").write_text('{"turns": [')
    done = call_script("inspect_data", "--data_path", tmp_path / "runs", "--output_file", tmp_path / "page.html")
    assert done.returncode == 0
    page = (tmp_path / "page.html").read_text()
    assert "session_cut" in page
    assert "step_0002_grid.png unreadable" in page


def test_turns_that_a_dataset_does_not_contain_count_in_all_sessions() -> None:
    sessions = [SessionView(name, "", (), (), (), unseen={"no_effect": 2}) for name in ("a", "b")]
    counts = summarise(sessions, find_marks(sessions))
    assert (counts["turns"], counts["turns_without_sample"]) == (4, {"no_effect": 4})
