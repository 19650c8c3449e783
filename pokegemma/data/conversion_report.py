"""conversion_report.json: the result of every session and every turn."""

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pokegemma.data.convert import SessionResult
from pokegemma.data.decisions import REASONS, V1_REASONS, clean_text
from pokegemma.data.eevee_v1.named_pictures import CONVERSION_REPORT
from pokegemma.data.prompts import BUTTONS
from pokegemma.data.recordings.session import SessionError
from pokegemma.tables import format_table

logger = logging.getLogger(__name__)

_MAX_PROBLEMS_NAMED = 10


def build_report(
    outcomes: Sequence[SessionResult | SessionError], *, held_out: set[str], problems: Sequence[str]
) -> dict[str, Any]:
    """Return conversion_report.json: counts of sessions, turns by result and buttons, and each session.

    A session that is a copy of another counts as unreadable, and none of its turns count.
    """
    results = [outcome for outcome in outcomes if isinstance(outcome, SessionResult)]
    reasons = sum((Counter(result.reasons) for result in results), Counter())
    labellers = sum((Counter(result.labellers) for result in results), Counter())
    overlays = sum((Counter(result.overlays) for result in results), Counter())
    turns = sum(result.num_turns for result in results)
    samples = sum(result.num_samples for result in results)
    assert turns == samples + reasons.total(), "a turn was lost"
    splits = {}
    for name, members in (
        ("train", [result for result in results if result.num_samples and result.session not in held_out]),
        ("eval", [result for result in results if result.session in held_out]),
    ):
        buttons = sum((Counter(result.buttons) for result in members), Counter())
        splits[name] = {
            "sessions": len(members),
            "samples": buttons.total(),
            "buttons": {button: buttons[button] for button in BUTTONS},
        }
    return {
        "sessions": {
            "found": len(outcomes),
            "with_samples": sum(bool(result.num_samples) for result in results),
            "without_samples": sum(not result.num_samples for result in results),
            "unreadable": len(outcomes) - len(results),
        },
        "turns": turns,
        "samples": samples,
        "turns_without_sample": {
            reason: reasons[reason] for reason in REASONS if reason in V1_REASONS or reasons[reason]
        },
        **({"labels_by": dict(sorted(labellers.items()))} if labellers else {}),
        "frames": sum(result.num_frames for result in results),
        **({"overlays": dict(sorted(overlays.items()))} if overlays else {}),
        "goals_shortened": sum(result.goal_shortened for result in results),
        "splits": splits,
        "problems": list(problems),
        "per_session": [
            {
                "session": result.session,
                "folder": result.folder,
                "split": ("eval" if result.session in held_out else "train") if result.num_samples else None,
                "turns": result.num_turns,
                "samples": result.num_samples,
                "turns_without_sample": result.reasons,
                "screenshot_numbering": result.numbering,
            }
            for result in results
        ],
    }


def list_problems(outcomes: Sequence[SessionResult | SessionError], data_dir: Path) -> list[str]:
    """Return a line for each problem of a session; log the first ones, and the number of the others."""
    results = [outcome for outcome in outcomes if isinstance(outcome, SessionResult)]
    problems = [str(outcome) for outcome in outcomes if isinstance(outcome, SessionError)]
    problems += [problem for result in results for problem in result.problems]
    if any(result.num_samples for result in results):  # else `explain_nothing` names them
        problems += _picture_problems(results, data_dir)
    problems = [clean_text(problem) for problem in problems]
    for problem in problems[:_MAX_PROBLEMS_NAMED]:
        logger.warning("%s", problem)
    if len(problems) > _MAX_PROBLEMS_NAMED:
        logger.warning("... %d more problems, all in %s", len(problems) - _MAX_PROBLEMS_NAMED, CONVERSION_REPORT)
    return problems


