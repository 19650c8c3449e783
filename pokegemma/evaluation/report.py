"""The results of an evaluation: metrics.json, predictions.jsonl, a short table, and one HTML page."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pokegemma.data.frame_pictures import open_picture
from pokegemma.data.prompts import BUTTONS, Layout, sample_images
from pokegemma.data.samples import Sample, evenly_spread
from pokegemma.evaluation import metrics, plots
from pokegemma.evaluation.baselines import BASELINES, count_buttons
from pokegemma.evaluation.metrics import Decisions
from pokegemma.evaluation.predict import Predictions
from pokegemma.pages import picture_url, render_page
from pokegemma.tables import format_interval, format_percent, format_table

_METRICS_FILE, _PREDICTIONS_FILE, REPORT_FILE = "metrics.json", "predictions.jsonl", "report.html"
MODEL_ROWS = {"generated": "model (generated)", "scored": "model (scored)"}
"""Rows of the model: the answer that it writes, and the button with the highest probability."""

_NUM_EXAMPLES = 6
_THUMBNAIL_PX = 480
_FEW_SESSIONS = 10


def build_metrics(
    decisions: Decisions,
    train_decisions: Decisions,
    predicted: Predictions,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """Return all metrics of a model and of the baselines, ready for JSON.

    Args:
        train_decisions: the decisions that the baselines are fitted on.
        predicted: what the model predicted for `decisions`.
        seed: of the bootstrap.
    """
    predictions = _model_buttons(predicted)
    probabilities: dict[str, np.ndarray | None] = {"generated": None, "scored": predicted.scores}
    counts = count_buttons(train_decisions)
    for key, (_, predict) in BASELINES.items():
        predictions[key], probabilities[key] = predict(counts, decisions.previous)
    labels = {**MODEL_ROWS, **{key: label for key, (label, _) in BASELINES.items()}}
    resampled = metrics.resample_sessions(decisions, predictions, seed=seed)
    rows = {
        key: metrics.build_row(key, labels[key], decisions, buttons, probabilities[key], resampled)
        for key, buttons in predictions.items()
    }
    best = max((rows[key] for key in BASELINES), key=lambda row: row["accuracy"])
    model_rows = [rows[key] for key in MODEL_ROWS if key in rows]
    num_sessions = len(set(decisions.sessions))
    return {
        "headline": _headline(model_rows[0], best),
        "rows": list(rows.values()),
        "differences": [metrics.build_difference(row, best, resampled) for row in model_rows],
        "num_decisions": len(decisions.truth),
        "num_sessions": num_sessions,
        "num_sessions_shared_with_train": len(set(decisions.sessions) & set(train_decisions.sessions)),
        "num_change_decisions": int(decisions.is_change.sum()),
        "num_first_decisions": int((decisions.previous == metrics.NO_BUTTON).sum()),
        "intervals": {
            "method": "percentile bootstrap over whole sessions, 95 %",
            "resamples": metrics.NUM_RESAMPLES if resampled else 0,
            "seed": seed,
            "note": _interval_note(num_sessions),
        },
        "buttons": list(BUTTONS),
        "latency_ms": {key: metrics.percentiles_ms(seconds) for key, seconds in predicted.latency_s.items()},
        **_answer_facts(predicted, predictions),
        "reliability": metrics.reliability_table(decisions.truth, predicted.scores),
        **{row["key"]: _button_tables(decisions, predictions[row["key"]]) for row in model_rows},
    }


def _model_buttons(predicted: Predictions) -> dict[str, np.ndarray]:
    """Return the index of the model's button for each decision: as written, if it wrote answers, and as scored."""
    buttons = {}
    if predicted.answers is not None:
        buttons["generated"] = metrics.button_indices(answer.button for answer in predicted.answers)
    return {**buttons, "scored": predicted.scores.argmax(1)}


def _headline(model: Mapping[str, Any], best: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model": model["key"],
        "model_accuracy": model["accuracy"],
        "model_accuracy_interval": model["accuracy_interval"],
        "best_baseline": best["key"],
        "best_baseline_accuracy": best["accuracy"],
        "points_above_baseline": 100 * (model["accuracy"] - best["accuracy"]),
    }


