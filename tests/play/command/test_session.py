"""One session as scripts/play.py plays it."""

import io
import json
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pokegemma.data.eevee_v1.journals import JOURNAL_FILE, read_journal
from pokegemma.errors import PokegemmaError
from pokegemma.play.command.live_view import LiveView, describe_turn, draw_blocks, panel_lines
from pokegemma.play.command.options import PlayOptions
from pokegemma.play.command.session import STATE_FILE, format_summary_table, play_session, stage_latencies
from pokegemma.play.emulators.toy import ToyEmulator
from pokegemma.play.recording.journal import PlayedTurn
from pokegemma.play.toy.world import ToyWorld


def test_a_recorded_session_is_continued_from_its_last_state(tmp_path: Path) -> None:
    whole = play_session(PlayOptions(player="expert", seed=5, quiet=True))
    first = play_session(PlayOptions(player="expert", seed=5, record=str(tmp_path), max_turns=8, quiet=True))
    rest = play_session(PlayOptions(player="expert", seed=5, resume=str(first.session), quiet=True))
    assert first.result.buttons + rest.result.buttons == whole.result.buttons
    assert (first.result.ended, rest.result.ended) == ("max_turns", "done")
    journal = read_journal(first.session / JOURNAL_FILE)
    assert [turn["turn"] for turn in journal.turns] == list(range(1, len(whole.result.buttons) + 1))
    assert journal.turns[8]["new_start"] is True
    facts = journal.head["facts"]
    assert (facts["player"], facts["press_timing"]["hold_frames"], facts["seed"]) == ("expert", 12, 5)


def test_after_a_crash_play_goes_on_from_the_state_that_was_saved_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = PlayOptions(player="expert", seed=5, record=str(tmp_path), save_every=3, quiet=True)
    press, count = ToyWorld.press, 0

    def crash(world: ToyWorld, button: str) -> bool:
        nonlocal count
        count += 1
        if count == 6:
            raise MemoryError
        return press(world, button)

    with monkeypatch.context() as patch:
        patch.setattr(ToyWorld, "press", crash)
        with pytest.raises(MemoryError):
            play_session(options)
    (folder,) = tmp_path.iterdir()
    saved, played = ToyEmulator(5), ToyEmulator(5)
    saved.load((folder / STATE_FILE).read_bytes())
    for _ in range(3):
        played.press(played.world.expert_button())
    assert saved.save() == played.save()
    result = play_session(PlayOptions(player="expert", seed=5, resume=str(folder), quiet=True)).result
    assert result.turns[0].number == 6  # five turns were recorded
    assert result.ended == "done"


def test_a_state_starts_another_session(tmp_path: Path) -> None:
    first = play_session(PlayOptions(player="expert", seed=5, record=str(tmp_path), max_turns=8, quiet=True))
    state = str(first.session / STATE_FILE)
    rest = play_session(PlayOptions(player="expert", seed=5, load_state=state, quiet=True))
    whole = play_session(PlayOptions(player="expert", seed=5, quiet=True))
    assert rest.result.buttons == whole.result.buttons[8:]


def test_a_state_that_was_saved_in_python_is_where_play_starts(tmp_path: Path) -> None:
    game = ToyEmulator(5)
    game.press(game.world.expert_button())
    (tmp_path / "state.bin").write_bytes(game.save())
    options = {"player": "expert", "load_state": str(tmp_path / "state.bin"), "quiet": True}
    whole = play_session(PlayOptions(player="expert", seed=5, quiet=True))
    assert play_session(PlayOptions(seed=5, **options)).result.buttons == whole.result.buttons[1:]
    with pytest.raises(PokegemmaError, match=r"state\.bin: .* room 5 on level 1, and this is room 6"):
        play_session(PlayOptions(seed=6, **options))
    (tmp_path / "state.bin").unlink()
    with pytest.raises(PokegemmaError, match=r"state\.bin cannot be read: No such file"):
        play_session(PlayOptions(seed=5, **options))


