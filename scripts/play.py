"""Let a model play a game in an emulator: the toy game, a ROM of your own, or a SkyEmu that runs already.

python scripts/play.py --model_path outputs/toy/merged --game toy --seed 5

The toy game needs nothing else; ROMs need `./init.sh --with play`. `--record runs` records the session for
convert_eevee_data_v2.py, saves the game's state, and writes replay.html. Ctrl-C ends the play.
"""

import json

from pokegemma.cli import parse_options, run
from pokegemma.play.command.options import PlayOptions
from pokegemma.play.command.session import format_summary_table, play_session


def main() -> None:
    (options,) = parse_options(PlayOptions, description=__doc__)
    summary = play_session(options)
    print(json.dumps(summary.to_record(), indent=2) if options.json else format_summary_table(summary))


if __name__ == "__main__":
    run(main)
