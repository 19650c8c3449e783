"""Make a tiny random Gemma 3 for text alone, whose tokenizer knows the words of packed trajectories.

python scripts/battles_tiny_model.py --trajectories_dir outputs/packed --output_dir outputs/tiny_policy
"""

from dataclasses import dataclass
from pathlib import Path

from pokegemma.cli import parse_options, run
from pokegemma.options import option
from pokegemma.outputs import atomic_folder
from pokegemma.provenance import write_run_record


@dataclass
class TinyPolicyOptions:
    trajectories_dir: str = option(..., "Folder of packed trajectories, as scripts/battles_pack.py writes it.")
    output_dir: str = option(..., "Folder to write the checkpoint to.")
    seed: int = option(0, "Seed of the weights.")
    overwrite: bool = option(False, "Replace an existing folder.")


def main() -> None:
    (options,) = parse_options(TinyPolicyOptions, description=__doc__)
    from pokegemma.battles.policy.tiny import make_tiny_policy
    from pokegemma.battles.trajectories.packed import PackedTrajectories

    words = PackedTrajectories(Path(options.trajectories_dir)).words
    with atomic_folder(Path(options.output_dir), stage="tiny model", overwrite=options.overwrite) as folder:
        model = make_tiny_policy(folder, words, seed=options.seed)
        write_run_record(folder, stage="tiny model", options=vars(options), seed=options.seed)
    print(f"{options.output_dir}: a tiny Gemma 3 with {model.num_parameters():,} weights and {len(words)} words")


if __name__ == "__main__":
    run(main)
