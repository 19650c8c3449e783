"""Make a tiny random Gemma that loads wherever the published ones do, to try the pipeline without a GPU.

python scripts/make_tiny_model.py --output_dir outputs/tiny_gemma3
python scripts/make_tiny_model.py --num_image_tokens 64 --output_dir outputs/quick_gemma3
python scripts/make_tiny_model.py --family gemma4 --output_dir outputs/tiny_gemma4
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pokegemma.cli import parse_options, run
from pokegemma.errors import PokegemmaError
from pokegemma.options import option
from pokegemma.outputs import atomic_folder
from pokegemma.provenance import write_run_record

PATCH_SIZE_PX = 14


@dataclass
class TinyModelOptions:
    output_dir: str = option(..., "Folder to write the checkpoint to.")
    family: str = option("gemma3", "gemma3, gemma3n (needs timm) or gemma4.", choices=["gemma3", "gemma3n", "gemma4"])
    num_image_tokens: Literal[64, 256] = option(
        256,
        "Tokens of a picture: 256 (224 px), as published checkpoints have, or 64 (112 px). Only gemma3 can have 64.",
    )
    seed: int = option(0, "Seed of the weights and of the tokenizer's corpus.")
    overwrite: bool = option(False, "Replace an existing folder.")

    def __post_init__(self) -> None:
        if self.num_image_tokens != 256 and self.family != "gemma3":
            raise PokegemmaError(f"--num_image_tokens {self.num_image_tokens}: only for --family gemma3")


def main() -> None:
    (options,) = parse_options(TinyModelOptions, description=__doc__)
    with atomic_folder(Path(options.output_dir), stage="tiny model", overwrite=options.overwrite) as folder:
        from pokegemma.gemma.families import FAMILIES
        from pokegemma.gemma.tiny.make import make_tiny

        sizes: dict[str, int] = {}
        if options.family == "gemma3":
            side = math.isqrt(options.num_image_tokens)
            sizes = {"num_image_tokens": options.num_image_tokens, "image_size_px": side * PATCH_SIZE_PX}
        make_tiny(options.family, folder, seed=options.seed, **sizes)
        write_run_record(folder, stage="tiny model", options=vars(options), seed=options.seed)
    print(f"tiny {FAMILIES[options.family].name} checkpoint in {options.output_dir}")


if __name__ == "__main__":
    run(main)
