"""Train a policy for battles by behaviour cloning: a Gemma 3 for text alone learns recorded actions.

python scripts/sft_battles.py --trajectories_dir outputs/packed --model_name_or_path outputs/tiny_policy \\
    --finetuning full --learning_rate 3e-3 --output_dir outputs/battles_policy

Options: those below, and all of TRL's SFTConfig and ModelConfig; `--config file.yaml` sets any of them. Writes the
model or adapter, checkpoints, loss_curve.png and run.json, which has the accuracy next to that of guesses without a
model.
"""

from pokegemma.battles.cloning.options import CloningOptions, CloningTrainingOptions, PolicyModelOptions
from pokegemma.cli import parse_options, run


def main() -> None:
    data, training, model = parse_options(
        CloningOptions, CloningTrainingOptions, PolicyModelOptions, description=__doc__
    )
    from pokegemma.battles.cloning.train import train_policy

    if train_policy(data, training, model):
        print(f"training done, result in {training.output_dir}")
    else:
        print(
            f"training interrupted, checkpoint saved in {training.output_dir}; "
            "continue with the same command and --resume_from_checkpoint"
        )


if __name__ == "__main__":
    run(main)
