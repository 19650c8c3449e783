"""Measure a model on held-out sessions, next to baselines that see no picture.

python scripts/evaluate.py --model_path outputs/merged --dataset_path training_data --output_dir outputs/evaluation

Writes metrics.json, predictions.jsonl, report.html (one page, no network) and run.json; prints a short table.
"""

import json

from pokegemma.cli import parse_options, run
from pokegemma.evaluation.options import EvaluateOptions


def main() -> None:
    (options,) = parse_options(EvaluateOptions, description=__doc__)
    held_out, train = options.find_files()
    options = options.with_view()
    from pokegemma.evaluation.evaluate import evaluate, summarize  # imports torch: not before the options are checked

    result = evaluate(options, held_out=held_out, train=train)
    print(json.dumps(result, indent=2, allow_nan=False) if options.json else summarize(result, options.output_dir))


if __name__ == "__main__":
    run(main)
