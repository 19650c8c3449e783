"""Time the conversion of recorded sessions against the plain loop, in one run.

    python benchmarks/convert.py --eevee_data_dir path/to/runs

The plain loop, for each sample: open four files, paste them, write the time labels, save with Pillow's defaults, copy
four files. It is given the windows; ours also reads the sessions, checks every frame, writes the JSONL and the report.
Both write into fresh folders, by turns; the medians are compared.
"""

import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from pokegemma import cli
from pokegemma.data.convert import WindowOptions
from pokegemma.data.corpus import convert_corpus
from pokegemma.data.frame_pictures import FRAME_SIZE_PX
from pokegemma.data.grids import GRID_SIZE_PX, draw_label
from pokegemma.data.samples import Sample, read_samples
from pokegemma.errors import PokegemmaError
from pokegemma.options import option
from pokegemma.provenance import git_commit, package_versions


@dataclass(frozen=True)
class BenchmarkOptions:
    """What is converted, and how often."""

    eevee_data_dir: str = option("../shared/eevee_v1/runs", "folder of recorded sessions")
    num_workers: int = option(2, "processes of our conversion")
    repeats: int = option(5, "how often each is timed")
    json: bool = option(False, "print the result as JSON")

    def __post_init__(self) -> None:
        if self.num_workers < 1 or self.repeats < 1:
            raise PokegemmaError("--num_workers and --repeats must be 1 or more")


def convert_plainly(samples: list[Sample], frames_dir: Path, output: Path) -> None:
    """Make the same grid pictures the plain way, and copy each window's frames."""
    for folder in ("frames", "grid_images"):
        (output / folder).mkdir(parents=True)
    for sample in samples:
        name = sample.id.replace("/", "_")
        grid = Image.new("RGB", GRID_SIZE_PX)
        for index, frame in enumerate(sample.frames):
            tile = Image.open(frames_dir / frame).convert("RGB")
            draw_label(tile, index)
            grid.paste(tile, (index % 2 * FRAME_SIZE_PX[0], index // 2 * FRAME_SIZE_PX[1]))
        grid.save(output / "grid_images" / f"{name}.png")
        for index, frame in enumerate(sample.frames):
            shutil.copy(frames_dir / frame, output / "frames" / f"{name}_{index}.png")


def convert_ours(data_dir: Path, output: Path, num_workers: int) -> None:
    convert_corpus(data_dir, output, window=WindowOptions(), eval_fraction=0.1, num_workers=num_workers)


def main() -> None:
    (options,) = cli.parse_options(BenchmarkOptions, description=__doc__)
    data_dir = Path(options.eevee_data_dir)
    seconds: dict[str, list[float]] = {"plain": [], "ours": []}
    cpu_seconds: dict[str, list[float]] = {"plain": [], "ours": []}
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder) / "reference"
        convert_ours(data_dir, reference, options.num_workers)
        samples = [sample for split in ("train", "eval") for sample in read_samples(reference / f"{split}.jsonl")]
        for repeat in tqdm(range(options.repeats), desc="repeats"):
            for name, convert in (
                ("plain", lambda output: convert_plainly(samples, reference, output)),
                ("ours", lambda output: convert_ours(data_dir, output, options.num_workers)),
            ):
                # Nothing is deleted before the end: ext4 is slow to create files where many were just deleted.
                output = Path(folder) / f"{name}{repeat}"
                start, start_cpu = time.perf_counter(), sum(os.times()[:4])
                convert(output)
                seconds[name].append(time.perf_counter() - start)
                cpu_seconds[name].append(sum(os.times()[:4]) - start_cpu)  # of the worker processes too
        num_bytes = {
            name: sum(path.stat().st_size for path in (Path(folder) / f"{name}0").rglob("*.png")) for name in seconds
        }
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    result = {
        "samples": len(samples),
        "samples_per_s": {name: round(len(samples) / median, 1) for name, median in medians.items()},
        "ratio": round(medians["plain"] / medians["ours"], 2),
        "ratio_of_cpu_time": round(statistics.median(cpu_seconds["plain"]) / statistics.median(cpu_seconds["ours"]), 2),
        "seconds": {name: [round(value, 3) for value in times] for name, times in seconds.items()},
        "png_mib": {name: round(count / 2**20, 1) for name, count in num_bytes.items()},
        "num_workers": options.num_workers,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "versions": {name: package_versions()[name] for name in ("python", "pillow")},
        "git_commit": git_commit(),
    }
    if options.json:
        json.dump(result, sys.stdout, indent=2)
        print()
        return
    for name, value in result.items():
        print(f"{name:20}{value}")


if __name__ == "__main__":
    cli.run(main)
