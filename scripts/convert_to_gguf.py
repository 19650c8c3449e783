"""Convert a merged checkpoint to GGUF, for llama.cpp and Ollama: the language model and its vision part (mmproj).

A policy for battles has no vision part, and its folder no Modelfile.

python scripts/convert_to_gguf.py --model_path outputs/merged --output_dir outputs/gguf --quantization f16 q8_0

Writes model-<quantization>.gguf, mmproj-f16.gguf, Modelfile-<quantization> and run.json; prints how to serve them. The
converter is llama.cpp's own, which ./init.sh --with gguf fetches.
"""

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from pokegemma.cli import parse_options, run
from pokegemma.export.weight_types import QUANTIZATIONS, check_quantizations
from pokegemma.options import option
from pokegemma.tables import format_table


@dataclass
class ConvertOptions:
    model_path: str = option(..., "Folder of the merged checkpoint.")
    output_dir: str = option(..., "Folder to create for the files.")
    quantization: list[str] = option(
        ["f16", "q8_0"], f"Types of the language model, several at once: {' '.join(QUANTIZATIONS)}."
    )
    llama_cpp_dir: str | None = option(
        None, "Checkout of llama.cpp to convert with. Default: the one that ./init.sh fetched."
    )
    overwrite: bool = option(False, "Replace an existing --output_dir.")

    def __post_init__(self) -> None:
        check_quantizations(self.quantization)


def main() -> None:
    (options,) = parse_options(ConvertOptions, description=__doc__)
    from pokegemma.export.llama_cpp_converter import find_converter

    converter = find_converter(Path(options.llama_cpp_dir) if options.llama_cpp_dir else None)
    from pokegemma.export.gguf import convert_to_gguf
    from pokegemma.export.gguf_check import fallback_note
    from pokegemma.serving.engine_command_lines import ServerOptions, llama_server_command
    from pokegemma.serving.model_folders import find_gguf, read_facts

    output = Path(options.output_dir)
    done = convert_to_gguf(
        Path(options.model_path),
        output,
        quantizations=options.quantization,
        converter=converter,
        overwrite=options.overwrite,
    )
    written = [file for file in (*done.models.values(), done.mmproj) if file is not None]
    rows = [("file", "tensors by type", "MiB")]
    for file in written:
        types = ", ".join(f"{count} {name.lower()}" for name, count in file.type_counts.items())
        rows.append((file.path.name, types, f"{file.num_bytes / 2**20:.1f}"))
    print(format_table(rows, num_left=2))
    for file in written:
        if note := fallback_note(file):
            print(f"{file.path.name}: {note}")
    smallest = min(done.models, key=lambda name: done.models[name].num_bytes)
    print("\nserve (another type: another --model):")
    files = find_gguf(str(output), smallest)
    print(shlex.join(llama_server_command(*files, read_facts(str(output)), ServerOptions(port=8080))))
    if done.mmproj is not None:
        modelfile = shlex.quote(os.fspath(output / f"Modelfile-{smallest}"))
        print(f"ollama create pokegemma --file {modelfile}")


if __name__ == "__main__":
    run(main)
