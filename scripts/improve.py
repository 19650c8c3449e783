"""Let a model learn from its own play in the toy game: play, correct, train on everything, and measure, in rounds.

python scripts/improve.py --model_path outputs/toy/base_model --output_dir outputs/improved --rounds 3 --seeds 0 1 2

Writes results.json, improvement.png, and the model that plays best to OUTPUT_DIR/best. The same command continues a run
that was stopped.
"""

import json
from pathlib import Path

from pokegemma.cli import parse_options, run
from pokegemma.outputs import refuse_to_replace
from pokegemma.play.improve.options import ImproveOptions


def main() -> None:
    (options,) = parse_options(ImproveOptions, description=__doc__)
    folder = Path(options.output_dir)
    refuse_to_replace(folder, options.model_path)
    from pokegemma.play.improve.plot import improvement_table, plot_improvement, pool_arms
    from pokegemma.play.improve.rounds import improve

    improvement = improve(options)
    rows = pool_arms(improvement.results)
    plot_improvement(folder / "improvement.png", rows, level=options.level, noise=options.noise)
    (folder / "pooled.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    print(improvement_table(rows, level=options.level, also_level=options.also_level))
    played = improvement.best_play
    print(
        f"the model that plays best: {folder / 'best'} ({improvement.best['model']}); "
        f"of {played['num_episodes']} other rooms it solves {played['num_solved']}"
    )
    print(f"plot: {folder / 'improvement.png'}")


if __name__ == "__main__":
    run(main)
