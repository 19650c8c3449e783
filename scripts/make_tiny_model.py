"""Make a tiny random Gemma 3 that loads wherever the published ones do, to try the pipeline without a GPU.

python scripts/make_tiny_model.py --output_dir outputs/tiny_gemma3
"""

from dataclasses import dataclass, field
from pathlib import Path

from pokegemma.cli import parse_options, run
from pokegemma.outputs import atomic_folder
from pokegemma.provenance import write_run_record


@dataclass
class TinyModelOptions:
    output_dir: str = field(metadata={"help": "Folder to write the checkpoint to."})
    seed: int = field(default=0, metadata={"help": "Seed of the weights and of the tokenizer's corpus."})
    overwrite: bool = field(default=False, metadata={"help": "Replace an existing folder."})


def main() -> None:
    (options,) = parse_options(TinyModelOptions, description=__doc__)
    with atomic_folder(Path(options.output_dir), stage="tiny model", overwrite=options.overwrite) as folder:
        from pokegemma.training.models import make_tiny_gemma3

        make_tiny_gemma3(folder, seed=options.seed)
        write_run_record(folder, stage="tiny model", options=vars(options), seed=options.seed)
    print(f"tiny Gemma 3 checkpoint in {options.output_dir}")


if __name__ == "__main__":
    run(main)
