"""All text that the model reads or writes: prompts, answers, and the parser of its answers."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pokegemma.data.samples import Sample, find_control_token
from pokegemma.data.trajectories import Trajectory
from pokegemma.errors import PokegemmaError

BUTTONS = ("up", "down", "left", "right", "a", "b", "start", "select")
"""The eight buttons, in the order of every table and score vector of the project."""

Layout = Literal["grid", "frames", "trajectory"]
LAYOUTS: tuple[Layout, ...] = ("grid", "frames", "trajectory")
"""grid: one 2x2 picture a sample; frames: each frame of the window as a picture of its own; trajectory: a stretch of a
session as one conversation."""

ANSWER_PREFIX = '{"button": "'
"""The beginning of every answer; the name of the button follows."""

NEXT_QUESTION = "Next button?"
"""The end of every question, and the whole question where the conversation already contains the rest."""

MAX_PREVIOUS_BUTTONS = 8
MAX_GOAL_BYTES = 200
"""Longest goal in a prompt, in bytes of UTF-8, which is also the largest number of its tokens.

A token of SentencePiece with byte fallback, as Gemma's, covers at least one byte. There is no lower bound for all
texts: "gqgqgq" has one token for each letter.
"""

MAX_PROMPT_TOKENS = 310
"""Largest number of tokens of context and question together with Gemma's tokenizer, for any goal.

The rules have 80, the line of the goal at most 206 (its bytes), the question at most 24. In English a goal of 200 bytes
has about 50.
"""

_RULES = (
    "You play Pokémon on a Game Boy Advance. You see the latest game screens, oldest first "
    "(in a grid: t=0 to t=3); the last one is now. Choose the next button: " + ", ".join(BUTTONS) + ". "
    'Answer with JSON: {"button": "...", "reasoning": "...", "context": "..."}'
)


class AnswerError(ValueError):
    """The text is not an answer: no JSON object, or no valid button."""


@dataclass(frozen=True)
class Answer:
    """A parsed answer of the model."""

    button: str
    reasoning: str
    context: str


def shorten(text: str, *, max_bytes: int) -> str:
    """Return `text` on one line, cut with an ellipsis where it would have more than `max_bytes` bytes of UTF-8."""
    text = " ".join(text.split())
    if len(text.encode()) <= max_bytes:
        return text
    return text.encode()[: max_bytes - len("…".encode())].decode(errors="ignore").rstrip() + "…"


def build_context(goal: str | None) -> str:
    """Return the text before the pictures: the rules, then the session's goal."""
    goal = shorten(goal or "", max_bytes=MAX_GOAL_BYTES)
    return f"{_RULES}\nGoal: {goal or 'none given'}"


def is_context(text: str, goal: str | None) -> bool:
    """Return whether `build_context` made a text of a goal, or did so in an earlier version, which cut it elsewhere."""
    shown = text.removeprefix(f"{_RULES}\nGoal: ")
    was_cut = shown != text and shown.endswith("…") and " ".join((goal or "").split()).startswith(shown[:-1])
    return was_cut or text == build_context(goal)


def build_question(previous_buttons: Sequence[str]) -> str:
    """Return the text after the pictures: the buttons pressed before this turn, oldest first."""
    pressed = ", ".join(previous_buttons[-MAX_PREVIOUS_BUTTONS:])
    return f"Buttons pressed so far: {pressed or 'none'}\n{NEXT_QUESTION}"


def build_output(*, button: str, reasoning: str, context: str) -> str:
    """Return the answer as one line of JSON, the button first, so that a player may stop reading there."""
    return json.dumps({"button": button, "reasoning": reasoning, "context": context}, ensure_ascii=False)


def parse_answer(text: str) -> Answer:
    """Read an answer back from `text`, which must be the JSON object alone (surrounding white space is fine).

    Raises:
        AnswerError: it is not such an object, or its button is not one of `BUTTONS`.
    """
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AnswerError(f"not JSON: {text[:80]!r}") from error
    if not isinstance(record, dict):
        raise AnswerError(f"not a JSON object: {text[:80]!r}")
    button = record.get("button")
    if button not in BUTTONS:
        raise AnswerError(f"button {button!r} is not one of {', '.join(BUTTONS)}")
    texts = {name: record.get(name, "") for name in ("reasoning", "context")}
    for name, value in texts.items():
        if not isinstance(value, str):
            raise AnswerError(f"{name} is not text: {value!r}")
    return Answer(button=button, **texts)


def sample_images(sample: Sample, layout: Layout) -> tuple[str, ...]:
    """Return the pictures that `layout` shows, oldest first, as paths relative to the JSONL file.

    Raises:
        PokegemmaError: `layout` is grid and the sample has no grid picture.
    """
    if layout == "frames":
        return sample.frames
    if layout == "trajectory":  # the first frame of a session fills its window several times
        return tuple(dict.fromkeys(sample.frames))
    if sample.image is None:
        raise PokegemmaError(f"{sample.id} has no grid picture (converted with --no_grid_images); use --layout frames")
    return (sample.image,)


def build_messages(sample: Sample, layout: Layout) -> list[dict[str, Any]]:
    """Return the conversation for a chat template: context, one image slot a picture, question, and the answer.

    Raises:
        PokegemmaError: a text contains a control token of the model.
    """
    _check_text(sample)
    content = [_text(sample.context), *({"type": "image"} for _ in sample_images(sample, layout))]
    return [_user(*content, _text(sample.question)), _answer(sample)]


def trajectory_images(trajectory: Trajectory) -> tuple[str, ...]:
    """Return the pictures of a stretch: the first decision's window, then each decision's own frame.

    A stretch that begins with context needs no window: the context is one.
    """
    first, *others = trajectory.samples
    window = first.frames[-1:] if trajectory.num_context else sample_images(first, "trajectory")
    return (*window, *(sample.frames[-1] for sample in others))


def build_trajectory_messages(trajectory: Trajectory) -> list[dict[str, Any]]:
    """Return a stretch as a conversation: context and frames so far, question, answer, then frame, answer, frame ...

    Earlier answers are the history; a question repeats the buttons only where these answers do not contain them: after
    turns that are not samples, and turns with several buttons.

    Raises:
        PokegemmaError: a text contains a control token of the model.
    """
    for sample in trajectory.samples:
        _check_text(sample)
    first = trajectory.samples[0]
    num_images = len(trajectory_images(trajectory)) - len(trajectory.samples) + 1
    images = [{"type": "image"}] * num_images
    messages = [_user(_text(first.context), *images, _text(first.question)), _answer(first)]
    for before, sample in zip(trajectory.samples, trajectory.samples[1:], strict=False):
        known = (*before.previous_buttons, *filter(None, [answer_button(before.output)]))[-MAX_PREVIOUS_BUTTONS:]
        question = NEXT_QUESTION if known == tuple(sample.previous_buttons) else sample.question
        messages += [_user({"type": "image"}, _text(question)), _answer(sample)]
    return messages


def answer_button(text: str) -> str | None:
    """Return the button of an answer, or None where the text is not a valid answer."""
    try:
        return parse_answer(text).button
    except AnswerError:
        return None


def _check_text(sample: Sample) -> None:
    for text in (sample.context, sample.question, sample.output):
        if token := find_control_token(text):
            raise PokegemmaError(f"{sample.id}: its text contains {token}, a control token of the model")


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _user(*content: dict[str, str]) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


def _answer(sample: Sample) -> dict[str, Any]:
    return {"role": "assistant", "content": [_text(sample.output)]}
