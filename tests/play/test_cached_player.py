"""A session decided frame by frame from a cache gets the scores of the recorded samples as whole rows."""

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pokegemma.data.convert import WindowOptions
from pokegemma.data.prompts import BUTTONS, LAYOUTS, Layout
from pokegemma.data.samples import Sample, read_samples
from pokegemma.data.trajectories import cut_trajectories
from pokegemma.errors import PokegemmaError
from pokegemma.evaluation.predict import Predictor
from pokegemma.gemma.batches.collator import Gemma3Collator
from pokegemma.gemma.button_scores import encoded_pictures, score_buttons
from pokegemma.gemma.cached_conversation import Conversation
from pokegemma.gemma.families import stop_tokens
from pokegemma.gemma.image_attention import change_processor
from pokegemma.gemma.loading import open_checkpoint
from pokegemma.play.cached_player import CachedPlayer
from pokegemma.play.history import PlayView
from pokegemma.play.prompt_cache import PromptCache

MAX_DECISIONS, OVERLAP = 5, 2


@pytest.fixture(scope="module")
def trained(tiny_model: Path, toy_dataset: Path) -> Predictor:
    processor = open_checkpoint(tiny_model).processor
    collator = Gemma3Collator(processor=processor, layout="grid", dataset_folder=toy_dataset)
    return Predictor(model=open_checkpoint(tiny_model).load_model(), collator=collator)


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
            types = collator.token_types(ids)
            num_soft = int((ids == collator.processor.tokenizer.image_token_id).sum())
            pictures = collator.read_paths(paths[: num_soft // collator.processor.image_seq_length])
            yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": types, **pictures}


def expected_scores(predictor: Predictor, session: list[Sample]) -> np.ndarray:
    tokens = predictor.collator.button_tokens
    rows = whole_rows(predictor, session)
    return np.stack([score_buttons(predictor.model, row, tokens)[0].numpy() for row in rows])


def play(player: CachedPlayer, session: list[Sample], folder: Path, *, prepare: bool) -> np.ndarray:
    """Show a recorded session's frames, by turns as files and as grabbed pictures, and press what was pressed."""
    scores = []
    for number, sample in enumerate(session):
        path = folder / sample.frames[-1]
        if prepare:
            player.prepare()
        decision = player.decide(path if number % 2 else Image.open(path))
        assert decision.button == BUTTONS[int(decision.probabilities.argmax())]
        scores.append(decision.probabilities)
        player.pressed(*sample.metadata["buttons"], answer=sample.output)
    return np.stack(scores)


def new_player(predictor: Predictor, session: list[Sample]) -> CachedPlayer:
    view = PlayView(predictor.collator.layout, max_decisions=MAX_DECISIONS, overlap_decisions=OVERLAP)
    player = CachedPlayer(predictor, view)
    player.start(session[0].metadata["goal"])
    return player


@pytest.mark.parametrize("prepare", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_decisions_in_play_are_those_of_the_recorded_samples(
    layout: Layout, prepare: bool, trained: Predictor, session: list[Sample], toy_dataset: Path
) -> None:
    predictor = in_layout(trained, layout)
    expected = expected_scores(predictor, session)
    assert len(expected) == len(session) > MAX_DECISIONS + 1  # a second conversation begins
    assert np.ptp(expected, axis=0).max() > 1e-3  # decisions that differ: else any of them would do
    player = new_player(predictor, session)
    assert play(player, session, toy_dataset, prepare=prepare) == pytest.approx(expected, abs=1e-5)
    assert (player.cache._said[0], player.cache._said.count(2)) == (2, 1)  # the last prompt's only BOS


def test_a_grabbed_picture_with_transparency_is_seen_as_its_file_is(
    trained: Predictor, session: list[Sample], tmp_path: Path
) -> None:
    half = Image.new("RGBA", (240, 160), (200, 10, 20, 90))
    half.save(tmp_path / "half.png")
    scores = [new_player(trained, session).decide(frame).probabilities for frame in (half, tmp_path / "half.png")]
    assert np.array_equal(*scores)


def test_a_model_that_is_causal_inside_pictures_is_asked_so(
    tiny_model: Path, trained: Predictor, session: list[Sample], toy_dataset: Path
) -> None:
    processor = open_checkpoint(tiny_model).processor
    change_processor(processor, "causal")
    causal = replace(trained, collator=replace(trained.collator, processor=processor, layout="frames"))
    expected = expected_scores(causal, session)
    assert np.abs(expected - expected_scores(in_layout(trained, "frames"), session)).max() > 1e-4
    scores = play(new_player(causal, session), session, toy_dataset, prepare=True)
    assert scores == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("layout", ["frames", "trajectory"])
def test_a_frame_is_encoded_once_and_a_prepared_decision_computes_its_own_frame_only(
    layout: Layout, trained: Predictor, session: list[Sample], toy_dataset: Path
) -> None:
    predictor = in_layout(trained, layout)
    player = new_player(predictor, session)
    frames = {(toy_dataset / sample.frames[-1]).read_bytes() for sample in session}
    for sample in session:
        player.prepare()
        before = player.cache.num_computed
        player.decide(toy_dataset / sample.frames[-1])
        player.pressed(*sample.metadata["buttons"], answer=sample.output)
        if sample is not session[0]:  # its frame fills the window
            own = player.cache.num_computed - before
            assert own < 4 + predictor.collator.count_tokens(session[-1]) / 2
    assert player.cache.num_encoded == len(frames)


def test_what_is_fixed_in_a_session_is_computed_once(
    trained: Predictor, session: list[Sample], toy_dataset: Path
) -> None:
    player = new_player(trained, session)
    play(player, session, toy_dataset, prepare=False)
    prompts_of = [trained.collator.tokenize(sample) for sample in session]
    before_picture = prompts_of[0].ids.index(trained.collator.processor.tokenizer.image_token_id)
    total = sum(row.num_prompt for row in prompts_of)
    assert player.cache.num_computed == total - before_picture * (len(session) - 1)


def test_the_next_prompt_tells_what_was_pressed_and_not_what_was_decided(
    trained: Predictor, session: list[Sample], toy_dataset: Path
) -> None:
    frame = toy_dataset / session[0].frames[-1]
    for pressed, told in (((), "none"), (("select",), "select"), (("b", "start"), "b, start")):
        player = new_player(in_layout(trained, "frames"), session)
        player.decide(frame)
        player.pressed(*pressed)
        text, _ = player._prompt(player.history.expected())
        assert f"Buttons pressed so far: {told}\n" in text


def test_a_turn_without_a_press_is_no_turn_of_the_conversation(
    trained: Predictor, session: list[Sample], toy_dataset: Path
) -> None:
    predictor = in_layout(trained, "trajectory")
    player, skipped = new_player(predictor, session), new_player(predictor, session)
    skipped.decide(toy_dataset / session[4].frames[-1])
    skipped.pressed()
    scores = play(player, session[:3], toy_dataset, prepare=False)
    others = play(skipped, session[:3], toy_dataset, prepare=True)
    text, _ = skipped._prompt(skipped.history.expected())
    assert text.count("<start_of_turn>model") == 4  # three answered, one open
    assert np.abs(scores - others).max() > 1e-6  # but its frame was seen


def test_frames_that_no_prompt_shows_again_are_dropped(
    trained: Predictor, session: list[Sample], toy_dataset: Path
) -> None:
    player = new_player(trained, session)
    for sample in session:
        player.decide(toy_dataset / sample.frames[-1])
    assert len(player.history._frames) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": WindowOptions(num_frames=0)}, "num_frames 0"),
        ({"window": WindowOptions(max_gap_s=0)}, "max_gap_s 0"),
        ({"max_decisions": 3, "overlap_decisions": 3}, "overlap_decisions 3"),
    ],
)
def test_numbers_that_leave_nothing_are_refused(options: dict, message: str) -> None:
    with pytest.raises(PokegemmaError, match=message):
        PlayView(**options)


def test_a_goal_with_control_symbols_and_a_damaged_frame_are_one_line(trained: Predictor, tmp_path: Path) -> None:
    player = CachedPlayer(trained, PlayView())
    with pytest.raises(PokegemmaError, match="--goal contains <start_of_image>"):
        player.start("<start_of_image>")
    (tmp_path / "frame.png").write_bytes(b"")
    with pytest.raises(PokegemmaError, match="cannot be read as a picture"):
        player.decide(tmp_path / "frame.png")


def test_a_prompt_may_begin_as_the_last_did_end_before_it_or_be_the_same(
    trained: Predictor, session: list[Sample], toy_dataset: Path
) -> None:
    predictor = in_layout(trained, "frames")
    cache, tokens = PromptCache(predictor), predictor.collator.button_tokens
    row = predictor.collator.tokenize(session[3])
    pictures = [Image.open(toy_dataset / path).convert("RGB") for path in session[3].frames]
    image_token, per_picture = predictor.collator.processor.tokenizer.image_token_id, 4
    for num_pictures, end in ((4, row.num_prompt), (4, row.num_prompt), (2, None), (4, row.num_prompt)):
        soft = [at for at, token in enumerate(row.ids) if token == image_token]
        ids = row.ids[: end or soft[num_pictures * per_picture] - 1]
        batch = {"input_ids": torch.tensor([ids])}
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["token_type_ids"] = (batch["input_ids"] == image_token).long()
        batch |= predictor.collator.read_paths(session[3].frames[:num_pictures])
        expected = score_buttons(predictor.model, batch, tokens)[0].numpy()
        assert cache.score(ids, pictures[:num_pictures]) == pytest.approx(expected, abs=1e-5)
        cache.prepare(ids, pictures[:num_pictures])
        assert cache.num_tokens == len(ids)
    computed = cache.num_computed
    cache.prepare(row.ids[:10], [])
    assert (cache.num_computed, cache.num_tokens) == (computed, row.num_prompt)
    with pytest.raises(ValueError, match="16 soft tokens for 3 pictures of 4"):
        cache.score(row.ids[: row.num_prompt], pictures[:3])


@pytest.mark.parametrize("part", ["model.language_model.layers.2", "lm_head"])
def test_a_decision_that_was_interrupted_leaves_nothing_in_the_next(
    part: str, trained: Predictor, session: list[Sample], toy_dataset: Path
) -> None:
    predictor = in_layout(trained, "trajectory")
    whole, broken = new_player(predictor, session), new_player(predictor, session)
    expected = play(whole, session[:3], toy_dataset, prepare=False)
    play(broken, session[:2], toy_dataset, prepare=False)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    hook = predictor.model.get_submodule(part).register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        broken.prepare()
    hook.remove()
    assert broken.decide(toy_dataset / session[2].frames[-1]).probabilities == pytest.approx(expected[2], abs=1e-5)


def test_a_generated_answer_is_that_of_the_whole_prompt(
    trained: Predictor, session: list[Sample], toy_dataset: Path
) -> None:
    predictor = replace(in_layout(trained, "frames"), max_new_tokens=12)
    cache, tokens = PromptCache(predictor), predictor.collator.button_tokens
    for sample in session[:4]:
        row = predictor.collator.tokenize(sample)
        ids = row.ids[: row.num_prompt]
        pictures = [Image.open(toy_dataset / path).convert("RGB") for path in sample.frames]
        begun = (*tokens.prefix, *tokens.branches[2])
        whole = Conversation(predictor.model)
        batch = predictor.collator.read_paths(sample.frames)
        soft = encoded_pictures(predictor.model, batch)
        types = predictor.collator.token_types(torch.tensor([*ids, *begun]))
        whole.say([*ids, *begun], types, soft)
        stops = stop_tokens(predictor.collator.processor.tokenizer)
        expected = [*begun, *whole.generate(stops=stops, max_new_tokens=12)]
        cache.score(ids, pictures)
        assert cache.write(ids, pictures, begun, max_new_tokens=12) == expected
        assert cache.write(ids, pictures, begun, max_new_tokens=12) == expected  # all of it is in the cache by now
        assert cache._conversation.num_tokens == len(cache._said)


def test_earlier_answers_have_the_reasons_that_the_model_writes(
    trained: Predictor, session: list[Sample], toy_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = in_layout(trained, "trajectory")
    outputs = iter([sample.output for sample in session])

    def write(cache: PromptCache, ids: list[int], pictures: list, begun: tuple, **_: object) -> list[int]:
        tokenizer = cache.predictor.collator.processor.tokenizer
        return tokenizer(next(outputs) + "<end_of_turn>", add_special_tokens=False)["input_ids"]

    monkeypatch.setattr(PromptCache, "write", write)
    expected = play(new_player(predictor, session), session[:4], toy_dataset, prepare=True)
    player, scores = new_player(predictor, session), []
    for sample in session[:4]:
        scores.append(player.decide(toy_dataset / sample.frames[-1]).probabilities)
        player.pressed(*sample.metadata["buttons"])
        player.prepare()
    assert [sample.output for sample in player.history._stretch] == [sample.output for sample in session[:4]]
    assert np.stack(scores) == pytest.approx(expected, abs=1e-5)


def test_an_answer_that_is_none_leaves_the_button_without_a_reason(
    trained: Predictor, session: list[Sample], toy_dataset: Path
) -> None:
    predictor = replace(in_layout(trained, "trajectory"), max_new_tokens=3)
    player = CachedPlayer(predictor, PlayView("trajectory"), decide="generate")
    choice = player.decide(toy_dataset / session[0].frames[-1])
    assert (choice.button in BUTTONS, choice.reasoning) == (True, "")
    player.pressed(choice.button)
    expected = json.dumps({"button": choice.button, "reasoning": "", "context": ""})
    assert [sample.output for sample in player.history._stretch] == [expected]


def test_a_new_start_is_a_new_session(trained: Predictor, session: list[Sample], toy_dataset: Path) -> None:
    predictor = in_layout(trained, "trajectory")
    fresh, again = new_player(predictor, session), new_player(predictor, session)
    play(again, session[3:8], toy_dataset, prepare=True)
    again.start(session[0].metadata["goal"])
    expected = play(fresh, session[:3], toy_dataset, prepare=False)
    assert play(again, session[:3], toy_dataset, prepare=False) == pytest.approx(expected, abs=1e-5)