def test_corrections_of_the_expert_are_recorded(tmp_path: Path) -> None:
    options = PlayOptions(player="random", seed=5, record=str(tmp_path), max_turns=12, correct=True, quiet=True)
    journal = read_journal(play_session(options).session / JOURNAL_FILE)
    assert all(turn["correction"]["by"] == "expert" for turn in journal.turns)


def test_the_summary_has_every_stage_and_fits_json(tmp_path: Path) -> None:
    summary = play_session(PlayOptions(player="random", seed=5, max_turns=3, quiet=True))
    latencies = stage_latencies(summary.result)
    assert list(latencies) == ["screen", "decide", "press", "record", "prepare", "show"]
    assert sum(value["share"] for value in latencies.values()) == pytest.approx(1)
    assert json.loads(json.dumps(summary.to_record()))["num_turns"] == 3
    assert "3 turns; ended: --max_turns" in format_summary_table(summary)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--model_path or --server"),
        ({"player": "expert", "game": "red.gba"}, "only the toy game"),
        ({"player": "random", "resume": "a", "record": "b"}, "--resume continues"),
        ({"player": "random", "noise": 1.5}, "--noise 1.5"),
        ({"player": "random", "temperature": -1}, "--temperature -1"),
        ({"player": "random", "max_turns": 0}, "--max_turns 0"),
        ({"player": "random", "hold": 0}, "--hold 0"),
        ({"player": "random", "wait": 3}, "--wait 3: must be at least 4"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict, message: str) -> None:
    with pytest.raises(PokegemmaError, match=message):
        PlayOptions(**options)


def test_a_folder_without_a_journal_is_not_continued(tmp_path: Path) -> None:
    with pytest.raises(PokegemmaError, match=f"--resume {tmp_path}"):
        play_session(PlayOptions(player="random", resume=str(tmp_path), quiet=True))


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PokegemmaError, match=f"--record: {tmp_path}/file/session_.* cannot be written: Not a dir"):
        play_session(PlayOptions(player="random", record=str(tmp_path / "file"), quiet=True))


def turn(**changes: object) -> PlayedTurn:
    values = {
        "number": 12,
        "time": datetime(2026, 1, 1),
        "button": "up",
        "pressed": ("up",),
        "probabilities": (0.9, 0.1, 0, 0, 0, 0, 0, 0),
        "reasoning": "the path leads up",
        "situation": "navigation",
        "decided_by": "model:outputs/merged",
    }
    return PlayedTurn(**{**values, **changes})


def test_a_turn_is_one_line_where_there_is_no_terminal() -> None:
    assert describe_turn(turn()) == "   12  up       90%  the path leads up"
    noise = turn(pressed=("left",), decided_by="noise")
    assert describe_turn(noise) == "   12  left   noise, up was chosen (90%)"
    assert describe_turn(turn(probabilities=None, reasoning="")) == "   12  up"
    stream = io.StringIO()
    LiveView(stream).show(turn(), Image.new("RGB", (240, 160)))
    assert stream.getvalue() == "   12  up       90%  the path leads up\n"


def test_a_screen_is_drawn_in_half_blocks() -> None:
    screen = Image.fromarray(np.zeros((160, 240, 3), np.uint8))
    screen.paste((255, 0, 0), (0, 0, 240, 80))
    lines = draw_blocks(screen, columns=46, rows=40)
    assert (len(lines), {line.count("▀") for line in lines}) == (15, {46})
    assert "38;2;255;0;0" in lines[0] and "38;2;0;0;0" in lines[-1]
    assert draw_blocks(screen, columns=20, rows=40) == []


def test_the_panel_marks_what_was_pressed() -> None:
    lines = panel_lines(turn(pressed=("left",), decided_by="stuck"))
    assert lines[2].startswith("  up     ██████████████   ") and lines[2].endswith("90%")
    assert lines[4].startswith("> left")
    assert "by stuck" in lines and "the path leads up" in lines
