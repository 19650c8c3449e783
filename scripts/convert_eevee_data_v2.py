"""Convert recorded Eevee v1 sessions into samples for training.

python scripts/convert_eevee_data_v2.py --eevee_data_dir path/to/runs --output_dir training_data

Writes train.jsonl, eval.jsonl, frames/, grid_images/, conversion_report.json and run.json, which docs/format_spec.md
describes.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from pokegemma.cli import parse_options, run
from pokegemma.data.conversion_report import format_report
from pokegemma.data.convert import WindowOptions
from pokegemma.data.corpus import convert_corpus
from pokegemma.data.recordings.corrections import LABELLERS
from pokegemma.environment import usable_cores
from pokegemma.errors import PokegemmaError, check_range, check_ranges
from pokegemma.options import option


@dataclass
class ConvertOptions:
    eevee_data_dir: str = option(
        ...,
        "Folder of recorded sessions, at any depth: runs/, its parent, or one session.",
        aliases=["--eevee_runs_dir", "--recordings_dir"],
    )
    output_dir: str = option("training_data", "Folder of the dataset; other files in it stay.")
    num_frames: int = option(4, "Frames of a sample, at most. The last is the target turn's.")
    min_frames: int | None = option(
        None, "A sample with fewer frames repeats its first. Default: 4, or --num_frames if that is less."
    )
    max_gap_s: float = option(30.0, "A longer pause between two frames starts a new window.")
    corrections: str | None = option(
        None, "File of corrected labels, one JSON object a line: session, turn, button, by, reasoning."
    )
    label_by: list[str] = option(
        [], f"Keep only labels by these: {', '.join(LABELLERS)}. Default: all, also Eevee v1's."
    )
    eval_fraction: float = option(0.1, "Share of the samples held out, in whole sessions.")
    grid_images: bool = option(True, "Write each window as one 2x2 picture, too.")
    drop_no_effect: bool = option(False, "Leave out decisions after which the screen is the same as before.")
    max_repeats: int | None = option(
        None, "Keep at most so many decisions with the same button on the same screen in a session. Default: all."
    )
    remove_overlay: bool = option(False, "Undo the grid of lines and labels that Eevee v1 drew on its screenshots.")
    num_workers: int = option(0, "Processes. 0: one for each core.")
    ray_address: str | None = option(
        None,
        "Convert on a Ray cluster whose machines share both folders: host:port, ray://host:port, auto, or "
        "local (one on this machine).",
    )
    overwrite: bool = option(False, "Replace an earlier conversion in --output_dir.")
    json: bool = option(False, "Print the report as JSON.")

    def __post_init__(self) -> None:
        check_range("--num_frames", self.num_frames, at_least=1, at_most=64)
        check_range("--min_frames", self.min_frames, at_least=1, at_most=self.num_frames)
        check_range("--max_repeats", self.max_repeats, at_least=1)
        if unknown := sorted(set(self.label_by) - set(LABELLERS)):
            raise PokegemmaError(f"--label_by {unknown[0]}: must be among {', '.join(LABELLERS)}")
        check_range("--eval_fraction", self.eval_fraction, at_least=0, below=1)
        check_ranges(self, "max_gap_s", "num_workers", at_least=0)


def main() -> None:
    (options,) = parse_options(ConvertOptions, description=__doc__)
    min_frames = min(4, options.num_frames) if options.min_frames is None else options.min_frames
    report = convert_corpus(
        Path(options.eevee_data_dir),
        Path(options.output_dir),
        window=WindowOptions(
            num_frames=options.num_frames,
            min_frames=min_frames,
            max_gap_s=options.max_gap_s,
            grid_images=options.grid_images,
            drop_no_effect=options.drop_no_effect,
            max_repeats=options.max_repeats,
            remove_overlay=options.remove_overlay,
            label_by=tuple(options.label_by),
        ),
        eval_fraction=options.eval_fraction,
        num_workers=options.num_workers or (usable_cores() if options.ray_address in (None, "local") else 0),
        ray_address=options.ray_address,
        overwrite=options.overwrite,
        corrections=None if options.corrections is None else Path(options.corrections),
        options={**asdict(options), "min_frames": min_frames},
    )
    if options.json:
        json.dump(report, sys.stdout, indent=2, ensure_ascii=False)
        print()
    else:
        print(format_report(report, Path(options.output_dir)))


if __name__ == "__main__":
    run(main)
