"""Put a real Gemma 3 270M, with a random vision tower, under the whole pipeline, and write the tables of real_gemma.md.

    python benchmarks/real_gemma.py --runs_dir path/to/runs --output_dir outputs/real_gemma --parts tokens buttons

It needs ./init.sh --with gguf --with gemma270m --accept-gemma-terms, and recorded sessions. The checkpoint and the
dataset are made once in --output_dir. Each part writes its figures to PART.json there, with the command, the machine
and the commit; a part whose file exists is not measured again. --write_page writes the tables into
benchmarks/real_gemma.md. Random pictures mean nothing, and so do the buttons: what is compared is one way of computing
with another.
"""

import json
import math
import os
import platform
import re
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":  # a script has only its own folder on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu_parts.plan import Run
from benchmarks.real_gemma_parts import decisions, memory, rounding, scripts, tokens, training
from pokegemma.cli import parse_options, run
from pokegemma.data.convert import WindowOptions
from pokegemma.data.corpus import convert_corpus
from pokegemma.errors import PokegemmaError
from pokegemma.gemma.gemma270m.package import find_weights
from pokegemma.gemma.gemma270m.vision import convert_gguf_with_vision
from pokegemma.options import option
from pokegemma.outputs import atomic_folder, write_if_changed
from pokegemma.provenance import PROJECT_ROOT, read_run_record, write_record, write_run_record

PAGE = PROJECT_ROOT / "benchmarks" / "real_gemma.md"
PATCH_PX = 14


@dataclass(frozen=True)
class Part:
    """Figures that are measured together, and their table in Markdown."""

    measure: Callable[[Run], dict[str, Any]]
    table: Callable[[dict[str, Any]], str]


PARTS = {
    "tokens": Part(tokens.measure_counts, tokens.counts_table),
    "buttons": Part(tokens.measure_buttons, tokens.buttons_table),
    "training": Part(training.measure, training.table),
    "decisions": Part(decisions.measure, decisions.table),
    "gguf": Part(scripts.measure_gguf, scripts.gguf_table),
    "qlora": Part(scripts.measure_qlora, scripts.qlora_table),
    "rounding": Part(rounding.measure, rounding.table),
    "memory": Part(memory.measure, memory.table),
}


@dataclass(frozen=True)
class RealGemmaOptions:
    runs_dir: str = option(..., "Folder of recorded sessions.")
    output_dir: str = option(..., "Folder for the checkpoint, the dataset and the figures.")
    parts: list[str] = option(list(PARTS), "What to measure.", choices=list(PARTS))
    num_image_tokens: int = option(256, "Tokens of a picture. 256 is what llama.cpp assumes; 4 makes a quick trial.")
    write_page: bool = option(False, "Write the tables of these parts into benchmarks/real_gemma.md.")

    def __post_init__(self) -> None:
        if math.isqrt(self.num_image_tokens) ** 2 != self.num_image_tokens or self.num_image_tokens < 1:
            raise PokegemmaError(f"--num_image_tokens {self.num_image_tokens}: must be the square of a number")


def prepare(options: RealGemmaOptions) -> Run:
    """Make the checkpoint and the dataset, unless they are there.

    Raises:
        PokegemmaError: the weights are not installed, there are no sessions, or the checkpoint has other pictures.
    """
    made = Run(Path(options.output_dir).absolute(), rehearse=False)
    made.folder.mkdir(parents=True, exist_ok=True)
    shape = {
        "num_image_tokens": options.num_image_tokens,
        "image_size_px": PATCH_PX * math.isqrt(options.num_image_tokens),
    }
    if not made.checkpoint.is_dir():
        with atomic_folder(made.checkpoint, stage="real gemma") as folder:
            convert_gguf_with_vision(find_weights(), folder, **shape)
            write_run_record(folder, stage="real gemma", options=shape)
    record = read_run_record(made.checkpoint) or {}
    if record.get("options") != shape:
        raise PokegemmaError(f"{made.checkpoint} has other pictures: {record.get('options')}; choose another folder")
    if not made.dataset.is_dir():
        convert_corpus(Path(options.runs_dir), made.dataset, window=WindowOptions(), eval_fraction=0.1, num_workers=1)
    return made


def cpu_s() -> float:
    """Return the CPU seconds of this process and of those that it has started and that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def measure(name: str, made: Run, options: RealGemmaOptions) -> Path:
    """Measure a part, unless its file exists, and return the JSON file with its figures."""
    path, began = made.folder / f"{name}.json", cpu_s()
    if path.is_file():
        return path
    figures = PARTS[name].measure(made)
    command = f"python benchmarks/real_gemma.py --runs_dir path/to/runs --output_dir outputs/real_gemma --parts {name}"
    if options.num_image_tokens != 256:
        command += f" --num_image_tokens {options.num_image_tokens}"
    write_record(
        path,
        stage=f"real gemma, {name}",
        options=vars(options),
        command=command,
        processor=processor_name(),
        threads=torch.get_num_threads(),
        load_average=os.getloadavg()[0],
        cpu_s=round(cpu_s() - began, 1),
        figures=figures,
    )
    return path


def processor_name() -> str:
    names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    return names[0] if names else platform.machine()


def describe(name: str, path: Path) -> str:
    """Return the table of a part with where its figures come from."""
    record = json.loads(path.read_text(encoding="utf-8"))
    versions = ", ".join(f"{package} {record['versions'][package]}" for package in ("torch", "transformers"))
    source = (
        f"`{record['command']}`, commit {record['git_commit'][:7]}{'+changes' * ('+' in record['git_commit'])}, "
        f"{record['created'][:10]}; {record['processor']}, {record['threads']} thread, load average "
        f"{record['load_average']:.1f}, {record['cpu_s']:.0f} s of CPU time; {versions}"
    )
    return f"{PARTS[name].table(record['figures'])}\n\n{source}.\n"


def write_page(page: str, name: str, text: str) -> str:
    """Return the page with a part's text between its marks."""
    start, end = f"<!-- {name}: written by real_gemma.py -->\n", f"<!-- end of {name} -->\n"
    before, found, rest = page.partition(start)
    _, ended, after = rest.partition(end)
    if not (found and ended):
        raise PokegemmaError(f"{PAGE.name} has no place for {name}")
    return f"{before}{start}\n{text}\n{end}{after}"


def main() -> None:
    (options,) = parse_options(RealGemmaOptions, description=__doc__)
    made = prepare(options)
    texts = {name: describe(name, measure(name, made, options)) for name in options.parts}
    for name, text in texts.items():
        print(f"## {name}\n\n{text}")
        if options.write_page:
            write_if_changed(PAGE, write_page(PAGE.read_text(encoding="utf-8"), name, text))


if __name__ == "__main__":
    run(main)