def _answer_facts(predicted: Predictions, predictions: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return how the answers are written; None for each fact if the model wrote none."""
    answers = predicted.answers
    if answers is None:
        return {"valid_json_rate": None, "num_cut_off": None, "agreement": None}
    return {
        "valid_json_rate": sum(answer.button is not None for answer in answers) / len(answers),
        "num_cut_off": sum(not answer.complete for answer in answers),
        "agreement": float((predictions["generated"] == predictions["scored"]).mean()),
    }


def _button_tables(decisions: Decisions, buttons: np.ndarray) -> dict[str, Any]:
    confusion = metrics.confusion_matrix(decisions.truth, buttons)
    return {
        "per_button": metrics.button_table(confusion),
        "per_situation": metrics.situation_table(decisions, buttons),
        "confusion": confusion.tolist(),
    }


def _interval_note(num_sessions: int) -> str | None:
    if num_sessions < 2:
        return "no intervals: there is one session, and intervals show how sessions differ"
    if num_sessions < _FEW_SESSIONS:
        return f"intervals are rough: there are only {num_sessions} sessions to resample"
    return None


def metrics_table(result: Mapping[str, Any]) -> str:
    """Return the metrics as a short table for a terminal, one row for each predictor."""
    table = [("", "accuracy", "95 % interval", "macro-F1", "on changes", "NLL")]
    for row in result["rows"]:
        accuracy, interval = format_percent(row["accuracy"]), format_interval(row["accuracy_interval"]) or "–"
        nll = "–" if row["nll"] is None else f"{row['nll']:.3f}"
        table.append(
            (row["name"], accuracy, interval, f"{row['macro_f1']:.3f}", format_percent(row["change_accuracy"]), nll)
        )
    return format_table(table)


def headline_sentence(result: Mapping[str, Any]) -> str:
    """Return the result in one sentence."""
    headline = result["headline"]
    bounds = format_interval(headline["model_accuracy_interval"])
    baseline = next(row["name"] for row in result["rows"] if row["key"] == headline["best_baseline"])
    turns = "turns" if result["num_sessions_shared_with_train"] else "unseen turns"
    return (
        f"The model presses the right button on {format_percent(headline['model_accuracy'])} of {turns}"
        + (f" (95 % interval {bounds})" if bounds else "")
        + f"; the best baseline that sees no picture ({baseline}) reaches "
        + f"{format_percent(headline['best_baseline_accuracy'])}."
    )


def prediction_lines(samples: Sequence[Sample], decisions: Decisions, predicted: Predictions) -> list[dict[str, Any]]:
    """Return one record a decision: the recorded button, what the model wrote, and the eight probabilities."""
    answers, scores = predicted.answers, predicted.scores
    return [
        {
            "id": sample.id,
            "truth": BUTTONS[decisions.truth[place]],
            "text": None if answers is None else answers[place].text,
            "button": None if answers is None else answers[place].button,
            "complete": None if answers is None else answers[place].complete,
            "scored_button": BUTTONS[scores[place].argmax()],
            "scores": dict(zip(BUTTONS, map(float, scores[place]), strict=True)),
        }
        for place, sample in enumerate(samples)
    ]


def pick_examples(
    samples: Sequence[Sample], predictions: Sequence[Mapping[str, Any]], *, layout: Layout, folder: Path
) -> list[dict[str, Any]]:
    """Return up to six wrong and six right decisions, evenly spread, each with a thumbnail of its newest picture."""
    answers = [line["scored_button"] if line["text"] is None else line["button"] for line in predictions]
    examples = []
    for right in (False, True):
        places = [at for at, line in enumerate(predictions) if (answers[at] == line["truth"]) == right]
        for place in evenly_spread(places, _NUM_EXAMPLES):
            line = predictions[place]
            ranked = sorted(line["scores"].items(), key=lambda item: -item[1])[:3]
            picture = folder / sample_images(samples[place], layout)[-1]
            examples.append(
                {
                    **line,
                    "right": right,
                    "answer": answers[place],
                    "ranked": ranked,
                    "picture": picture_url(open_picture(picture), size_px=_THUMBNAIL_PX),
                    "goal": samples[place].metadata.get("goal"),
                }
            )
    return examples


def render_html(
    result: Mapping[str, Any],
    *,
    facts: Mapping[str, str],
    examples: Sequence[Mapping[str, Any]],
    play_section: str = "",
) -> str:
    """Return the report as one page that loads no other file.

    Args:
        facts: named lines of the page.
        play_section: HTML about play, which follows the table of predictors.
    """
    model_keys = [key for key in MODEL_ROWS if key in result]
    detail = result[model_keys[0]]
    return render_page(
        Path(__file__).with_name("report.html.jinja"),
        filters={"percent": format_percent, "interval": format_interval},
        result=result,
        detail=detail,
        facts=facts,
        examples=examples,
        play_section=play_section,
        sentence=headline_sentence(result),
        model_keys=model_keys,
        labels=MODEL_ROWS,
        difference=result["differences"][0],
        accuracy_plot=plots.plot_accuracy(result["rows"], model_keys),
        recall_plot=plots.plot_recall(detail["per_button"]),
        reliability_plot=plots.plot_reliability(result["reliability"]),
    )


def write_metrics(folder: Path, result: Mapping[str, Any]) -> None:
    """Write metrics.json into `folder`."""
    (folder / _METRICS_FILE).write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def write_report(folder: Path, result: Mapping[str, Any], predictions: Sequence[Mapping[str, Any]], page: str) -> None:
    """Write metrics.json, predictions.jsonl and report.html into `folder`."""
    write_metrics(folder, result)
    lines = "".join(json.dumps(line, allow_nan=False) + "\n" for line in predictions)
    (folder / _PREDICTIONS_FILE).write_text(lines, encoding="utf-8")
    (folder / REPORT_FILE).write_text(page, encoding="utf-8")
