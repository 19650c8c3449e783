"""Write the model card of a policy: how it was trained, and how it plays in an arena.

python scripts/battles_card.py --policy_path outputs/battles/policy --arena_dir outputs/battles/arena

Writes POLICY_PATH/README.md. The same files give the same text.
"""

from dataclasses import dataclass
from pathlib import Path

from pokegemma.cli import parse_options, run
from pokegemma.options import option


@dataclass
class BattlesCardOptions:
    policy_path: str = option(..., "Folder that scripts/sft_battles.py wrote.")
    arena_dir: str = option(..., "Folder of scripts/battles_arena.py, in which the policy played.")
    player: str = option("policy", "Its name there.")
    name: str = option("pokegemma-battles", "Title of the card.")


def main() -> None:
    (options,) = parse_options(BattlesCardOptions, description=__doc__)
    from pokegemma.battles.policy.card import render_policy_card
    from pokegemma.fingerprints import CARD_FILE
    from pokegemma.outputs import write_if_changed

    policy = Path(options.policy_path)
    card = render_policy_card(policy, Path(options.arena_dir), player=options.player, name=options.name)
    write_if_changed(policy / CARD_FILE, card)
    print(policy / CARD_FILE)


if __name__ == "__main__":
    run(main)
