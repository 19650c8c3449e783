import itertools
import random
from dataclasses import replace

import numpy as np
import pytest

from pokegemma.data.checks.leakage import (
    check_frame_turns,
    check_history,
    check_prompts,
    check_target_text,
    leaked_words,
)
from pokegemma.data.checks.records import find_splits
from pokegemma.data.checks.text_probe import advantage_p_value, check_text_probe
from pokegemma.data.prompts import build_context, build_output, parse_answer
from tests.datasets import make_sample, play_session, put_leak_back, write_dataset, write_split


@pytest.fixture
def real_splits(real_dataset):
    return find_splits(real_dataset)


def reasoned(reasoning, *, goal="leave the house", question="Next button?"):
    output = build_output(button="up", reasoning=reasoning, context="navigation")
    return make_sample("s", 1, "up", output=output, context=build_context(goal), question=question)


def test_a_reasoning_in_its_own_prompt_is_found_however_it_is_written():
    sample = reasoned("North_clear_path", question="Recent: the north clear path.\nNext button?")
    assert leaked_words(sample, "leave the house") == "north clear path"


def test_five_words_of_a_long_reasoning_are_enough():
    sample = reasoned("I think the door to the north is open now", question="Seen: door to the north is shut")
    assert leaked_words(sample, None) == "door to the north is"
    assert leaked_words(replace(sample, question="Seen: door to the south"), None) is None


def test_a_reasoning_that_repeats_the_goal_or_the_rules_is_no_leak():
    assert leaked_words(reasoned("heal_pokemon", goal="heal pokemon"), "heal pokemon") is None
    assert leaked_words(reasoned("choose the next button"), None) is None


def test_a_goal_that_changes_within_a_session_explains_nothing(tmp_path):
    samples = []
    for turn, goal in enumerate(["leave the house", "walk to the blue house", "talk to the old man"], start=1):
        sample = make_sample("s", turn, "up", context=build_context(goal))
        output = build_output(button="up", reasoning=goal, context="")
        samples.append(replace(sample, output=output, metadata={**sample.metadata, "goal": goal}))
    check = check_target_text([write_split(tmp_path / "train.jsonl", samples, draw=False)])
    assert check.status == "FAIL"
    assert check.summary.startswith("2 of 3 prompts") and check.summary.endswith("(66.7 %)")


def test_a_short_common_word_is_no_leak():
    assert leaked_words(reasoned("menu", question="The menu is open"), None) is None
    assert leaked_words(reasoned("continuing", question="continuing"), None) == "continuing"


def test_one_coincidence_in_many_warns(tmp_path):
    samples = play_session("s", num_turns=150)
    samples[7] = replace(samples[7], question=f"nothing stands in the way 8\n{samples[7].question}")
    check = check_target_text([write_split(tmp_path / "train.jsonl", samples, draw=False)])
    assert check.status == "WARN"
    assert check.details == (
        "train.jsonl:8 (s/8): its prompt contains 'nothing stands in the way', as its reasoning does",
    )


def test_earlier_buttons_that_are_one_turn_ahead_fail(tmp_path):
    samples = play_session("s")
    assert check_history([write_split(tmp_path / "train.jsonl", samples, draw=False)]).status == "PASS"
    ahead = [
        replace(sample, metadata={**sample.metadata, "previous_buttons": later.previous_buttons})
        for sample, later in itertools.pairwise(samples)
    ]
    check = check_history([write_split(tmp_path / "train.jsonl", ahead, draw=False)])
    assert check.status == "FAIL"
    assert check.details[0].startswith("train.jsonl:2 (s/2): earlier buttons")


def test_histories_of_several_buttons_a_turn_pass(tmp_path):
    first = make_sample("s", 1, "up")
    first = replace(first, metadata={**first.metadata, "buttons": ["up", "up", "a"]})
    samples = [first, make_sample("s", 2, "b", ["up", "up", "a"]), make_sample("s", 5, "b", ["left"])]
    check = check_history([write_split(tmp_path / "train.jsonl", samples, draw=False)])
    assert (check.status, check.summary) == ("PASS", "0 of 1 samples disagree with the turn before them")


