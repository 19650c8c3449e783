"""Make a checkpoint of the Gemma 3 270M that ./init.sh --with gemma270m --accept-gemma-terms has downloaded.

python scripts/make_gemma270m.py --output_dir outputs/gemma-3-270m
python scripts/make_gemma270m.py --vision --output_dir outputs/gemma-3-270m-vision

The weights are those of a GGUF file of 4 to 8 bits, as float32. Gemma's terms apply to them and to what is trained from
them. The result is a Gemma 3 for text alone, for scripts/sft_battles.py and the others that take such a folder. With
--vision it has a small random vision tower and projector, for trials of the scripts that show pictures.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pokegemma.cli import parse_options, run
from pokegemma.options import option
from pokegemma.outputs import atomic_folder
from pokegemma.provenance import write_run_record


@dataclass
class Gemma270mOptions:
    output_dir: str = option(..., "Folder to write the checkpoint to.")
    dtype: Literal["float32", "bfloat16"] = option("float32", "Type of the weights. float32 holds them exactly.")
    vision: bool = option(False, "Add a small random vision tower and projector: real text, pictures without meaning.")
    overwrite: bool = option(False, "Replace an existing folder.")


def main() -> None:
    (options,) = parse_options(Gemma270mOptions, description=__doc__)
    from pokegemma.gemma.gemma270m.package import WEIGHTS_SHA256, find_weights

    path = find_weights()
    from pokegemma.gemma.gemma270m.conversion import convert_gguf
    from pokegemma.gemma.gemma270m.vision import convert_gguf_with_vision

    convert = convert_gguf_with_vision if options.vision else convert_gguf
    with atomic_folder(Path(options.output_dir), stage="gemma270m", overwrite=options.overwrite) as folder:
        model = convert(path, folder, dtype=options.dtype)
        write_run_record(folder, stage="gemma270m", options=vars(options), gguf_sha256=WEIGHTS_SHA256)
    print(f"{options.output_dir}: a Gemma 3 with {model.num_parameters():,} weights")


if __name__ == "__main__":
    run(main)
