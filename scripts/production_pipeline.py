"""Take a checkpoint to a registered version: merge, verify, evaluate, export, compare the exports, register.

    python scripts/production_pipeline.py --checkpoint outputs/adapter --dataset_path training_data \\
        --output_dir outputs/release --min_accuracy 0.6

Each step has a gate; one that fails stops it with exit status 1. Run again, it goes on where it stopped and leaves out
what would come out the same. Writes merged/, evaluation/, gguf/, mlx/, parity/, registration.json, a model card
(README.md), logs/ and pipeline.json. --dry_run says what would run.
"""

import json
import logging
import time
from pathlib import Path

from pokegemma.cli import parse_options, run


def main() -> None:
    started = time.monotonic()
    from pokegemma.release.options import PipelineOptions
    from pokegemma.release.pipeline import explain, make_plan, read_version, run_plan
    from pokegemma.release.step_runner import State, locked

    (options,) = parse_options(PipelineOptions, description=__doc__)
    plan = make_plan(options)
    state = State.read(plan.output_dir)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    if options.dry_run:
        for name, what in explain(plan, state):
            print(f"{name:12}{what}")
        return
    if options.push_to_hub:
        from pokegemma.release import hub

        hub.check_hub(options.push_to_hub)
    with locked(plan.output_dir) as lock:
        state = State.read(plan.output_dir)  # again: another pipeline may have ended just before
        state.write()
        done = run_plan(plan, state, lock=lock)
        pushed = None
        if options.push_to_hub:
            card = (plan.output_dir / "README.md").read_text(encoding="utf-8")
            pushed = hub.push(
                options.push_to_hub, plan.model, card=card, exports=plan.exports, private=not options.hub_public
            )
    version = read_version(plan)
    if options.json:
        steps = [{"name": name, "ran": ran, "seconds": seconds} for name, ran, seconds in done]
        facts = {"steps": steps, "version": version, "pushed": pushed, "seconds": time.monotonic() - started}
        print(json.dumps(facts, indent=2))
        return
    for name, ran, seconds in done:
        print(f"{name:12}{f'{seconds:.1f} s' if ran else 'unchanged':>12}")
    print(f"{'in all':12}{f'{time.monotonic() - started:.1f} s':>12}")
    if version is not None:
        print(f"{options.name} version {version} in {options.registry_uri}")
    print(f"model card: {Path(options.output_dir) / 'README.md'}")
    if pushed:
        print(f"uploaded: {pushed}")


if __name__ == "__main__":
    run(main)
