"""Convert recorded Eevee v1 sessions into samples for training.

    python scripts/convert_eevee_data_v2.py --eevee_data_dir ../shared/eevee_v1/runs --output_dir training_data

Writes train.jsonl, eval.jsonl, frames/, grid_images/, conversion_report.json and run.json. The sample format is
described in docs/format_spec.md.
"""

import json
import math
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pokegemma import cli
from pokegemma.data.conversion_report import CONVERSION_REPORT
from pokegemma.data.convert import WindowOptions
from pokegemma.data.corpus import convert_corpus
from pokegemma.data.decisions import clean_text
from pokegemma.errors import PokegemmaError


@dataclass(frozen=True)
class ConvertOptions:
    """Which sessions become which samples."""

    eevee_data_dir: str = field(
        metadata={
            "aliases": ["--eevee_runs_dir"],
            "help": "folder of recorded sessions, at any depth: runs/, its parent, or one session",
        }
    )
    output_dir: str = field(default="training_data", metadata={"help": "where the dataset is written"})
    num_frames: int = field(
        default=4, metadata={"help": "frames a sample shows at most; the last is the target turn's"}
    )
    min_frames: int | None = field(
        default=None, metadata={"help": "with fewer frames than this the first is repeated; default: 4, or num_frames"}
    )
    max_gap_s: float = field(default=30.0, metadata={"help": "a longer pause between two frames starts a new window"})
    eval_fraction: float = field(default=0.1, metadata={"help": "share of the samples held out, in whole sessions"})
    grid_images: bool = field(default=True, metadata={"help": "write each window as one 2x2 picture too"})
    num_workers: int = field(default=0, metadata={"help": "processes; 0 means one for each core"})
    ray_address: str | None = field(
        default=None,
        metadata={
            "help": "convert on a Ray cluster whose machines share both folders: host:port, ray://host:port, auto, or "
            "local (one on this machine)"
        },
    )
    overwrite: bool = field(default=False, metadata={"help": "replace an earlier conversion in output_dir"})
    json: bool = field(default=False, metadata={"help": "print the report as JSON"})

    def __post_init__(self) -> None:
        for name, valid, rule in (
            ("num_frames", 1 <= self.num_frames <= 64, "a number from 1 to 64"),
            (
                "min_frames",
                self.min_frames is None or 1 <= self.min_frames <= self.num_frames,
                f"from 1 to --num_frames ({self.num_frames})",
            ),
            ("max_gap_s", self.max_gap_s >= 0, "seconds, 0 or more"),
            ("eval_fraction", math.isfinite(self.eval_fraction) and 0 <= self.eval_fraction < 1, "from 0 to below 1"),
            ("num_workers", self.num_workers >= 0, "0 (all cores) or more"),
        ):
            if not valid:
                raise PokegemmaError(f"--{name} {getattr(self, name)}: must be {rule}")


def main() -> None:
    (options,) = cli.parse_options(ConvertOptions, description=__doc__)
    min_frames = min(4, options.num_frames) if options.min_frames is None else options.min_frames
    report = convert_corpus(
        Path(options.eevee_data_dir),
        Path(options.output_dir),
        window=WindowOptions(options.num_frames, min_frames, options.max_gap_s, options.grid_images),
        eval_fraction=options.eval_fraction,
        num_workers=options.num_workers or (num_cores() if options.ray_address in (None, "local") else 0),
        ray_address=options.ray_address,
        overwrite=options.overwrite,
        options={**asdict(options), "min_frames": min_frames},
    )
    if options.json:
        json.dump(report, sys.stdout, indent=2, ensure_ascii=False)
        print()
    else:
        print_report(report, Path(options.output_dir))


def num_cores() -> int:
    """Return how many cores this process may use; macOS does not say, and has no limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def print_report(report: dict[str, Any], output_dir: Path) -> None:
    sessions, splits = report["sessions"], report["splits"]
    reasons = ", ".join(f"{count} {name}" for name, count in report["turns_without_sample"].items() if count) or "none"
    rows = [
        (
            "sessions",
            f"{sessions['found']} ({sessions['without_samples']} without samples, "
            f"{sessions['unreadable']} unreadable or copies)",
        ),
        ("turns", report["turns"]),
        ("samples", report["samples"]),
        ("turns without a sample", f"{report['turns'] - report['samples']} ({reasons})"),
        ("frames stored", report["frames"]),
    ]
    rows += [(name, f"{part['samples']} samples of {part['sessions']} sessions") for name, part in splits.items()]
    for button, count in splits["train"]["buttons"].items():
        rows.append((f"  {button}", f"{count} train, {splits['eval']['buttons'][button]} eval"))
    if report["goals_shortened"]:
        rows.append(("goals shortened", f"{report['goals_shortened']} sessions"))
    rows.append(("written to", f"{clean_text(str(output_dir))} (details: {CONVERSION_REPORT})"))
    for name, value in rows:
        print(f"{name:24}{value}")


if __name__ == "__main__":
    cli.run(main)
