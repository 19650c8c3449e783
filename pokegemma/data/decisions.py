"""What Eevee v1 decided and pressed on one recorded turn."""

import json
import math
import re
from dataclasses import dataclass, replace
from typing import Any

from pokegemma.data.prompts import BUTTONS
from pokegemma.data.recordings.corrections import Correction, is_blind, is_labeller, read_correction

DECISION = "decision"
REASONS = (
    "malformed_turn",  # not an object, an unusable or repeated turn number, an analysis that is not a text or object
    "failed_answer",  # the request to the model failed: "API Error:", "Exception:", "No game data"
    "pathfinding",  # v1 walked up to 20 unrecorded steps
    "parse_failed",  # no JSON in the answer; v1 pressed its fallback "b"
    "no_button",  # an answer without a button; v1 pressed "b"
    "invalid_button",  # none of the first three is a button; v1 pressed "b"
    "action_failed",  # the press failed
    "control_token",  # the goal or the answer contains a control token of the model
    "frame_missing",  # no picture of the screen
    "frame_unreadable",  # the picture does not decode
    "blind_press",  # a random press, noise or a way out of a loop, without a correction
    "invalid_correction",  # a correction without a valid button and a valid name
    "rejected",  # a correction says that nothing is to be learned from the turn
    "held",  # of other recorders: only buttons that were already held on the row before
    "other_label",  # --label_by: the label is by somebody else, or the recording does not state by whom
    "no_effect",  # --drop_no_effect: the screen after the press is the screen before
    "repeated",  # --max_repeats: the same button on the same screen as in earlier decisions of the session
)
"""Why a turn is not a sample. A turn counts under the first reason that applies."""

LEFT_OUT = REASONS[14:]
"""The reasons of decisions that options leave out."""

V1_REASONS = REASONS[:10]
"""The reasons that a report names even if they have no turn."""

