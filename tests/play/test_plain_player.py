"""Players without a cache decide as those with one, and for families that have none."""

from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest

from pokegemma.data.convert import WindowOptions
from pokegemma.data.samples import Sample, read_samples
from pokegemma.errors import PokegemmaError
from pokegemma.evaluation.predict import load_predictor
from pokegemma.play.cached_player import CachedPlayer
from pokegemma.play.history import PlayView
from pokegemma.play.plain_player import PlainPlayer


@pytest.fixture(scope="module")
def session(toy_dataset: Path) -> list[Sample]:
    samples = read_samples(toy_dataset / "train.jsonl")
    return next(list(group) for _, group in groupby(samples, key=lambda sample: sample.session))


@pytest.mark.parametrize("layout", ["grid", "frames"])
@pytest.mark.parametrize("num_frames", [2, 4])
def test_a_plain_player_decides_as_the_cached_one(
    layout: str, num_frames: int, tiny_model: Path, toy_dataset: Path, session: list[Sample]
) -> None:
    predictor = load_predictor(tiny_model, layout=layout, device="cpu")
    view = PlayView(layout, WindowOptions(num_frames, num_frames))
    scores = []
    for player in (CachedPlayer(predictor, view), PlainPlayer(predictor, view)):
        player.start("leave")
        scores.append([])
        for sample in session[:6]:
            scores[-1].append(player.decide(toy_dataset / sample.frames[-1]).probabilities)
            player.pressed(*sample.metadata["buttons"])
            player.prepare()
    assert np.array(scores[1]) == pytest.approx(np.array(scores[0]), abs=1e-5)


def test_a_generated_answer_without_a_button_is_none(tiny_model: Path, toy_dataset: Path, session: list) -> None:
    predictor = replace(load_predictor(tiny_model, layout="grid", device="cpu"), max_new_tokens=3)
    choice = PlainPlayer(predictor, PlayView(), decide="generate").decide(toy_dataset / session[0].frames[-1])
    assert (choice.button, choice.probabilities) == (None, None)


def test_what_needs_a_cache_or_scores_is_refused(tiny_model: Path) -> None:
    predictor = load_predictor(tiny_model, layout="grid", device="cpu")
    with pytest.raises(PokegemmaError, match="--layout trajectory"):
        PlainPlayer(predictor, PlayView("trajectory"))
    with pytest.raises(PokegemmaError, match=r"--temperature 0\.5"):
        PlainPlayer(predictor, PlayView(), decide="generate", temperature=0.5)
