"""Take a checkpoint to a registered version: merge, verify, evaluate, export, compare the exports, register.

    python scripts/production_pipeline.py --checkpoint outputs/adapter --dataset_path training_data \\
        --output_dir outputs/release --min_accuracy 0.6

A gate is a limit on what a step measured. A gate that fails stops the pipeline with exit status 1. The same command
continues after the last finished step and skips steps whose inputs and options have not changed; --dry_run prints which
steps would run. --push_to_hub uploads the result.

Writes merged/, evaluation/, gguf/, mlx/, parity/, registration.json, a model card (README.md), logs/ and pipeline.json.
"""

import json
from pathlib import Path

from pokegemma.cli import parse_options, run


def main() -> None:
    from pokegemma.release.options import PipelineOptions
    from pokegemma.release.pipeline import explain_steps, run_pipeline

    (options,) = parse_options(PipelineOptions, description=__doc__)
    if options.dry_run:
        for name, action in explain_steps(options):
            print(f"{name:12}{action}")
        return
    result = run_pipeline(options)
    if options.json:
        print(json.dumps(result, indent=2))
        return
    for step in result["steps"]:
        seconds = f"{step['seconds']:.1f} s" if step["ran"] else "unchanged"
        print(f"{step['name']:12}{seconds:>12}")
    print(f"{'total':12}{result['seconds']:10.1f} s")
    if result["version"] is not None:
        print(f"{options.name} version {result['version']} in {options.registry_uri}")
    print(f"model card: {Path(options.output_dir) / 'README.md'}")
    if result["pushed"]:
        print(f"uploaded: {result['pushed']}")


if __name__ == "__main__":
    run(main)
