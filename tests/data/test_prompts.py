import contextlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pokegemma.data import prompts
from pokegemma.data.prompts import Answer, AnswerError
from pokegemma.data.samples import Sample
from pokegemma.errors import PokegemmaError


def sample(image="g.png"):
    return Sample("s/1", ("1.png", "2.png"), image, "before", "after", "answer", {})


RULES = (
    "You play Pokémon on a Game Boy Advance. You see the latest game screens, oldest first (in a grid: t=0 to t=3); "
    "the last one is now. Choose the next button: up, down, left, right, a, b, start, select. "
    'Answer with JSON: {"button": "...", "reasoning": "...", "context": "..."}\n'
)
RULES_TOKENS, QUESTION_TOKENS = 80, 24
"""What Gemma 3 makes of the rules, and at most of a question. Of the line of the goal: at most a token a byte."""


def check_length(goal, buttons):
    context, question = prompts.build_context(goal), prompts.build_question(buttons)
    assert context.startswith(RULES)
    assert len(question.removeprefix("Buttons pressed so far: ").split("\n")[0].split(", ")) <= 8
    goal_line = context.removeprefix(RULES)
    assert "\n" not in goal_line  # a line break is a token of its own: no token spans two lines
    assert RULES_TOKENS + len(goal_line.encode()) + QUESTION_TOKENS <= prompts.MAX_PROMPT_TOKENS == 310


@settings(max_examples=500)
@given(st.text(st.characters(codec="utf-8"), max_size=2000), st.lists(st.sampled_from(prompts.BUTTONS), max_size=30))
def test_a_prompt_has_at_most_310_tokens_for_any_goal(goal, buttons):
    check_length(goal, buttons)


@pytest.mark.parametrize("goal", ["x" * 10**6, "é" * 5000, "😀 " * 5000, "1 2 3 " * 5000, "gq" * 99, "a\n" * 999])
def test_a_prompt_has_at_most_310_tokens_for_a_hostile_goal(goal):
    check_length(goal, ["select"] * 99)


@given(st.text(st.characters(codec="utf-8"), max_size=200))
def test_a_cut_goal_is_as_long_as_fits_and_begins_as_the_whole_one_does(goal):
    whole = " ".join(goal.split())
    short = prompts.shorten(goal, max_bytes=60)
    assert len(short.encode()) <= 60
    if short != whole:
        assert len(whole.encode()) > 60
        kept = short.removesuffix("…")
        assert whole.startswith(kept)
        following = whole[len(kept) :].lstrip()[0]
        spaces = len(whole[len(kept) :]) - len(whole[len(kept) :].lstrip())
        assert len(short.encode()) + spaces + len(following.encode()) > 60


@pytest.mark.parametrize(
    "goal",
    [
        "you are just outside brock in pewter city, go in and defeat him",  # the longest of the real sessions
        "Leave the room by its door; every sign must be read, and the menu opened whenever the bell rings",  # toy game
    ],
)
def test_goals_that_were_recorded_are_not_cut(goal):
    assert prompts.build_context(goal).endswith(f"Goal: {goal}")


@given(st.sampled_from(prompts.BUTTONS), st.text(), st.text())
def test_an_answer_survives_a_round_trip(button, reasoning, context):
    text = prompts.build_output(button=button, reasoning=reasoning, context=context)
    assert prompts.parse_answer(text) == Answer(button, reasoning, context)
    assert text.startswith(prompts.ANSWER_PREFIX + button + '"')


NO_ANSWERS = [
    "",
    "up",
    "[]",
    '{"button": "jump"}',
    '{"button": "UP"}',
    '{"button": null}',
    '{"button": ["up"]}',
    '{"button": {}}',
    '{"button": "up", "reasoning": 3}',
    '{"button": "up"',
    "[" * 50_000,
    '{"button": "up"} ok',
]
JSON = st.recursive(
    st.none() | st.text() | st.integers(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.just("button"), inner),
    max_leaves=8,
)


@pytest.mark.parametrize("text", NO_ANSWERS)
def test_what_is_no_answer_is_an_answer_error(text):
    with pytest.raises(AnswerError):
        prompts.parse_answer(text)


@settings(max_examples=300, deadline=None)
@given(st.text() | JSON.map(json.dumps))
def test_any_text_is_an_answer_or_an_answer_error(text):
    with contextlib.suppress(AnswerError):
        assert prompts.parse_answer(text).button in prompts.BUTTONS


def test_the_question_shows_the_last_eight_buttons_oldest_first():
    question = prompts.build_question(["start", "a", "a", "a", "a", "a", "a", "a", "b"])
    assert question == "Buttons pressed so far: a, a, a, a, a, a, a, b\nNext button?"


def test_a_goal_is_kept_whole_where_it_is_short_and_marked_where_it_is_cut():
    assert prompts.build_context("defeat\n brock").endswith("Goal: defeat brock")
    assert prompts.build_context("go north " * 100).endswith("…")
    assert prompts.build_context("").endswith("Goal: none given")


def test_a_conversation_has_one_slot_a_picture_and_the_answer_last():
    messages = prompts.build_messages(sample(), "frames")
    assert [part["type"] for part in messages[0]["content"]] == ["text", "image", "image", "text"]
    assert messages[1] == {"role": "assistant", "content": [{"type": "text", "text": "answer"}]}


def test_the_grid_layout_needs_grid_pictures():
    with pytest.raises(PokegemmaError, match=r"--layout frames"):
        prompts.sample_images(sample(image=None), "grid")
