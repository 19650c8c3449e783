"""Compare a policy's GGUF file, as llama.cpp plays it, with its checkpoint: tokens, next words, actions.

python scripts/battles_parity.py --policy_path outputs/merged --gguf_path outputs/gguf/model-f16.gguf \\
    --trajectories_dir outputs/packed

The exit status is 1 if tokens of a prompt differ, or if too many of the likeliest actions do.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from pokegemma.cli import parse_options, run
from pokegemma.errors import PokegemmaError, check_range, check_ranges
from pokegemma.options import option
from pokegemma.tables import format_percent


@dataclass
class BattlesParityOptions:
    policy_path: str = option(..., "Folder of the merged policy, or of a full fine-tuning.")
    gguf_path: str = option(..., "GGUF file that scripts/convert_to_gguf.py made of it.")
    trajectories_dir: str = option(..., "Folder of packed trajectories, whose states are asked about.")
    num_prompts: int = option(32, "States, evenly spread over the battles.")
    min_agreement: float = option(0.95, "Share of the states that must have the same likeliest action.")
    json: bool = option(False, "Print JSON.")

    def __post_init__(self) -> None:
        check_ranges(self, "num_prompts", at_least=1)
        check_range("--min_agreement", self.min_agreement, at_least=0, at_most=1)


def main() -> None:
    (options,) = parse_options(BattlesParityOptions, description=__doc__)
    policy, gguf = Path(options.policy_path), Path(options.gguf_path)
    if not gguf.is_file():
        raise PokegemmaError(f"--gguf_path {gguf}: no such file")
    from pokegemma.battles.policy.parity import check_parity, choose_prompts, compare_export

    prompts = choose_prompts(policy, Path(options.trajectories_dir), count=options.num_prompts)
    parity = compare_export(policy, gguf, prompts)
    if options.json:
        print(json.dumps(asdict(parity), indent=2))
    else:
        print(f"{parity.num_prompts} states: prompts with the same tokens {format_percent(parity.same_tokens)}")
        print(f"  the same next words    {format_percent(parity.same_words)}")
        print(f"  the same action        {format_percent(parity.same_actions)}")
        print(
            f"  log-probabilities of actions differ by {parity.mean_difference:.4f} (mean), {parity.max_difference:.4f}"
        )
    check_parity(parity, min_agreement=options.min_agreement)


if __name__ == "__main__":
    run(main)
