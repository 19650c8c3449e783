"""Checks that a prompt does not contain its answer: its text, the answer's words, the earlier buttons, the frames.

The prompts of the original project contained the reasoning and observations of the turn to be predicted.
`text_probe` has a fifth check.
"""

import re
from collections.abc import Iterable, Iterator

from pokegemma.data.checks.records import NO_SAMPLES, Check, Split, percent, skipped
from pokegemma.data.prompts import AnswerError, answer_button, build_context, build_question, is_context, parse_answer
from pokegemma.data.samples import Sample

MAX_LEAK_SHARE = 0.01
"""Above this share of samples, target text in the prompt is a leak and not a coincidence."""

RUN_WORDS = 5
"""If a reasoning and its prompt share this many words in a row, it is not a coincidence."""

MIN_SPECIFIC_LETTERS = 8
"""A reasoning of one word counts only if it has at least this many letters, since words such as "menu" are frequent."""

WORD = re.compile(r"[^\W_]+")


def _words(text: str) -> str:
    """Return the lower-case words of `text` between single spaces, so that `in` matches whole words in a row."""
    return " ".join(["", *WORD.findall(text.lower()), ""])


def allowed_prompt(sample: Sample, goal: str | None) -> str:
    """Return what a prompt may contain: the rules, the session's goal, the earlier buttons."""
    return f"{build_context(goal)}\n{build_question(sample.previous_buttons)}"


def with_goals(samples: Iterable[tuple[str, Sample]]) -> Iterator[tuple[str, Sample, str | None]]:
    """Yield (where, sample, goal): what its session's first sample gives as the goal.

    A session has one goal. So a text that changes from turn to turn is not a goal, even if its key is "goal".
    """
    goals: dict[str, str | None] = {}
    for where, sample in samples:
        goal = sample.metadata.get("goal")
        yield where, sample, goals.setdefault(sample.session, goal if isinstance(goal, str) else None)


def _prompt_problem(sample: Sample, goal: str | None) -> str | None:
    if sample.metadata.get("goal") != goal:
        return "metadata.goal is not that of its session's first sample"
    is_right = {
        "context": is_context(sample.context, goal),
        "question": sample.question == build_question(sample.previous_buttons),
    }
    names = [name for name, right in is_right.items() if not right]
    return f"{' and '.join(names)} not as metadata.goal and metadata.previous_buttons make them" if names else None


def check_prompts(splits: Iterable[Split]) -> Check:
    """Fail if more than `MAX_LEAK_SHARE` of the prompts are not what `prompts` builds of goal and earlier buttons.

    The check is exact. So it also finds a leak in every tenth prompt, or one in other words than the answer's.
    """
    details, num_samples = [], 0
    for split in splits:
        for where, sample, goal in with_goals(split.located()):
            num_samples += 1
            if problem := _prompt_problem(sample, goal):
                details.append(f"{where} ({sample.id}): {problem}")
    if not num_samples:
        return skipped("prompts", NO_SAMPLES)
    if not details:
        return Check("prompts", "PASS", f"{num_samples} prompts contain the goal and the earlier buttons, nothing else")
    status = "FAIL" if len(details) > MAX_LEAK_SHARE * num_samples else "WARN"
    summary = f"{len(details)} of {num_samples} prompts contain something else than goal and earlier buttons"
    return Check("prompts", status, f"{summary} ({percent(len(details), num_samples)})", tuple(details))


def leaked_words(sample: Sample, goal: str | None) -> str | None:
    """Return words of the sample's reasoning that are in its prompt but not in the rules or the goal, or None."""
    try:
        reasoning = _words(parse_answer(sample.output).reasoning)
    except AnswerError:
        return None
    words = reasoning.split()
    if not words or (len(words) == 1 and len(words[0]) < MIN_SPECIFIC_LETTERS):
        return None
    prompt = _words(f"{sample.context}\n{sample.question}")
    size = min(RUN_WORDS, len(words))
    runs = [f" {' '.join(words[at : at + size])} " for at in range(len(words) - size + 1)]
    found = [run for run in runs if run in prompt]
    if not found:
        return None
    allowed = _words(f"{allowed_prompt(sample, goal)}\n{goal or ''}")  # the prompt's own goal may be cut
    return next((run.strip() for run in found if run not in allowed), None)


def check_target_text(splits: Iterable[Split]) -> Check:
    """Fail if more than `MAX_LEAK_SHARE` of the prompts contain words of the reasoning to be written; warn at any."""
    details, num_samples = [], 0
    for split in splits:
        for where, sample, goal in with_goals(split.located()):
            num_samples += 1
            if words := leaked_words(sample, goal):
                details.append(f"{where} ({sample.id}): its prompt contains {words!r}, as its reasoning does")
    summary = f"{len(details)} of {num_samples} prompts contain the reasoning of their answer"
    if not num_samples:
        return skipped("target text in prompt", NO_SAMPLES)
    if not details:
        return Check("target text in prompt", "PASS", summary)
    status = "FAIL" if len(details) > MAX_LEAK_SHARE * num_samples else "WARN"
    return Check("target text in prompt", status, f"{summary} ({percent(len(details), num_samples)})", tuple(details))


def check_history(splits: Iterable[Split]) -> Check:
    """Fail if a sample's earlier buttons do not end with what the turn before it pressed.

    A list that is one turn ahead contains the answer. Only samples whose turn before is the preceding sample of the
    file can be compared.
    """
    details, num_compared = [], 0
    for split in splits:
        before: Sample | None = None
        for where, sample in split.located():
            previous, before = before, sample
            if previous is None:
                continue
            if sample.metadata["turn"] != previous.metadata["turn"] + 1 or sample.episode != previous.episode:
                continue
            num_compared += 1
            button = answer_button(previous.output)
            pressed = previous.metadata.get("buttons")
            pressed = [button] if pressed is None else pressed
            expected = [*previous.previous_buttons, *pressed][-len(sample.previous_buttons) or None :]
            if button is not None and sample.previous_buttons != expected:
                details.append(
                    f"{where} ({sample.id}): earlier buttons {', '.join(sample.previous_buttons) or 'none'}; "
                    f"the samples before have {', '.join(expected)}"
                )
    if not num_compared:
        return skipped("earlier buttons", "no sample follows the turn before it")
    summary = f"{len(details)} of {num_compared} samples disagree with the turn before them"
    return Check("earlier buttons", "FAIL" if details else "PASS", summary, tuple(details))


def check_frame_turns(splits: Iterable[Split]) -> Check:
    """Fail if a window shows a frame of a later turn than its decision: it shows what the button did.

    Only samples whose metadata states the turns of their frames can be checked.
    """
    details, num_stated = [], 0
    for split in splits:
        for where, sample in split.located():
            turns = [turn for turn, _ in sample.frame_turns]
            num_stated += bool(turns)
            if turns and max(turns) > sample.metadata["turn"]:
                details.append(f"{where} ({sample.id}): its window shows turn {max(turns)}")
    if not num_stated:
        return skipped("later frames", "no sample states which turns its frames come from")
    summary = f"{len(details)} of {num_stated} windows show a frame from after their decision"
    return Check("later frames", "FAIL" if details else "PASS", summary, tuple(details))
