"""A session decided frame by frame from a cache says what the recorded samples say as whole rows."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pokegemma.data.prompts import BUTTONS, LAYOUTS, Layout
from pokegemma.data.samples import Sample, read_samples
from pokegemma.data.trajectories import cut_trajectories
from pokegemma.evaluation import predict
from pokegemma.evaluation.decider import Decider
from pokegemma.evaluation.predict import Predictor
from pokegemma.training import models
from pokegemma.training.collator import Gemma3Collator

MAX_DECISIONS, OVERLAP = 5, 2


@pytest.fixture(scope="module")
def trained(tiny_model: Path, toy_dataset: Path) -> Predictor:
    processor = models.load_processor(tiny_model)
    collator = Gemma3Collator(processor=processor, layout="grid", dataset_folder=toy_dataset)
    return Predictor(model=models.load_model(tiny_model), collator=collator)


@pytest.fixture(scope="module")
def session(toy_dataset: Path) -> list[Sample]:
    samples = read_samples(toy_dataset / "train.jsonl")
    return next(list(group) for _, group in groupby(samples, key=lambda sample: sample.session))


def in_layout(predictor: Predictor, layout: Layout) -> Predictor:
    return replace(predictor, collator=replace(predictor.collator, layout=layout))


def whole_rows(predictor: Predictor, session: list[Sample]) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the prompt of every decision of a recorded session as a batch of its own."""
    collator = predictor.collator
    if collator.layout != "trajectory":
        yield from (collator.prompts([sample]) for sample in session)
        return
    for trajectory in cut_trajectories(session, max_decisions=MAX_DECISIONS, overlap=OVERLAP):
        row, paths = collator.tokenize(trajectory), collator.picture_paths(trajectory)
        for start in row.answer_starts[trajectory.num_context :]:
            ids = torch.tensor([row.ids[:start]])
            types = (ids == collator.processor.tokenizer.image_token_id).long()
            pictures = collator.read_paths(paths[: int(types.sum()) // collator.processor.image_seq_length])
            yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": types, **pictures}


def expected_scores(predictor: Predictor, session: list[Sample]) -> np.ndarray:
    tokens = predictor.collator.button_tokens
    rows = whole_rows(predictor, session)
    return np.stack([predict.score_buttons(predictor.model, row, tokens)[0].numpy() for row in rows])


def play(decider: Decider, session: list[Sample], folder: Path, *, prepare: bool) -> np.ndarray:
    """Show a recorded session's frames, by turns as files and as grabbed pictures, and press what was pressed."""
    scores = []
    for number, sample in enumerate(session):
        path = folder / sample.frames[-1]
        if prepare:
            decider.prepare()
        decision = decider.decide(path if number % 2 else Image.open(path))
        assert decision.button == BUTTONS[int(decision.probabilities.argmax())]
        scores.append(decision.probabilities)
        decider.pressed(*sample.metadata["buttons"], answer=sample.output)
    return np.stack(scores)


def new_decider(predictor: Predictor, session: list[Sample]) -> Decider:
    goal = session[0].metadata["goal"]
    return Decider(predictor, goal=goal, max_decisions=MAX_DECISIONS, overlap_decisions=OVERLAP)


@pytest.mark.parametrize("prepare", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_decisions_in_play_are_those_of_the_recorded_samples(
    layout: Layout, prepare: bool, trained: Predictor, session: list[Sample], toy_dataset: Path
) -> None:
    predictor = in_layout(trained, layout)
    expected = expected_scores(predictor, session)
    assert len(expected) == len(session) > MAX_DECISIONS + 1  # a second conversation begins
    assert np.ptp(expected, axis=0).max() > 1e-3  # decisions that differ: else any of them would do
    scores = play(new_decider(predictor, session), session, toy_dataset, prepare=prepare)
    assert scores == pytest.approx(expected, abs=1e-5)
