"""Convert a merged Gemma 3 to a folder for MLX: Apple silicon, or the CPU on Linux.

python scripts/convert_to_mlx.py --model_path outputs/merged --output_path outputs/mlx-8bit --quantization_bits 8
"""

import shlex
from dataclasses import dataclass
from pathlib import Path

from pokegemma.cli import parse_options, run
from pokegemma.export.weight_types import MLX_BITS
from pokegemma.options import option
from pokegemma.tables import format_table


@dataclass
class MlxOptions:
    model_path: str = option(..., "Folder of the merged checkpoint.")
    output_path: str = option(..., "Folder to create.")
    quantization_bits: int = option(
        16, "Bits of the language model's weights; 16 is bfloat16. The vision tower always has 16.", choices=[*MLX_BITS]
    )
    overwrite: bool = option(False, "Replace an existing --output_path.")


def main() -> None:
    (options,) = parse_options(MlxOptions, description=__doc__)
    from pokegemma.export.mlx import convert_to_mlx

    output = Path(options.output_path)
    parts = convert_to_mlx(
        Path(options.model_path), output, bits=options.quantization_bits, overwrite=options.overwrite
    )
    rows = [("part", "stored as", "weights", "MiB", "changed by rounding")]
    for part in parts:
        size = f"{part.num_bytes / 2**20:,.1f}"
        rows.append((part.name, part.stored, f"{part.num_weights:,}", size, f"{part.error:.2%}"))
    rows.append(("all", "", "", f"{sum(part.num_bytes for part in parts) / 2**20:,.1f}", ""))
    print(format_table(rows, num_left=2))
    place = shlex.quote(str(output))
    print(f"MLX folder in {output}; serve it: python scripts/serve.py --engine mlx --model_path {place}")


if __name__ == "__main__":
    run(main)