def test_a_window_with_a_frame_of_the_next_turn_fails(tmp_path):
    samples = play_session("s")
    check = check_frame_turns([write_split(tmp_path / "train.jsonl", samples, draw=False)])
    assert (check.status, check.summary) == ("PASS", "0 of 20 windows show a frame from after their decision")
    samples[4] = replace(samples[4], metadata={**samples[4].metadata, "frame_turns": [6]})
    check = check_frame_turns([write_split(tmp_path / "train.jsonl", samples, draw=False)])
    assert (check.status, check.details) == ("FAIL", ("train.jsonl:5 (s/5): its window shows turn 6",))


@pytest.mark.parametrize("stated", [None, [1, 1], ["1"]])
def test_windows_that_do_not_state_their_turns_are_not_checked(tmp_path, stated):
    sample = make_sample("s", 1, "up")
    sample = replace(sample, metadata={**sample.metadata, "frame_turns": stated})
    assert check_frame_turns([write_split(tmp_path / "train.jsonl", [sample], draw=False)]).status == "SKIP"


def test_p_values_are_those_of_the_exact_one_sided_mcnemar_test():
    better, worse = np.array([1, 1, 1, 1, 0, 1], bool), np.array([0, 0, 0, 0, 1, 1], bool)
    assert advantage_p_value(better, worse) == pytest.approx(6 / 32)  # four or five wins of five
    assert advantage_p_value(worse, better) == pytest.approx(31 / 32)
    assert advantage_p_value(better, better) == pytest.approx(1)


def test_buttons_that_follow_from_earlier_ones_pass_the_probe(tmp_path):
    """After `a` comes `b`: both Markov and the probe beat repeat-previous, and nothing has leaked."""
    train, held_out = write_dataset(tmp_path, num_sessions=12, num_turns=60)
    check = check_text_probe(train, held_out)
    assert check.status == "PASS"
    accuracy = {line.split(":")[0]: float(line.split(", ")[1].split(" %")[0]) for line in check.details}
    assert accuracy["probe"] > accuracy["repeat-previous"] + 10


def test_a_prompt_that_names_the_button_fails_the_probe(tmp_path):
    train, held_out = write_dataset(tmp_path, num_turns=40)
    hints = {"up": "north", "down": "south", "left": "west", "right": "east", "a": "talk", "b": "end"}
    leaked = [
        write_split(
            split.path,
            [
                replace(sample, context=f"{sample.context}\nScene: {hints.get(sample.metadata['buttons'][0], 'menu')}")
                for sample in split.samples()
            ],
            draw=False,
        )
        for split in (train, held_out)
    ]
    check = check_text_probe(*leaked)
    assert check.status == "FAIL"
    assert check.summary.startswith("the prompt gives the button away: probe 9")


def test_a_hint_worth_less_than_the_earlier_buttons_fails(tmp_path):
    """Repeat-previous is right four times of five; one prompt in three names its button."""
    generator, splits = random.Random(0), []
    for name in ("train", "eval"):
        samples = []
        for session in range(10):
            pressed = ["up"]
            for turn in range(1, 31):
                button = pressed[-1] if generator.random() < 0.8 else generator.choice(["up", "down", "left"])
                sample = make_sample(f"{name}{session}", turn, button, pressed)
                hint = f"Scene: {button}stairs" if turn % 3 == 0 else "Scene: none"
                samples.append(replace(sample, question=f"{sample.question} {hint}"))
                pressed.append(button)
        splits.append(write_split(tmp_path / f"{name}.jsonl", samples, draw=False))
    check = check_text_probe(*splits)
    assert check.status == "FAIL"
    assert check.summary.startswith("the prompt gives the button away")


def test_no_eval_answer_skips_the_probe(tmp_path):
    train, held_out = write_dataset(tmp_path, num_turns=2)
    bad = write_split(held_out.path, [replace(sample, output="?") for sample in held_out.samples()], draw=False)
    assert check_text_probe(train, bad).status == "SKIP"


def test_prompts_without_any_word_skip_the_probe(tmp_path):
    splits = write_dataset(tmp_path, num_turns=2)
    bare = [
        write_split(split.path, [replace(sample, context="!", question="?") for sample in split.samples()], draw=False)
        for split in splits
    ]
    assert check_text_probe(*bare).status == "SKIP"


