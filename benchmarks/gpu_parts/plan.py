"""What on_gpu.py measures: parts with a share of the time, and their units, each a row of the result."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIMIT_S = 480.0
RESERVE_S = 10.0
"""Left for writing the result and deleting the checkpoint."""

REHEARSAL_LIMIT_S = 3600.0
"""A rehearsal's limit: two busy cores need several minutes for its imports alone."""

RATES, DATASET, CHECKPOINT, LOSSES, DECISION = "rates", "dataset", "checkpoint", "losses", "decision"


@dataclass(frozen=True)
class Part:
    """Some units, measured in one process of its own after the other.

    Attributes:
        module: its `measure(unit, run)` returns the figures of a unit.
        share_s: how much of the time it may take, in proportion to the parts that are still to come.
        needs: units of earlier parts without which none of these can be measured.
    """

    name: str
    module: str
    share_s: float
    units: tuple[str, ...]
    needs: tuple[str, ...] = ()


_HERE = __package__
PARTS = (
    Part("preparation", f"{_HERE}.preparation", 25, (RATES, DATASET)),
    Part(
        "training",
        f"{_HERE}.training",
        110,
        (
            "stock TRL, four images",
            "trajectory, cached, no checkpointing",
            "frames, cached, no checkpointing",
            "frames, cached",
            "trajectory, cached",
            LOSSES,
            "stock TRL, four images, no checkpointing",
            "frames",
        ),
        needs=(DATASET,),
    ),
    Part("checkpoint", f"{_HERE}.preparation", 40, (CHECKPOINT,)),
    Part("memory", f"{_HERE}.memory", 85, ("qlora", "lora", "full"), needs=(DATASET, CHECKPOINT)),
    Part("batch size", f"{_HERE}.memory", 75, ("search",), needs=(DATASET, CHECKPOINT)),
    Part(
        "latency",
        f"{_HERE}.latency",
        60,
        tuple(f"{DECISION} as {layout}" for layout in ("trajectory", "frames", "grid")),
        needs=(RATES, DATASET, CHECKPOINT),
    ),
    Part("exactness", f"{_HERE}.exactness", 75, ("bfloat16", "fsdp2", "zero3"), needs=(DATASET,)),
)
"""Rows of training are those of train_throughput.py; LOSSES compares those before it with stock TRL's."""


@dataclass(frozen=True)
class Run:
    """A run, as its worker processes see it: the folder of its temporary files, and whether it is a rehearsal."""

    folder: Path
    rehearse: bool

    @property
    def shape(self) -> str:
        """A name in `made_model.SHAPES`."""
        return "tiny" if self.rehearse else "4b"

    @property
    def dataset(self) -> Path:
        return self.folder / "dataset"

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    def rows_file(self, part: str) -> Path:
        return self.folder / f"{part.replace(' ', '_')}.jsonl"

    def rows(self, part: str) -> list[dict[str, Any]]:
        """Return the rows of a part so far, in the order of its units; a last line that is not whole is left out."""
        path = self.rows_file(part)
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def measured(self) -> dict[str, dict[str, Any]]:
        """Return the rows that have figures, by unit."""
        return {row["unit"]: row for part in PARTS for row in self.rows(part.name) if is_measured(row)}

    def add_row(self, part: str, row: dict[str, Any]) -> None:
        with open(self.rows_file(part), "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def is_measured(row: dict[str, Any]) -> bool:
    """Return whether a row has figures: it was not skipped, and its unit neither failed nor was stopped."""
    return "skipped" not in row and "failed" not in row
