"""What a model is shown at play is what the converter makes of the recorded play."""

import hashlib
import random
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pokegemma.data.convert import WindowOptions
from pokegemma.data.corpus import convert_corpus
from pokegemma.data.samples import Sample, read_samples
from pokegemma.data.trajectories import cut_trajectories
from pokegemma.play.emulators.toy import ToyEmulator
from pokegemma.play.history import History, PlayView
from pokegemma.play.players import RandomPlayer
from pokegemma.play.recording.journal import PlayedTurn, SessionJournal

GOAL = "leave the room"
PAUSES_AFTER = (5, 6, 11)
STARTS_AT = 9  # the turn before which a state was loaded


def digest(picture: Image.Image | Path) -> str:
    image = Image.open(picture) if isinstance(picture, Path) else picture
    return hashlib.sha256(np.asarray(image.convert("RGB")).tobytes()).hexdigest()


@pytest.mark.parametrize(("num_frames", "min_frames"), [(4, 4), (2, 1), (1, 1)])
@pytest.mark.parametrize("layout", ["grid", "frames", "trajectory"])
def test_play_shows_what_the_converter_writes(layout: str, num_frames: int, min_frames: int, tmp_path: Path) -> None:
    window = WindowOptions(num_frames, min_frames, max_gap_s=10.0)
    history = History(PlayView(layout, window, max_decisions=1000))
    history.start(GOAL)
    game, player, time_s, shown = ToyEmulator(5), RandomPlayer(1), 0.0, []
    start = datetime(2026, 1, 1)
    with SessionJournal(tmp_path / "runs" / "session_1", goal=GOAL, facts={}) as journal:
        for number in range(1, 16):
            if number == STARTS_AT:
                history.start(GOAL)
            screen, button = game.screen(), player.decide(game.screen()).button
            example = history.see(screen, time=time_s)
            sample = example if isinstance(example, Sample) else example.samples[-1]
            names = history.picture_names(example)
            shown.append((sample, [digest(history.picture(name)) for name in names]))
            when = start + timedelta(seconds=time_s)
            turn = PlayedTurn(number, when, button, (button,), None, "", "", "model", new_start=number == STARTS_AT)
            journal.begin(screen)
            journal.record(turn)
            game.press(button)
            history.pressed(button)
            time_s += 11.0 if number in PAUSES_AFTER else 1.0
    convert_corpus(tmp_path / "runs", tmp_path / "dataset", window=window, eval_fraction=0.0, num_workers=1)
    samples = list(read_samples(tmp_path / "dataset" / "train.jsonl"))
    assert len(samples) == len(shown) == 15
    for converted, (sample, pictures) in zip(samples, shown, strict=True):
        assert (sample.context, sample.question) == (converted.context, converted.question)
        assert sample.previous_buttons == converted.previous_buttons
        assert len(sample.frames) == len(converted.frames)
        if layout == "grid":
            assert pictures == [digest(tmp_path / "dataset" / converted.image)]
        elif layout == "frames":
            assert pictures == [digest(tmp_path / "dataset" / frame) for frame in converted.frames]


def test_a_conversation_goes_on_as_trajectories_are_cut() -> None:
    view = PlayView("trajectory", max_decisions=4, overlap_decisions=1)
    history, rng, seen = History(view), random.Random(0), []
    for number in range(9):
        screen = Image.new("RGB", (240, 160), (number, 0, 0))
        seen.append(history.see(screen))
        history.pressed(rng.choice(("up", "a")))
    samples = [trajectory.samples[-1] for trajectory in seen]
    cut = list(cut_trajectories(samples, max_decisions=4, overlap=1))
    assert [len(trajectory.samples) for trajectory in seen] == [1, 2, 3, 4, 2, 3, 4, 2, 3]
    for trajectory in cut:
        whole = next(one for one in seen if one.id == trajectory.id and len(one.samples) == len(trajectory.samples))
        assert whole.num_context == trajectory.num_context


def test_a_button_that_does_not_exist_is_refused() -> None:
    history = History(PlayView())
    with pytest.raises(ValueError, match="'jump' is not one of"):
        history.pressed("up", "jump")
    with pytest.raises(ValueError, match="'jump' is not one of"):
        RandomPlayer().pressed("jump")


def test_frames_without_a_time_allow_a_longer_pause() -> None:
    def window_after(*times: float | None) -> int:
        history = History(PlayView(window=WindowOptions(max_gap_s=10.0)))
        for number, time in enumerate(times):
            sample = history.see(Image.new("RGB", (4, 4), (number, 0, 0)), time=time)
        return len(set(sample.frames))

    assert window_after(0, 10, 20, 30) == 4
    assert window_after(0, 10, 21) == 1
    assert window_after(0, None, 19) == 3  # two frames in 19 s
    assert window_after(0, None, 21) == 1
    assert window_after(None, None, None) == 3