def test_words_in_eval_prompts_only_do_not_stop_the_probe(tmp_path):
    train, held_out = write_dataset(tmp_path, num_turns=2)
    bare = [replace(sample, context="!", question="?") for sample in train.samples()]
    assert check_text_probe(write_split(train.path, bare, draw=False), held_out).status == "PASS"


def test_a_goal_that_changes_within_a_session_is_no_prompt_of_ours(tmp_path):
    samples = [make_sample("s", turn, "up") for turn in (1, 2)]
    goal = "press up"
    samples[1] = replace(samples[1], context=build_context(goal), metadata={**samples[1].metadata, "goal": goal})
    check = check_prompts([write_split(tmp_path / "train.jsonl", samples, draw=False)])
    assert check.details == ("train.jsonl:2 (s/2): metadata.goal is not that of its session's first sample",)


def test_a_goal_that_an_earlier_version_cut_elsewhere_is_ours(tmp_path):
    goal = "leave the house and walk north to the next town, then heal your pokemon"
    sample = make_sample("s", 1, "up")
    cut, other = (sample.context.replace("leave the house", text) for text in ("leave the house and…", "press up…"))
    metadata = {**sample.metadata, "goal": goal}
    for context, status in ((cut, "PASS"), (other, "FAIL")):
        samples = [replace(sample, context=context, metadata=metadata)]
        assert check_prompts([write_split(tmp_path / "train.jsonl", samples, draw=False)]).status == status


def test_one_other_prompt_in_a_hundred_warns_and_two_fail(tmp_path):
    samples = play_session("s", num_turns=100)
    samples[6] = replace(samples[6], question="Next button?")
    check = check_prompts([write_split(tmp_path / "train.jsonl", samples, draw=False)])
    assert check.status == "WARN"
    assert check.details == (
        "train.jsonl:7 (s/7): question not as metadata.goal and metadata.previous_buttons make them",
    )
    samples[7] = replace(samples[7], context=f"{samples[7].context} ")
    assert check_prompts([write_split(tmp_path / "train.jsonl", samples, draw=False)]).status == "FAIL"


def own_detected_context(sample, number):
    return replace(sample, question=f"Situation: {parse_answer(sample.output).context}\n{sample.question}")


def hint_in_every_tenth(sample, number):
    hint = f"Hint: press {parse_answer(sample.output).button}\n"
    return replace(sample, question=f"{hint if number % 10 == 0 else ''}{sample.question}")


def reasoning_in_camel_case(sample, number):
    reasoning = "".join(word.title() for word in parse_answer(sample.output).reasoning.split("_"))
    return replace(sample, context=f"{sample.context}\n{reasoning}")


@pytest.mark.parametrize("leak", [own_detected_context, hint_in_every_tenth, reasoning_in_camel_case])
def test_partial_leaks_in_the_real_sessions_fail(real_splits, tmp_path, leak):
    leaked = [
        write_split(
            tmp_path / split.path.name, [leak(sample, at) for at, sample in enumerate(split.samples())], draw=False
        )
        for split in real_splits
    ]
    check = check_prompts(leaked)
    assert check.status == "FAIL"
    assert len(check.details) == (51 if leak is hint_in_every_tenth else 503)


def test_the_real_sessions_pass(real_splits):
    assert check_prompts(real_splits).status == "PASS"
    assert check_target_text(real_splits).summary.startswith("0 of 503 prompts")
    assert check_history(real_splits).status == "PASS"
    assert check_frame_turns(real_splits).summary.startswith("0 of 503 windows")
    assert check_text_probe(*real_splits).status == "PASS"


def test_the_real_sessions_with_the_original_leak_put_back_fail_both_checks(real_splits, real_runs):
    leaked = [put_leak_back(split, real_runs) for split in real_splits]
    text, probe = check_target_text(leaked), check_text_probe(*leaked)
    assert text.status == "FAIL"
    assert len(text.details) > 490
    assert probe.status == "FAIL"
    assert probe.summary.startswith("the prompt gives the button away")


def test_leaked_observations_alone_fail_the_probe(real_splits, real_runs):
    leaked = [put_leak_back(split, real_runs, keys=("observations",)) for split in real_splits]
    assert check_text_probe(*leaked).status == "FAIL"
