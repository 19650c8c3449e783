"""Measure how well a model plays, next to the expert and to players that see no screen."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from pokegemma.errors import PokegemmaError
from pokegemma.evaluation import report
from pokegemma.evaluation.evaluate import PlayMeasurement
from pokegemma.evaluation.options import EvaluateOptions
from pokegemma.evaluation.predict import Predictor, load_predictor
from pokegemma.evaluation.report import REPORT_FILE
from pokegemma.evaluation.view import resolve_view, resolve_window
from pokegemma.outputs import atomic_folder, refuse_to_replace
from pokegemma.pages import render_page
from pokegemma.play.closed_loop.episodes import summarize_episodes
from pokegemma.play.closed_loop.options import ClosedLoopOptions
from pokegemma.play.closed_loop.rooms import OTHER_PLAYERS, play_baseline, play_rooms
from pokegemma.play.history import PlayView
from pokegemma.play.toy.rooms import LEVELS
from pokegemma.provenance import write_run_record
from pokegemma.tables import format_interval, format_percent, format_table


def play_view(model_path: str, *, layout: str | None = None) -> PlayView:
    """Return how play is shown to a model: as in its training."""
    view = resolve_view(model_path, layout=layout)
    return PlayView(view.layout, resolve_window(model_path), view.max_decisions, view.overlap_decisions)


def require_fair(level: int) -> None:
    """Check that the screens of a level show what its expert knows.

    Raises:
        PokegemmaError: they do not, so that no success on it says anything.
    """
    if LEVELS[level].is_privileged:
        raise PokegemmaError(
            f"--level {level}: its expert knows a way that no screen shows, so nothing can be measured on it; choose "
            f"one of {', '.join(str(number) for number, plan in LEVELS.items() if not plan.is_privileged)}"
        )


def measure_play(
    predictor: Predictor, view: PlayView, options: ClosedLoopOptions, *, load: Callable[[], Predictor]
) -> dict[str, Any]:
    """Return what the model and the baselines reached on the same rooms, ready for JSON.

    Args:
        load: loads the same model in another process.

    Raises:
        PokegemmaError: several processes shall play with a model that is on a GPU.
    """
    seeds, rules, device = options.seeds, options.rules, predictor.model.device
    if options.play_workers > 1 and device.type != "cpu":
        raise PokegemmaError(
            f"--play_workers {options.play_workers}: the processes cannot share {device}; leave it out, or add "
            "--device cpu"
        )
    record_to = None if options.record is None else Path(options.record)
    played = play_rooms(
        predictor,
        view,
        seeds,
        rules,
        batch_size=options.play_batch_size,
        record_to=record_to,
        only_mistakes=options.record_mistakes,
        num_workers=options.play_workers,
        load=load,
    )
    episodes = {"model": played}
    episodes |= {name: play_baseline(name, seeds, rules) for name in OTHER_PLAYERS}
    return {
        "rules": asdict(rules),
        "rooms": [seeds.start, seeds.stop - 1],
        "players": {name: summarize_episodes(played) for name, played in episodes.items()},
        "unsolved": [episode.seed for episode in episodes["model"] if not episode.is_solved],
    }


def prepare_measurement(
    options: EvaluateOptions, loop: ClosedLoopOptions
) -> Callable[[Predictor], PlayMeasurement] | None:
    """Return a function that lets a loaded model play, as `evaluate` takes it; None without --closed_loop.

    Raises:
        PokegemmaError: the level is privileged.
    """
    if loop.closed_loop is None:
        return None
    require_fair(loop.level)
    if loop.record is not None and Path(loop.record).exists():
        raise PokegemmaError(f"--record {loop.record}: exists; choose a new folder")
    view = play_view(options.model_path, layout=options.layout)
    load = partial(load_predictor, options.model_path, layout=view.layout, dtype=options.dtype, device=options.device)

    def measure(predictor: Predictor) -> PlayMeasurement:
        result = measure_play(predictor, view, loop, load=load)
        return PlayMeasurement(result, play_section(result))

    return measure


def evaluate_play(options: EvaluateOptions, loop: ClosedLoopOptions) -> tuple[dict[str, Any], str]:
    """Let a model play, write the report to `options.output_dir`, and return the metrics and a table.

    Raises:
        PokegemmaError: the level is privileged, or the model cannot be loaded.
    """
    refuse_to_replace(Path(options.output_dir), options.model_path)
    measure = prepare_measurement(options, loop)
    assert measure is not None
    with atomic_folder(Path(options.output_dir), stage="evaluate", overwrite=options.overwrite) as output:
        predictor = load_predictor(
            options.model_path, layout=options.view.layout, dtype=options.dtype, device=options.device
        )
        played = measure(predictor)
        result = {"closed_loop": played.metrics}
        report.write_metrics(output, result)
        facts = {"model": options.model_path, "layout": options.view.layout, "ran on": str(predictor.model.device)}
        text = render_page(
            Path(__file__).with_name("page.html.jinja"),
            filters={},
            style=Path(report.__file__).with_name("style.css.jinja").read_text(encoding="utf-8"),
            section=played.section,
            sentence=play_sentence(played.metrics),
            facts=facts,
        )
        (output / REPORT_FILE).write_text(text, encoding="utf-8")
        write_run_record(output, stage="evaluate", options={**asdict(options), **asdict(loop)})
    return result, f"{play_table(played.metrics)}\nreport: {Path(options.output_dir) / REPORT_FILE}"


def play_sentence(result: Mapping[str, Any]) -> str:
    """Return the result in one sentence."""
    model = result["players"]["model"]
    return (
        f"The model solves {model['num_solved']} of {model['num_episodes']} unseen rooms "
        f"(95 % interval {format_interval(model['success_interval'])} %) of level {result['rules']['level']}."
    )


def play_table(result: Mapping[str, Any]) -> str:
    """Return the players as a short table for a terminal, and where the model failed."""
    table = [("", "solved", "95 % interval", "turns / expert's", "useless presses", "right buttons")]
    for name, row in result["players"].items():
        ratio = "–" if row["turns_over_expert"] is None else f"{row['turns_over_expert']:.2f}"
        shares = (format_percent(row[key]) for key in ("useless_presses", "right_buttons"))
        solved = f"{row['num_solved']}/{row['num_episodes']}"
        table.append((name, solved, format_interval(row["success_interval"]), ratio, *shares))
    failures = result["players"]["model"]["failures"][:3]
    lines = [format_table(table), *(f"unsolved: {describe_failure(failure)}" for failure in failures)]
    return "\n".join(lines)


def describe_failure(failure: Mapping[str, Any]) -> str:
    """Return one kind of failure in words."""
    if failure["expert"] is None:
        return f"{failure['count']} x out of turns, with right buttons at the end"
    chosen = failure["chosen"] or "no button"
    return f"{failure['count']} x in {failure['situation']}, {chosen} instead of {failure['expert']}"


def describe_rules(rules: Mapping[str, Any]) -> str:
    """Return in words how rooms were played."""
    game = "in Python" if rules["game"] == "toy" else "as ROMs in mGBA"
    stuck = "greedy" if rules["stuck"] is None else f"another button after {rules['stuck']} equal presses on a screen"
    return (
        f"level {rules['level']}, {game}, {format_percent(rules['noise'], digits=0)} of the presses replaced, {stuck}; "
        f"an episode ends after {rules['turns_per_expert_turn']:g} times the expert's turns"
    )


def play_section(result: Mapping[str, Any]) -> str:
    """Return the section of an HTML report."""
    return render_page(
        Path(__file__).with_name("section.html.jinja"),
        filters={"percent": format_percent, "interval": format_interval, "failure": describe_failure},
        result=result,
        rules=describe_rules(result["rules"]),
        model=result["players"]["model"],
    )
