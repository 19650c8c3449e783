"""The benchmark of a decision refuses what it cannot compare, and agrees with a model that answers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import decision_latency
from benchmarks.decision_cost import Rates
from benchmarks.decision_latency import (
    CACHED,
    PLAYED,
    PREPARED,
    SCORED,
    STOPPED,
    WAYS,
    WHOLE,
    BenchmarkOptions,
    Meter,
    Setting,
)
from pokegemma.data.samples import Sample, read_samples
from pokegemma.errors import CheckFailedError, PokegemmaError
from pokegemma.evaluation.predict import Predictor
from pokegemma.gemma.batches.collator import Gemma3Collator
from pokegemma.gemma.loading import open_checkpoint


@pytest.fixture(scope="module")
def session(toy_dataset: Path) -> list[Sample]:
    return list(read_samples(toy_dataset / "train.jsonl"))[:3]


@pytest.fixture
def setting(tiny_model: Path, toy_dataset: Path) -> Setting:
    processor, model = open_checkpoint(tiny_model).processor, open_checkpoint(tiny_model).load_model()
    collator = Gemma3Collator(processor=processor, layout="frames", dataset_folder=toy_dataset)
    return Setting("frames", 56, model, processor, Predictor(model, collator))


def with_buttons(setting: Setting, **changes: list[str | None]) -> Setting:
    same = {way: ["up", "down"] for way in WAYS}
    return replace(setting, buttons={**same, **{getattr(decision_latency, name): new for name, new in changes.items()}})


def test_every_way_is_timed_and_the_cache_gives_the_whole_prompts_scores(
    setting: Setting, session: list[Sample]
) -> None:
    meter = Meter(BenchmarkOptions(max_new_tokens=6), setting)
    meter.run(session[:1], record=False)
    assert setting.buttons == {way: [] for way in WAYS}
    meter.run(session, record=True)
    assert {way: len(times) for way, times in setting.seconds.items()} == dict.fromkeys(WAYS, 3)
    assert setting.buttons[SCORED] == setting.buttons[CACHED] == setting.buttons[PREPARED] == setting.buttons[PLAYED]
    assert 0 < setting.largest_difference < 1e-5
    rows = {row["way"]: row for row in decision_latency.summarise(setting, Rates(1e9, 1e9))}
    flop = [rows[way]["gigaflop"] for way in (WHOLE, STOPPED, SCORED, CACHED, PREPARED, PLAYED)]
    assert flop[0] > flop[1] and flop[2] > flop[3] > flop[4] == flop[5] > 0
    assert "| frames, 56 px: session cache, prepared |" in decision_latency.format_table(list(rows.values()))
    # Random weights write no answers.
    with pytest.raises(CheckFailedError, match="frames, 56 px: no generated text was an answer"):
        decision_latency.check_buttons([setting], exact=False)


def test_a_button_that_differs_is_named_and_fails_in_float32(setting: Setting) -> None:
    assert decision_latency.check_buttons([with_buttons(setting)], exact=True) == []
    other = with_buttons(setting, CACHED=["up", "left"])
    message = "frames, 56 px, session cache: decision 1: left, generated down"
    assert decision_latency.check_buttons([other], exact=False) == [message]
    with pytest.raises(CheckFailedError, match=message):
        decision_latency.check_buttons([other], exact=True)
    off = replace(with_buttons(setting), largest_difference=0.01)
    with pytest.raises(CheckFailedError, match=r"differs by 0\.01"):
        decision_latency.check_buttons([off], exact=True)


@pytest.mark.parametrize(
    ("text", "button"),
    [
        ('{"button": "up", "reasoning": "the way', "up"),
        ('{"button": "start"', "start"),
        ('{"button": "up', "up"),
        ('{"button": "jump", ', None),
        ('{"button": ', None),
        ("up", None),
        ("", None),
    ],
)
def test_a_button_is_read_from_an_answer_cut_off_behind_it(text: str, button: str | None) -> None:
    assert decision_latency.read_button(text) == button


def test_a_session_with_other_turns_in_between_is_not_taken(session: list[Sample], toy_dataset: Path) -> None:
    assert decision_latency.is_whole(session)
    assert not decision_latency.is_whole(session[1:])
    assert not decision_latency.is_whole([session[0], session[2]])
    with pytest.raises(PokegemmaError, match="--num_decisions 99"):
        decision_latency.choose_session(BenchmarkOptions(dataset_path=str(toy_dataset), num_decisions=99))


def floors_of_4b(session: list[Sample], machine: str) -> dict[str, Any]:
    rows = decision_latency.floors_of_4b(session, decision_latency.DATA_SHEETS)
    return {row["way"]: row["floors_ms"][machine] for row in rows}


def test_a_turn_of_a_conversation_reads_less_than_a_prompt_that_repeats_the_buttons(session: list[Sample]) -> None:
    floors = floors_of_4b(session, "M1 Max")
    prepared = ("trajectory: session cache, prepared", "frames: session cache, prepared")
    assert floors[f"448 px, {prepared[0]}"] < floors[f"448 px, {prepared[1]}"]
    assert floors[f"448 px, {prepared[0]}, 4-bit text weights"] <= floors[f"448 px, {prepared[0]}"]


def test_floors_of_the_4b_fall_with_the_picture_and_with_the_cache(session: list[Sample]) -> None:
    floors = floors_of_4b(session, "H100 SXM")
    assert floors["896 px, grid: session cache"] > 5 > floors["448 px, grid: session cache"]
    assert floors["896 px, frames: generate"] > 3 * floors["896 px, frames: session cache, prepared"]
    quantised = "448 px, trajectory: session cache, prepared, 4-bit text weights"
    assert floors[quantised] < floors["448 px, trajectory: session cache, prepared"]


def test_the_made_model_is_taught_and_written_at_both_sizes(
    tiny_model: Path, toy_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make_tiny(folder: Path, *, image_scale: int) -> tuple[Any, Any]:  # the real one takes a minute to learn
        return open_checkpoint(tiny_model).load_model(), open_checkpoint(tiny_model).processor

    monkeypatch.setattr(decision_latency, "make_model", make_tiny)
    samples = list(read_samples(toy_dataset / "train.jsonl"))
    options = BenchmarkOptions(dataset_path=str(toy_dataset), teach_steps=1)
    with pytest.raises(CheckFailedError, match="--teach_steps 1: the model writes no answers yet"):
        decision_latency.make_checkpoints(options, tmp_path, samples)
    monkeypatch.setattr(decision_latency, "CHECK_EVERY", 1)
    monkeypatch.setattr(decision_latency, "can_answer", lambda *arguments: True)
    checkpoints = decision_latency.make_checkpoints(options, tmp_path, samples)
    assert [size for size, _ in checkpoints] == [56, 28]
    large, small = (open_checkpoint(folder).load_model() for _, folder in checkpoints)
    untaught = open_checkpoint(tiny_model).load_model().model
    for name, weight in large.model.language_model.state_dict().items():
        assert weight.equal(small.model.language_model.state_dict()[name])
    taught = large.model.language_model.layers[0].mlp.up_proj.weight
    assert not taught.equal(untaught.language_model.layers[0].mlp.up_proj.weight)
    settings = list(decision_latency.load_settings(options, checkpoints))
    assert [setting.name for setting in settings[::2]] == ["grid, 56 px", "trajectory, 56 px", "frames, 28 px"]
    text, num_prompt, _, num_pictures = decision_latency.generate_plainly(settings[4], samples[3], max_new_tokens=2)
    assert num_prompt == settings[4].predictor.collator.tokenize(samples[3]).num_prompt
    assert num_pictures == 4 and text
