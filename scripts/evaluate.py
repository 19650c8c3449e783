"""Measure a model on held-out sessions, next to baselines that see no picture, and let it play unseen rooms.

python scripts/evaluate.py --model_path outputs/merged --dataset_path training_data --output_dir outputs/evaluation
python scripts/evaluate.py --model_path outputs/toy/merged --closed_loop 100 --output_dir outputs/toy_play

Writes metrics.json, predictions.jsonl, report.html (one page, no network) and run.json; prints a short table.
"""

import json
from typing import Any

from pokegemma.cli import parse_options, run
from pokegemma.evaluation.options import EvaluateOptions
from pokegemma.play.closed_loop.options import ClosedLoopOptions


def main() -> None:
    options, loop = parse_options(EvaluateOptions, ClosedLoopOptions, description=__doc__)
    plays_only = options.dataset_path is None and loop.closed_loop is not None
    files = None if plays_only else options.find_files()
    options = options.with_view()
    result, text = _play(options, loop) if files is None else _evaluate(options, loop, *files)
    print(json.dumps(result, indent=2, allow_nan=False) if options.json else text)


def _play(options: EvaluateOptions, loop: ClosedLoopOptions) -> tuple[dict[str, Any], str]:
    from pokegemma.play.closed_loop.measure import evaluate_play  # imports torch: not before the options are checked

    return evaluate_play(options, loop)


def _evaluate(
    options: EvaluateOptions, loop: ClosedLoopOptions, held_out: Any, train: Any
) -> tuple[dict[str, Any], str]:
    from pokegemma.evaluation.evaluate import evaluate, summarize
    from pokegemma.play.closed_loop.measure import play_table, prepare_measurement

    result = evaluate(options, held_out=held_out, train=train, measure_play=prepare_measurement(options, loop))
    text = summarize(result, options.output_dir)
    return result, text if loop.closed_loop is None else f"{text}\n{play_table(result['closed_loop'])}"


if __name__ == "__main__":
    run(main)
