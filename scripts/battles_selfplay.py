"""Let a policy for battles improve by self-play: play itself, learn from that, and keep what beats the best, in rounds.

python scripts/battles_selfplay.py --policy_path outputs/battles/policy --output_dir outputs/selfplay --rounds 3

Each round records battles of the best policy with itself, trains a candidate on all battles so far, and lets it play
the best and other players in the arena. Writes results.json, selfplay.png, a folder for each round, and the best policy
to OUTPUT_DIR/best. The same command continues a run that was stopped; with more --rounds it goes on.
"""

import json

from pokegemma.battles.selfplay.options import SelfPlayOptions
from pokegemma.cli import parse_options, run
from pokegemma.outputs import refuse_to_replace


def main() -> None:
    (options,) = parse_options(SelfPlayOptions, description=__doc__)
    refuse_to_replace(options.folder, options.policy_path)
    from pokegemma.battles.selfplay.progress import describe_final, format_progress, plot_progress
    from pokegemma.battles.selfplay.rounds import play_rounds

    results = play_rounds(options)
    plot = options.folder / "selfplay.png"
    plot_progress(plot, results)
    if options.json:
        print(json.dumps(results, indent=2))
    else:
        print(format_progress(results))
        print(describe_final(results))
        print(f"best: {options.folder / 'best'} ({results['best']['name']}); plot: {plot}")


if __name__ == "__main__":
    run(main)
