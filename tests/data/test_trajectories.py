"""Cutting sessions into stretches, and the conversation that a stretch becomes."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pokegemma.data import prompts
from pokegemma.data.samples import Sample, read_samples
from pokegemma.data.trajectories import Trajectory, cut_trajectories


def decision(session: str, turn: int, button: str = "up", previous: tuple[str, ...] = ()) -> Sample:
    frames = tuple(f"frames/{session}/{max(turn - back, 1)}.png" for back in (3, 2, 1, 0))
    return Sample(
        id=f"{session}/{turn}",
        frames=frames,
        image=None,
        context=f"Goal: {session}",
        question=prompts.build_question(previous),
        output=prompts.build_output(button=button, reasoning="r", context="c"),
        metadata={"session": session, "turn": turn, "previous_buttons": list(previous)},
    )


def session(name: str, length: int) -> list[Sample]:
    return [decision(name, turn) for turn in range(1, length + 1)]


def test_a_long_session_is_cut_with_an_overlap_that_is_not_counted() -> None:
    cut = list(cut_trajectories([*session("a", 7), *session("b", 2)], max_decisions=4, overlap=1))
    turns = [([sample.metadata["turn"] for sample in one.samples], one.num_context) for one in cut]
    assert turns == [([1, 2, 3, 4], 0), ([4, 5, 6, 7], 1), ([1, 2], 0)]
    assert cut[2].samples[0].session == "b"


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    max_decisions=st.integers(1, 12),
    overlap=st.integers(0, 11),
)
def test_every_decision_is_counted_once_in_order(lengths: list[int], max_decisions: int, overlap: int) -> None:
    overlap = min(overlap, max_decisions - 1)
    samples = [sample for number, length in enumerate(lengths) for sample in session(f"s{number}", length)]
    cut = list(cut_trajectories(samples, max_decisions=max_decisions, overlap=overlap))
    assert [sample for one in cut for sample in one.counted] == samples
    for one in cut:
        assert len(one.samples) <= max_decisions
        assert len({sample.session for sample in one.samples}) == 1
        assert one.num_context in (0, overlap)


@pytest.mark.parametrize("overlap", [-1, 4, 5])
def test_an_overlap_that_leaves_nothing_is_refused(overlap: int) -> None:
    with pytest.raises(ValueError, match="leaves nothing of 4"):
        list(cut_trajectories(session("a", 9), max_decisions=4, overlap=overlap))


def texts(message: dict) -> list[str]:
    return [part.get("text", "<image>") for part in message["content"]]


def test_a_stretch_shows_a_window_then_frame_answer_frame_answer() -> None:
    first, second = decision("a", 5, "up", ("b",)), decision("a", 6, "down", ("b", "up"))
    messages = prompts.build_trajectory_messages(Trajectory((first, second)))
    assert [message["role"] for message in messages] == ["user", "assistant", "user", "assistant"]
    assert texts(messages[0]) == ["Goal: a", *["<image>"] * 4, "Buttons pressed so far: b\nNext button?"]
    assert texts(messages[2]) == ["<image>", "Next button?"]
    assert texts(messages[3]) == [second.output]
    assert prompts.trajectory_images(Trajectory((first, second))) == (*first.frames, "frames/a/6.png")


def test_a_stretch_that_begins_with_context_needs_no_window() -> None:
    first, second = decision("a", 5, "up", ("b",)), decision("a", 6, "down", ("b", "up"))
    trajectory = Trajectory((first, second), num_context=1)
    assert texts(prompts.build_trajectory_messages(trajectory)[0]) == ["Goal: a", "<image>", first.question]
    assert prompts.trajectory_images(trajectory) == ("frames/a/5.png", "frames/a/6.png")


def test_the_first_frame_of_a_session_is_shown_once() -> None:
    first, second = decision("a", 1), decision("a", 2, "down", ("up",))
    assert first.frames == ("frames/a/1.png",) * 4
    assert prompts.trajectory_images(Trajectory((first, second))) == ("frames/a/1.png", "frames/a/2.png")
    assert texts(prompts.build_trajectory_messages(Trajectory((first,)))[0]).count("<image>") == 1


@pytest.mark.parametrize(
    "previous",
    [("b", "up", "up"), ("b", "up", "a"), ("b",), ("up",)],
    ids=["two buttons in a turn", "a turn without a sample", "a failed turn", "other history"],
)
def test_buttons_that_the_answers_do_not_tell_are_told(previous: tuple[str, ...]) -> None:
    first, second = decision("a", 5, "up", ("b",)), decision("a", 7, "down", previous)
    messages = prompts.build_trajectory_messages(Trajectory((first, second)))
    assert texts(messages[2]) == ["<image>", second.question]


def test_the_history_may_be_longer_than_a_question_tells() -> None:
    history = ("a", "b", "up", "down", "left", "right", "a", "b")
    first, second = decision("a", 9, "up", history), decision("a", 10, "down", (*history[1:], "up"))
    assert texts(prompts.build_trajectory_messages(Trajectory((first, second)))[2])[-1] == "Next button?"


def test_no_question_of_a_stretch_tells_its_own_answer(toy_dataset: Path) -> None:
    for one in cut_trajectories(read_samples(toy_dataset / "train.jsonl"), max_decisions=8, overlap=2):
        shown = ""
        for message, sample in zip(prompts.build_trajectory_messages(one)[::2], one.samples, strict=True):
            shown = json.dumps(message)
            assert sample.output not in shown
            assert json.loads(sample.output)["reasoning"] not in shown
