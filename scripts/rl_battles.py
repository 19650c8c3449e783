"""Improve on recorded battles by offline reinforcement learning: actor and critics on the features of a policy.

python scripts/rl_battles.py --trajectories_dir outputs/packed --encoder outputs/battles_policy \\
    --output_dir outputs/battles_rl

Options: those below, and those of TRL's SFTConfig that training has; `--config file.yaml` sets any of them. The first
call computes the features of all states. Writes the network, checkpoints, loss_curve.png and run.json.
"""

from pokegemma.battles.offline_rl.options import OfflineRLOptions, OfflineRLTrainingOptions
from pokegemma.cli import parse_options, run


def main() -> None:
    data, training = parse_options(OfflineRLOptions, OfflineRLTrainingOptions, description=__doc__)
    from pokegemma.battles.offline_rl.train import train_offline_rl

    if train_offline_rl(data, training):
        print(f"training done, result in {training.output_dir}")
    else:
        print(
            f"training interrupted, checkpoint saved in {training.output_dir}; "
            "continue with the same command and --resume_from_checkpoint"
        )


if __name__ == "__main__":
    run(main)
