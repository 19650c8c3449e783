"""A conversation with a growing cache says what a row of its own would say."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pokegemma.data.prompts import Layout
from pokegemma.data.samples import read_samples
from pokegemma.data.trajectories import Trajectory, cut_trajectories
from pokegemma.evaluation import predict
from pokegemma.evaluation.predict import Predictor
from pokegemma.evaluation.trajectories import predict_trajectories
from pokegemma.gemma.batches.collator import Gemma3Collator
from pokegemma.gemma.button_scores import place_branches, score_buttons
from pokegemma.gemma.loading import open_checkpoint


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def predictor(request: pytest.FixtureRequest, tiny_model: Path, toy_dataset: Path) -> Predictor:
    processor = open_checkpoint(tiny_model).processor
    collator = Gemma3Collator(processor=processor, layout="trajectory", dataset_folder=toy_dataset)
    model = open_checkpoint(tiny_model).load_model(attn_implementation=request.param)
    return Predictor(model=model, collator=collator, max_new_tokens=12)


@pytest.fixture(scope="module")
def trajectories(toy_dataset: Path) -> list[Trajectory]:
    return list(cut_trajectories(read_samples(toy_dataset / "train.jsonl"), max_decisions=7, overlap=2))[:3]


def whole_rows(predictor: Predictor, trajectories: list[Trajectory]) -> list[dict[str, torch.Tensor]]:
    """Return the prompt before every counted answer as a row of its own, as without a cache."""
    tokenizer, batches = predictor.collator.processor.tokenizer, []
    for trajectory in trajectories:
        row, paths = predictor.collator.tokenize(trajectory), predictor.collator.picture_paths(trajectory)
        for start in row.answer_starts[trajectory.num_context :]:
            ids = torch.tensor([row.ids[:start]])
            types = (ids == tokenizer.image_token_id).long()
            pictures = predictor.collator.read_paths(paths[: int(types.sum()) // 4])
            batches.append(
                {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": types, **pictures}
            )
    return batches


def test_scores_and_answers_are_those_of_whole_rows(predictor: Predictor, trajectories: list[Trajectory]) -> None:
    said = predict_trajectories(predictor, trajectories)
    tokenizer, tokens = predictor.collator.processor.tokenizer, predictor.collator.button_tokens
    rows = whole_rows(predictor, trajectories)
    assert len(rows) == len(said.answers) == len(said.scores) == sum(len(one.counted) for one in trajectories)
    assert max(row["input_ids"].shape[1] for row in rows) > 4 * 64  # far beyond the sliding window
    for row, scores, answer in zip(rows, said.scores, said.answers, strict=True):
        expected = score_buttons(predictor.model, row, tokens)[0].numpy()
        assert scores == pytest.approx(expected, abs=1e-5)
        assert answer == predict.generate_answers(predictor.model, row, tokenizer, max_new_tokens=12)[0]


def test_each_frame_is_encoded_once(predictor: Predictor, trajectories: list[Trajectory]) -> None:
    shown = []
    tower = predictor.model.model.vision_tower
    handle = tower.register_forward_pre_hook(
        lambda module, args, kwargs: shown.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    predict_trajectories(predictor, trajectories[:1], generate=False)
    handle.remove()
    assert len(shown) == len(trajectories[0].samples)
    assert shown[1:] == [1] * (len(shown) - 1)


@pytest.mark.parametrize("layout", ["frames", "trajectory"])
def test_with_cached_features_no_picture_is_opened_no_tower_is_run_and_nothing_changes(
    layout: Layout,
    predictor: Predictor,
    trajectories: list[Trajectory],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    samples = list(trajectories[0].samples)

    def scores(of: Predictor) -> np.ndarray:
        if layout == "trajectory":
            return np.asarray(predict_trajectories(of, trajectories[:1], generate=False).scores)
        return of.predict(samples, batch_size=4, generate=False)[1]

    plain = replace(predictor, collator=replace(predictor.collator, layout=layout))
    expected = scores(plain)
    cached = replace(plain, collator=replace(plain.collator))
    cached.use_features(tmp_path / "features", trajectories[:1] if layout == "trajectory" else samples)

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("a picture was opened, or the tower was run")

    monkeypatch.setattr(Image, "open", refuse)
    handle = predictor.model.model.vision_tower.register_forward_pre_hook(refuse)
    try:
        assert scores(cached) == pytest.approx(expected, abs=1e-5)
        with pytest.raises(AssertionError, match="a picture was opened"):
            scores(plain)
    finally:
        handle.remove()


def test_every_decision_has_a_latency(predictor: Predictor, trajectories: list[Trajectory]) -> None:
    said = predict_trajectories(predictor, trajectories[:2], generate=False)
    assert said.answers is None
    assert list(said.latency_s) == ["scored"]
    assert len(said.latency_s["scored"]) == sum(len(one.counted) for one in trajectories[:2])
    assert min(said.latency_s["scored"]) > 0
    assert np.allclose(said.scores.sum(1), 1)


def test_the_probability_of_a_branch_is_the_product_of_its_tokens(predictor: Predictor) -> None:
    tokens = predictor.collator.button_tokens
    added, branches, depth = place_branches(tokens)
    assert added[: len(tokens.prefix)] == list(tokens.prefix)
    assert depth[: len(tokens.prefix)] == list(range(len(tokens.prefix)))
    for number, group in itertools.groupby(range(len(tokens.prefix), len(added)), key=lambda at: branches[at]):
        places = list(group)
        assert [added[at] for at in places] == list(tokens.branches[number - 1][:-1])
        assert [depth[at] for at in places] == [len(tokens.prefix) + at for at in range(len(places))]
