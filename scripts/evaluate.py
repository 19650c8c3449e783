"""Measure a model on unseen sessions, beside baselines that see no picture.

python scripts/evaluate.py --model_path outputs/merged --dataset_path training_data --output_dir outputs/evaluation

Writes metrics.json, predictions.jsonl, report.html (one page, no network) and run.json; prints a short table.
"""

import json
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from pokegemma.cli import parse_options, run
from pokegemma.data.checks.foreign_datasets import refuse_foreign_dataset
from pokegemma.data.samples import dataset_hash, read_samples
from pokegemma.data.trajectories import Trajectory, cut_trajectories
from pokegemma.errors import PokegemmaError
from pokegemma.evaluation.view import resolve_view
from pokegemma.outputs import atomic_folder
from pokegemma.provenance import write_run_record

_NUM_LATENCY_SAMPLES = 20


@dataclass
class EvaluateOptions:
    model_path: str = field(metadata={"help": "Checkpoint folder or Hugging Face id, or an adapter's folder."})
    dataset_path: str = field(
        metadata={"help": "Folder with eval.jsonl and train.jsonl, or a JSONL file that has train.jsonl beside it."}
    )
    output_dir: str = field(metadata={"help": "Folder to make for the report."})
    layout: Literal["grid", "frames", "trajectory"] | None = field(
        default=None, metadata={"help": "How samples are shown. Default: as the model's run.json says, else grid."}
    )
    max_decisions: int | None = field(
        default=None,
        metadata={"help": "With --layout trajectory: decisions in a conversation. Default: as in training, else 16."},
    )
    overlap_decisions: int | None = field(
        default=None, metadata={"help": "The same for decisions of the conversation before. Default: else 2."}
    )
    vision_features: str | None = field(
        default=None, metadata={"help": "Folder of the vision tower's features, as in training; made if there is none."}
    )
    batch_size: int = field(
        default=8, metadata={"help": "Decisions in one forward pass; with --layout trajectory it is always one."}
    )
    max_samples: int | None = field(
        default=None, metadata={"help": "Evaluate on about this many, evenly spread; of trajectories on whole ones."}
    )
    dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto", metadata={"help": "auto: bfloat16 on a GPU that has it, else float32."}
    )
    device: str | None = field(default=None, metadata={"help": "cuda, cuda:1, mps or cpu. Default: the best there is."})
    generate: bool = field(
        default=True, metadata={"help": "Also let the model write whole answers; --no_generate scores only (faster)."}
    )
    max_new_tokens: int = field(default=256, metadata={"help": "Tokens after which a written answer is cut off."})
    seed: int = field(default=0, metadata={"help": "Seed of the bootstrap."})
    overwrite: bool = field(default=False, metadata={"help": "Replace an existing OUTPUT_DIR."})
    json: bool = field(default=False, metadata={"help": "Print metrics.json instead of the table."})

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_samples", "max_new_tokens", "max_decisions"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PokegemmaError(f"--{name}: {value} is not at least 1")


def find_files(dataset_path: str) -> tuple[Path, Path]:
    """Return the JSONL file to evaluate on and the one that the baselines are fitted on."""
    path = Path(dataset_path)
    refuse_foreign_dataset(path)
    held_out = path if path.suffix == ".jsonl" else path / "eval.jsonl"
    if held_out != path and not held_out.is_file() and (path / "train.jsonl").is_file():
        raise PokegemmaError(
            f"{held_out} not found: a dataset has one if it has at least two sessions; "
            f"to measure what was learned by heart, pass --dataset_path {path / 'train.jsonl'}"
        )
    for file in (held_out, held_out.parent / "train.jsonl"):
        if not file.is_file():
            raise PokegemmaError(f"{file} not found; make it with scripts/convert_eevee_data_v2.py --output_dir {path}")
    return held_out, held_out.parent / "train.jsonl"