FALLBACK_BUTTON = "b"
MAX_PRESSED = 3
_NO_CAPTURE = "No game data"
_FAILED_ANSWERS = ("API Error:", "Exception:", _NO_CAPTURE)
_FAILED_ACTION = re.compile(
    r"\b(fail\w*|errors?|exception|invalid|unable|unsuccessful\w*|timed? ?out|refused|disconnected)\b"
    r"|\b(could|was|were|did)(n['’]t| not)\b|\bcannot\b"
    r"|(\b(not|no)|n['’]t) (connect|execut|press|sen[dt]|perform|respon|button|valid|success|runn|found|open|ready)\w*"
    r"|\b(connection|socket|pipe|link|emulator) (was |is |got )?(lost|closed|reset|broken|aborted|dropped)\b"
    r"|\blost (the )?connection\b|\bbroken pipe\b",
    re.IGNORECASE,
)
_NO_FAILURE = re.compile(
    r"\b(no|without|zero|0) (any )?(errors?|failures?|exceptions?)\b"
    r"|\b(errors?|exception) ?[:=] ?(none|null|no|0)\b(?! \w)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Decision:
    """One turn's answer: `status` is DECISION or one of REASONS, `pressed` what v1 pressed, lower-cased, three at most.

    `pressed` includes v1's fallback "b". It is empty where nothing was pressed, or where that is unknown.
    `captured` is None where only the numbers of the screenshots can show whether the screen was captured.
    `chosen` is the button that the player's answer names, whatever was pressed then. `label` is the button of the
    sample's answer: that of the correction, or else the first of `pressed`. `label_by` is who gave it, None where the
    recording does not state it. `problem` is what is wrong with the turn, in one line.
    """

    status: str
    pressed: tuple[str, ...] = ()
    reasoning: str = ""
    situation: str = "unknown"
    confidence: str | float | None = None
    template: str | None = None
    captured: bool | None = True
    chosen: str = ""
    label: str = ""
    label_by: str | None = None
    is_corrected: bool = False
    problem: str = ""


def clean_text(value: object) -> str:
    """Return a text that UTF-8 can encode (a lone surrogate becomes "?"), "" for a value that is not text."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else ""


def read_decision(turn: dict[str, Any]) -> Decision:
    """Return what was decided and pressed on a turn of session_data.json, and its label; reads no frame."""
    decision = _read_answer(turn)
    decided_by, correction = turn.get("decided_by"), turn.get("correction")
    if decision.status == "malformed_turn":
        return decision
    if decided_by is not None and not is_labeller(decided_by) and not is_blind(decided_by):
        return Decision("malformed_turn", problem=clean_text(f"decided_by {str(decided_by)[:60]!r} is unknown"))
    if decided_by is not None:
        decision = replace(decision, label_by=clean_text(decided_by))
        if is_blind(decided_by):
            decision = replace(decision, status="blind_press")
        elif decision.status == "no_button" and is_failed_action(turn.get("action_result")):
            decision = replace(decision, status="action_failed")  # a button was chosen, and could not be pressed
    if correction is None:
        return decision
    try:
        return correct(decision, read_correction(correction))
    except ValueError as error:
        return replace(decision, status="invalid_correction", problem=clean_text(str(error)))


def correct(decision: Decision, correction: Correction) -> Decision:
    """Return a decision with the label of a correction, whatever its status was; `pressed` stays."""
    if correction.button is None:
        return replace(decision, status="rejected", problem="")
    kept = decision.reasoning if correction.button == decision.chosen else ""
    return replace(
        decision,
        status=DECISION,
        reasoning=kept if correction.reasoning is None else clean_text(correction.reasoning).strip(),
        label=correction.button,
        label_by=clean_text(correction.by),
        is_corrected=True,
        problem="",
    )


def _read_answer(turn: dict[str, Any]) -> Decision:
    analysis = turn.get("ai_analysis")
    if not isinstance(analysis, dict | str | None):
        return Decision("malformed_turn")
    texts, answer, parsing_failed = _read_analysis(analysis)
    no_vision = turn.get("visual_analysis") is None and isinstance(analysis, dict) and bool(analysis.get("error"))
    captured: bool | None = None if no_vision else True
    action_failed = is_failed_action(turn.get("action_result"))
    asked, pressed = _read_buttons(turn, answer)
    if any(text.lstrip().startswith(_FAILED_ANSWERS) for text in texts):
        status = "failed_answer"
        captured = False if any(text.lstrip().startswith(_NO_CAPTURE) for text in texts) else captured
    elif answer and answer.get("pathfinding_action"):
        return Decision("pathfinding", captured=captured)
    elif parsing_failed or (answer is None and _may_be_fallback(asked)):
        status = "parse_failed"
    elif not asked:
        status = "no_button"
    elif not pressed:
        status = "invalid_button"
    else:
        status = "action_failed" if action_failed else DECISION
    if not pressed and (asked or status == "no_button"):
        pressed = (FALLBACK_BUTTON,)
    answer = answer or {}
    _, chosen = _read_buttons({}, answer)
    return Decision(
        status=status,
        pressed=() if action_failed else pressed,
        # An old plain-text answer is its own reasoning.
        reasoning=clean_text(answer.get("reasoning") if answer else analysis).strip(),
        situation=clean_text(answer.get("context_detected")).strip() or "unknown",
        confidence=_read_confidence(answer.get("confidence")),
        template=clean_text(turn.get("template_used")) or None,
        captured=captured,
        label=pressed[0] if pressed else "",
        chosen=(chosen or pressed or ("",))[0],
    )


def is_failed_action(result: object) -> bool:
    """Return whether an `action_result` means that the press failed: false, or a sentence about it in old sessions.

    A missing result is not a failure.
    """
    if isinstance(result, str):
        return bool(_FAILED_ACTION.search(_NO_FAILURE.sub("", result))) or result.strip().lower() in (
            "false",
            "none",
            "null",
        )
    if isinstance(result, dict):
        return result.get("success") is False
    return isinstance(result, bool | int | float) and not result


def _read_analysis(analysis: dict[str, Any] | str | None) -> tuple[list[str], dict[str, Any] | None, bool]:
    """Return (texts that may begin with an error, the parsed answer or None, whether v1 could not parse it)."""
    if isinstance(analysis, dict):
        answer = analysis.get("parsed_json")
        answer = answer if isinstance(answer, dict) else None
        texts = [analysis.get("raw_text"), analysis.get("error"), (answer or {}).get("reasoning")]
        failed = answer is None or analysis.get("parsing_success", True) is not True
    else:
        answer = _find_json(analysis or "")
        texts = [analysis, (answer or {}).get("reasoning")]
        failed = False
    return [text for text in texts if isinstance(text, str)], answer, failed


def _find_json(text: str) -> dict[str, Any] | None:
    """Return the JSON object in an old plain-text analysis, bare or fenced or between sentences; None without one."""
    try:
        answer = json.loads(text[text.index("{") : text.rindex("}") + 1])
    except (ValueError, RecursionError):
        return None
    return answer if isinstance(answer, dict) else None


def _read_buttons(turn: dict[str, Any], answer: dict[str, Any] | None) -> tuple[list[Any], tuple[str, ...]]:
    """Return the buttons of an answer as they are, and those that v1 pressed: the valid ones of the first three."""
    asked = turn["button_presses"] if "button_presses" in turn else (answer or {}).get("button_presses")
    asked = [asked] if isinstance(asked, str) and asked.strip() else asked if isinstance(asked, list) else []
    names = [button.lower() for button in asked[:MAX_PRESSED] if isinstance(button, str)]
    return asked, tuple(name for name in names if name in BUTTONS)


def _may_be_fallback(asked: list[Any]) -> bool:
    """Return whether recorded buttons may be v1's fallback; then an answer without JSON does not show a decision."""
    return not asked or asked in (["b"], ["B"])


def _read_confidence(value: object) -> str | float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return clean_text(value) or None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:
        return None