def _picture_problems(results: Sequence[SessionResult], data_dir: Path) -> list[str]:
    """Return a line for each session without a picture of its decisions, and for each picture of several sessions."""
    problems = [
        _explain_session(result, data_dir)
        for result in results
        if not result.num_samples and result.reasons.get("frame_missing")
    ]
    sessions_of: dict[Path, list[str]] = {}
    for result in results:
        for path in result.outside_pictures:
            sessions_of.setdefault(path, []).append(result.folder)
    problems += [
        f"{path.relative_to(data_dir)} is named by {len(folders)} sessions ({', '.join(folders[:3])}), of which "
        "only one recorded it; what the others show is unknown"
        for path, folders in sessions_of.items()
        if len(folders) > 1
    ]
    return problems


def _explain_session(result: SessionResult, data_dir: Path) -> str:
    num_missing, num_unreadable = (result.reasons.get(name, 0) for name in ("frame_missing", "frame_unreadable"))
    if num_spelled := result.reasons.get("control_token"):
        return f"{result.folder}: {num_spelled} decisions whose text contains a control token of the model"
    if num_missing:
        return (
            f"{result.folder}: {num_missing} decisions without a picture; {result.missing_picture} is not in sshots/ "
            f"of the session, in its folder or below {data_dir}; put the pictures into sshots/"
        )
    if num_unreadable:
        return f"{result.folder}: {num_unreadable} decisions whose pictures cannot be read"
    if result.num_left_out:
        names = "--label_by, --drop_no_effect or --max_repeats"
        return f"{result.folder}: {result.num_left_out} decisions, all left out by {names}"
    if num_blind := result.reasons.get("blind_press"):
        return f"{result.folder}: {num_blind} presses at random or by noise; correct them to make them samples"
    return f"{result.folder}: {result.num_turns} turns, and none of them is a decision"


def explain_nothing(data_dir: Path, outcomes: Sequence[SessionResult | SessionError]) -> str:
    """Return, in one line, why no session gave a sample."""
    unreadable = [str(outcome) for outcome in outcomes if isinstance(outcome, SessionError)]
    results = [outcome for outcome in outcomes if isinstance(outcome, SessionResult)]
    reasons = sum((Counter(result.reasons) for result in results), Counter())
    found = [_explain_session(result, data_dir) for result in results]
    causes = (unreadable + found)[:_MAX_PROBLEMS_NAMED]
    counts = ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "no turn"
    return f"{data_dir}: nothing to convert in {len(outcomes)} sessions ({counts}): {'; '.join(causes)}"


def format_report(report: dict[str, Any], output_dir: Path) -> str:
    """Return what `build_report` returned as a table for a terminal."""
    sessions, splits = report["sessions"], report["splits"]
    without = sessions["without_samples"]
    reasons = ", ".join(f"{count} {name}" for name, count in report["turns_without_sample"].items() if count) or "none"
    rows = [
        ("sessions", f"{sessions['found']} ({without} without samples, {sessions['unreadable']} unreadable or copies)"),
        ("turns", f"{report['turns']}"),
        ("samples", f"{report['samples']}"),
        ("turns without a sample", f"{report['turns'] - report['samples']} ({reasons})"),
        ("frames stored", f"{report['frames']}"),
        *((name, f"{part['samples']} samples of {part['sessions']} sessions") for name, part in splits.items()),
    ]
    for button, count in splits["train"]["buttons"].items():
        rows.append((f"  {button}", f"{count} train, {splits['eval']['buttons'][button]} eval"))
    rows += [(f"labels by {name}", f"{count} samples") for name, count in report.get("labels_by", {}).items()]
    if "overlays" in report:
        counts = ", ".join(f"{count} {name}" for name, count in report["overlays"].items())
        rows.append(("overlays of screenshots", counts))
    if report["goals_shortened"]:
        rows.append(("goals shortened", f"{report['goals_shortened']} sessions"))
    rows.append(("written to", f"{clean_text(str(output_dir))} (details: {CONVERSION_REPORT})"))
    return format_table(rows, num_left=2)
