"""Find a mixture of players that no player of a growing population beats: PSRO over measured battles.

python scripts/battles_psro.py --policy_path outputs/battles/policy --output_dir outputs/psro --num_responses 3

Plays every pair of the population in an arena, finds a Nash mixture of the measured matrix, trains a best response in
battles against opponents drawn by it, adds that to the population, and repeats. Writes results.json, the arena with its
report, and a folder for each response. The same command continues a run that was stopped; with more --num_responses it
goes on.
"""

import json

from pokegemma.battles.selfplay.options import PSROOptions
from pokegemma.cli import parse_options, run
from pokegemma.outputs import refuse_to_replace


def main() -> None:
    (options,) = parse_options(PSROOptions, description=__doc__)
    refuse_to_replace(options.folder, options.policy_path)
    from pokegemma.battles.selfplay.equilibrium_tables import format_payoffs, format_responses
    from pokegemma.battles.selfplay.psro import run_psro

    results = run_psro(options)
    if options.json:
        print(json.dumps(results, indent=2))
    else:
        print(format_payoffs(results["equilibria"][-1]))
        print()
        print(format_responses(results))
        print()
        print(results["note"])


if __name__ == "__main__":
    run(main)