def check_output(options: EvaluateOptions, dataset: Path) -> None:
    """Refuse to write where dataset, model or features are: the report replaces the whole folder."""
    output = Path(options.output_dir).resolve()
    places = {"dataset": dataset.resolve(), "model": Path(options.model_path).resolve()}
    if options.vision_features is not None:
        places["feature cache"] = Path(options.vision_features).resolve()
    for what, place in places.items():
        if (place.exists() or what == "feature cache") and place.is_relative_to(output):
            raise PokegemmaError(f"--output_dir {options.output_dir} holds the {what}; choose another path")


def main() -> None:
    (options,) = parse_options(EvaluateOptions, description=__doc__)
    held_out, train = find_files(options.dataset_path)
    check_output(options, held_out.parent)
    view = resolve_view(
        options.model_path,
        layout=options.layout,
        max_decisions=options.max_decisions,
        overlap_decisions=options.overlap_decisions,
    )
    layout, folder = view.layout, held_out.parent
    options = replace(options, **asdict(view))
    from pokegemma.evaluation import metrics, predict, report, trajectories
    from pokegemma.gemma.image_attention import attention_facts
    from pokegemma.gemma.image_size import describe_image_size, picture_facts

    available = list(read_samples(held_out))
    samples = report.evenly_spread(available, options.max_samples or len(available))
    stretches: list[Trajectory] = []
    if layout == "trajectory":
        stretches = list(cut_trajectories(available, max_decisions=view.max_decisions, overlap=view.overlap_decisions))
        share = len(samples) / len(available)
        stretches = report.evenly_spread(stretches, math.ceil(share * len(stretches)))
        samples = [sample for stretch in stretches for sample in stretch.counted]
    predict.check_pictures(samples, layout=layout, dataset_folder=folder)
    decisions, fitted = metrics.read_decisions(samples), metrics.read_decisions(read_samples(train))
    with atomic_folder(Path(options.output_dir), stage="evaluate", overwrite=options.overwrite) as output:
        predictor = predict.load_predictor(
            options.model_path,
            dataset_folder=folder,
            layout=layout,
            dtype=options.dtype,
            device=options.device,
            max_new_tokens=options.max_new_tokens,
        )
        if options.vision_features is not None:
            predictor.use_features(Path(options.vision_features), stretches or samples)
        if layout == "trajectory":
            said = trajectories.predict_trajectories(predictor, stretches, generate=options.generate)
            answers, scores, latency_s = said.answers, said.scores, said.latency_s
        else:
            answers, scores = predictor.predict(samples, batch_size=options.batch_size, generate=options.generate)
            timed = report.evenly_spread(samples, _NUM_LATENCY_SAMPLES)
            ways = {"generated": predictor.generate, "scored": predictor.score}
            latency_s = {
                key: predict.measure_latency(way, timed)
                for key, way in ways.items()
                if options.generate or key == "scored"
            }
        result = report.build_metrics(
            decisions, fitted, answers=answers, scores=scores, latency_s=latency_s, seed=options.seed
        )
        result["num_available"] = len(available)
        model = predictor.model
        result |= picture_facts(model.config) | attention_facts(model.config)
        facts = {
            "model": options.model_path,
            "data": f"{held_out}: {len(samples)} decisions of {len(available)}, {result['num_sessions']} sessions",
            "layout": layout + (f", {view.max_decisions} decisions at most" if stretches else ""),
            "image size": describe_image_size(model.config),
            **{name.replace("_", " "): value for name, value in attention_facts(model.config).items()},
            "vision": "from the feature cache, not in the latency" if options.vision_features else "encoded here",
            "ran on": f"{model.device.type}, {str(model.dtype).removeprefix('torch.')}",
        }
        predictions = report.prediction_lines(samples, decisions, answers, scores)
        examples = report.pick_examples(samples, predictions, layout=layout, folder=folder)
        report.write_report(output, result, predictions, report.render_html(result, facts=facts, examples=examples))
        write_run_record(output, stage="evaluate", options=asdict(options), dataset_hash=dataset_hash(held_out))
    if options.json:
        print(json.dumps(result, indent=2, allow_nan=False))
    else:
        print(f"{report.format_table(result)}\n{report.headline_sentence(result)}")
        print(f"image size: {facts['image size']}")
        print(f"report: {Path(options.output_dir) / report.REPORT_FILE}")


if __name__ == "__main__":
    run(main)
