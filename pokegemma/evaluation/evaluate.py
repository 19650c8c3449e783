"""Measure a model on held-out sessions, from the files of a dataset to the report."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pokegemma.data.samples import Sample, dataset_hash, evenly_spread, read_samples
from pokegemma.data.trajectories import Trajectory, cut_trajectories
from pokegemma.evaluation import metrics, report
from pokegemma.evaluation.options import EvaluateOptions
from pokegemma.evaluation.predict import Predictions, Predictor, load_predictor, measure_latency, require_pictures
from pokegemma.evaluation.trajectories import predict_trajectories
from pokegemma.evaluation.view import View
from pokegemma.gemma.image_attention import attention_facts
from pokegemma.gemma.model_image_size import describe_image_size, picture_facts
from pokegemma.outputs import atomic_folder
from pokegemma.provenance import write_run_record

_NUM_LATENCY_SAMPLES = 20


@dataclass(frozen=True)
class EvaluationSet:
    """The samples to evaluate on, and with --layout trajectory the trajectories that contain them.

    `num_available`: the number of samples in the file.
    """

    samples: list[Sample]
    trajectories: list[Trajectory]
    num_available: int

    @property
    def examples(self) -> Sequence[Sample | Trajectory]:
        return self.trajectories or self.samples


@dataclass(frozen=True)
class PlayMeasurement:
    """What play showed: `metrics` for JSON, and `section` of the report as HTML."""

    metrics: dict[str, Any]
    section: str


def evaluate(
    options: EvaluateOptions,
    *,
    held_out: Path,
    train: Path,
    measure_play: Callable[[Predictor], PlayMeasurement] | None = None,
) -> dict[str, Any]:
    """Evaluate a model, write the report to `options.output_dir`, and return the metrics.

    Args:
        options: with a view, see `EvaluateOptions.with_view`.
        held_out: JSONL file to evaluate on.
        train: JSONL file that the baselines are fitted on.
        measure_play: lets the model play; the result contains what it returns under "closed_loop".

    Raises:
        PokegemmaError: the dataset or the model cannot be used.
    """
    view, dataset_folder = options.view, held_out.parent
    evaluated = read_evaluation_set(held_out, view, max_samples=options.max_samples)
    require_pictures(evaluated.samples, layout=view.layout, dataset_folder=dataset_folder)
    decisions = metrics.read_decisions(evaluated.samples)
    train_decisions = metrics.read_decisions(read_samples(train))
    with atomic_folder(Path(options.output_dir), stage="evaluate", overwrite=options.overwrite) as output:
        predictor = load_predictor(
            options.model_path,
            dataset_folder=dataset_folder,
            layout=view.layout,
            dtype=options.dtype,
            device=options.device,
            max_new_tokens=options.max_new_tokens,
        )
        if options.vision_features is not None:
            predictor.use_features(Path(options.vision_features), evaluated.examples)
        predictions = predict_all(predictor, evaluated, batch_size=options.batch_size, generate=options.generate)
        config = predictor.model.config
        result = report.build_metrics(decisions, train_decisions, predictions, seed=options.seed)
        result |= {"num_available": evaluated.num_available, **picture_facts(config), **attention_facts(config)}
        played = None if measure_play is None else measure_play(predictor)
        result |= {"closed_loop": played.metrics} if played else {}
        lines = report.prediction_lines(evaluated.samples, decisions, predictions)
        examples = report.pick_examples(evaluated.samples, lines, layout=view.layout, folder=dataset_folder)
        facts = _report_facts(options, predictor, evaluated, held_out, num_sessions=result["num_sessions"])
        section = played.section if played else ""
        page = report.render_html(result, facts=facts, examples=examples, play_section=section)
        report.write_report(output, result, lines, page)
        write_run_record(output, stage="evaluate", options=asdict(options), dataset_hash=dataset_hash(held_out))
    return result


def read_evaluation_set(held_out: Path, view: View, *, max_samples: int | None) -> EvaluationSet:
    """Return about `max_samples` samples of a file, evenly spread, or all. Trajectories are taken whole."""
    available = list(read_samples(held_out))
    samples = evenly_spread(available, max_samples or len(available))
    if view.layout != "trajectory":
        return EvaluationSet(samples, [], len(available))
    trajectories = list(cut_trajectories(available, max_decisions=view.max_decisions, overlap=view.overlap_decisions))
    trajectories = evenly_spread(trajectories, math.ceil(len(samples) / len(available) * len(trajectories)))
    counted = [sample for trajectory in trajectories for sample in trajectory.counted]
    return EvaluationSet(counted, trajectories, len(available))


def predict_all(predictor: Predictor, evaluated: EvaluationSet, *, batch_size: int, generate: bool) -> Predictions:
    """Predict every decision, and measure the latency of some of them one by one (in trajectories: of all)."""
    if evaluated.trajectories:
        return predict_trajectories(predictor, evaluated.trajectories, generate=generate)
    answers, scores = predictor.predict(evaluated.samples, batch_size=batch_size, generate=generate)
    timed = evenly_spread(evaluated.samples, _NUM_LATENCY_SAMPLES)
    latency_s = {"generated": measure_latency(predictor.generate, timed)} if generate else {}
    latency_s["scored"] = measure_latency(predictor.score, timed)
    return Predictions(answers, scores, latency_s)


def _report_facts(
    options: EvaluateOptions, predictor: Predictor, evaluated: EvaluationSet, held_out: Path, *, num_sessions: int
) -> dict[str, str]:
    """Return the named lines at the head of the report."""
    model, layout = predictor.model, options.view.layout
    shown = f"{len(evaluated.samples)} decisions of {evaluated.num_available}, {num_sessions} sessions"
    return {
        "model": options.model_path,
        "data": f"{held_out}: {shown}",
        "layout": layout + (f", {options.max_decisions} decisions at most" if evaluated.trajectories else ""),
        "image size": describe_image_size(**picture_facts(model.config)),
        **{name.replace("_", " "): value for name, value in attention_facts(model.config).items()},
        "vision": "from the feature cache, not in the latency" if options.vision_features else "encoded here",
        "ran on": f"{model.device.type}, {str(model.dtype).removeprefix('torch.')}",
    }


def summarize(result: dict[str, Any], output_dir: str) -> str:
    """Return the result for a terminal: table, sentence, picture size and where the report is."""
    size = describe_image_size(result["image_size_px"], result["image_tokens"])
    report_file = Path(output_dir) / report.REPORT_FILE
    return (
        f"{report.metrics_table(result)}\n{report.headline_sentence(result)}\nimage size: {size}\nreport: {report_file}"
    )
