"""The inspection page: one HTML file that loads no other."""

import base64
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pokegemma.data import prompts
from pokegemma.data.frame_pictures import FRAME_SIZE_PX
from pokegemma.data.inspection.frame_strips import FRAMES_PER_STRIP
from pokegemma.data.inspection.views import Marks, SessionView, TurnView, summarise
from pokegemma.data.prompts import BUTTONS, Layout
from pokegemma.data.samples import Sample
from pokegemma.data.trajectories import DEFAULT_MAX_DECISIONS, DEFAULT_OVERLAP, cut_trajectories
from pokegemma.pages import render_page

PAGE_MARK = '<meta name="generator" content="pokegemma inspect_data">'
"""By this line a page is recognised as one that may be replaced."""

ConversationPart = tuple[str, Sequence[str | int]]
"""A part of a conversation: its name, and its texts, with CONTEXT and PICTURE in between."""

Conversations = Mapping[str, Sequence[ConversationPart]]
"""The conversation of each sample, by its id."""

CONTEXT, PICTURE = 0, 1
"""What stands for the session's context, which would be repeated in each sample, and for a picture."""


def render_inspection(
    sessions: Sequence[SessionView],
    marks: Marks,
    *,
    source: str,
    num_found: int,
    problems: Sequence[str],
    blocks: Conversations,
    prompt_note: str,
) -> str:
    """Return the page.

    Args:
        source: what was read, for the head of the page.
        num_found: number of sessions that exist, of which some may not have been read.
        problems: what cannot be read, one line each.
        blocks: by sample, the conversation that the model is trained on.
        prompt_note: how these conversations were written.
    """
    first_strips = [0, *itertools.accumulate(len(session.strips) for session in sessions)]
    strips = [base64.b64encode(strip).decode() for session in sessions for strip in session.strips]
    problems = [*problems, *(f"{session.id}: {line}" for session in sessions for line in session.problems)]
    return render_page(
        Path(__file__).with_name("page.html.jinja"),
        filters={},
        mark=PAGE_MARK,
        source=source,
        num_found=num_found,
        summary=summarise(list(sessions), marks),
        problems=problems,
        strips=strips,
        frame_size=FRAME_SIZE_PX,
        data={
            "buttons": BUTTONS,
            "promptNote": prompt_note,
            "frames": FRAME_SIZE_PX,
            "perStrip": FRAMES_PER_STRIP,
            "sessions": [
                _session_data(place, session, marks, first_strip=first_strips[place], blocks=blocks)
                for place, session in enumerate(sessions)
            ],
        },
    )


def message_blocks(samples: Sequence[Sample], layout: Layout) -> dict[str, list[ConversationPart]]:
    """Return the conversation of each sample as messages, from which a chat template makes the model's text.

    Raises:
        PokegemmaError: a text contains a control token of the model.
        ValueError: `layout` is grid, and a sample has no grid picture.
    """
    if layout != "trajectory":
        return {sample.id: _as_blocks(prompts.build_messages(sample, layout), sample) for sample in samples}
    blocks = {}
    for stretch in cut_trajectories(samples, max_decisions=DEFAULT_MAX_DECISIONS, overlap=DEFAULT_OVERLAP):
        messages = _as_blocks(prompts.build_trajectory_messages(stretch), stretch.samples[0])
        for place, sample in enumerate(stretch.counted, start=stretch.num_context):
            blocks[sample.id] = messages[: 2 * place + 2]
    return blocks


def _as_blocks(messages: Sequence[Mapping[str, Any]], sample: Sample) -> list[ConversationPart]:
    def part(content: Mapping[str, str]) -> str | int:
        if content["type"] == "image":
            return PICTURE
        return CONTEXT if content["text"] == sample.context else content["text"]

    return [(message["role"], [part(content) for content in message["content"]]) for message in messages]


def _session_data(
    place: int,
    session: SessionView,
    marks: Marks,
    *,
    first_strip: int,
    blocks: Conversations,
) -> dict[str, Any]:
    first = next((turn.sample for turn in session.turns if turn.sample is not None), None)
    start = next((turn.time for turn in session.turns if turn.time is not None), None)
    return {
        "id": session.id,
        "goal": session.goal,
        "split": session.split,
        "note": session.note,
        "unseen": dict(session.unseen),
        "context": "" if first is None else first.context,
        "start": None if start is None else start.isoformat(sep=" ", timespec="seconds"),
        "firstFrame": first_strip * FRAMES_PER_STRIP,
        "turns": [
            _turn_data(turn, marks.same_screen.get((place, index)), marks, start=start, blocks=blocks)
            for index, turn in enumerate(session.turns)
        ],
    }


def _turn_data(turn: TurnView, group: int | None, marks: Marks, *, start: Any, blocks: Conversations) -> dict[str, Any]:
    """Return a turn for the page's script; what is empty is left out, since there are thousands."""
    seconds = None
    if start is not None and turn.time is not None:
        seconds = (turn.time.replace(tzinfo=None) - start.replace(tzinfo=None)).total_seconds()
    facts = {
        "number": turn.number,
        "status": turn.status,
        "button": turn.button,
        "pressed": list(turn.pressed),
        "situation": turn.situation,
        "reasoning": turn.reasoning,
        "seconds": seconds,
        "labelBy": turn.label_by,
        "corrected": turn.is_corrected,
        "frame": turn.frame,
        "window": list(turn.window),
        "noEffect": turn.no_effect,
        "repeat": turn.is_repeat,
        "screen": group,
        "duplicate": group in marks.is_duplicate,
        "conflict": turn.is_sample and group in marks.is_conflict,
        "id": None if turn.sample is None else turn.sample.id,
        "blocks": None if turn.sample is None else blocks.get(turn.sample.id),
    }
    return {name: value for name, value in facts.items() if value or (value == 0 and value is not False)}
