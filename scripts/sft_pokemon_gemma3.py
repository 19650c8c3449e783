"""Fine-tune a Gemma 3, 3n or 4 on converted sessions.

accelerate launch --config_file accelerate_configs/single_gpu.yaml scripts/sft_pokemon_gemma3.py \\
    --dataset_path training_data --output_dir outputs/adapter

Options: those below, and all of TRL's SFTConfig and ModelConfig; `--config file.yaml` sets any of them.
"""

from pokegemma.cli import parse_options, run
from pokegemma.training.options import DataOptions, ModelOptions, TrainingOptions


def main() -> None:
    data, training, model = parse_options(DataOptions, TrainingOptions, ModelOptions, description=__doc__)
    from pokegemma.training.sft import train

    if train(data, training, model):
        print(f"training done, result in {training.output_dir}")
    else:
        print(
            f"training interrupted, checkpoint saved in {training.output_dir}; "
            "continue with the same command and --resume_from_checkpoint"
        )


if __name__ == "__main__":
    run(main)
