"""Read recordings or a dataset, and write the inspection page."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pokegemma.data.convert import WindowOptions
from pokegemma.data.inspection.dataset import inspect_dataset
from pokegemma.data.inspection.page import PAGE_MARK, Conversations, render_inspection
from pokegemma.data.inspection.recordings import inspect_recordings
from pokegemma.data.inspection.views import Marks, SessionView, find_marks, summarise
from pokegemma.data.prompts import Layout
from pokegemma.data.samples import EVAL_FILE, TRAIN_FILE, Sample
from pokegemma.errors import PokegemmaError
from pokegemma.outputs import atomic_file
from pokegemma.tables import format_table


@dataclass(frozen=True)
class Inspection:
    """What was read: sessions, how their turns are related, and what could not be read.

    `num_found` sessions exist, of which some may not have been read.
    """

    path: Path
    sessions: list[SessionView]
    marks: Marks
    problems: list[str]
    num_found: int

    @property
    def samples(self) -> list[Sample]:
        return [turn.sample for session in self.sessions for turn in session.turns if turn.sample is not None]

    @property
    def summary(self) -> dict[str, Any]:
        return summarise(self.sessions, self.marks)


def inspect_path(path: Path, *, max_sessions: int, num_workers: int) -> Inspection:
    """Read a dataset (a folder with train.jsonl, or a JSONL file of samples) or the recordings below a folder.

    Raises:
        PokegemmaError: there is neither, or nothing in it can be read.
    """
    if not path.exists():
        raise PokegemmaError(f"--data_path {path}: no such file or folder")
    is_dataset = path.is_file() or any((path / name).is_file() for name in (TRAIN_FILE, EVAL_FILE))
    if is_dataset:
        found = inspect_dataset(path, max_sessions=max_sessions, num_workers=num_workers)
    else:
        found = inspect_recordings(path, window=WindowOptions(), max_sessions=max_sessions, num_workers=num_workers)
    sessions, problems, num_found = found
    if not any(session.turns for session in sessions):
        raise PokegemmaError(f"--data_path {path}: no turn to show: {(problems or ['its sessions have no turns'])[0]}")
    return Inspection(path, sessions, find_marks(sessions), problems, num_found)


def choose_layout(inspection: Inspection, layout: Layout | None) -> Layout:
    """Return a layout, or what the samples have pictures for: grid, else frames.

    Raises:
        PokegemmaError: the layout is grid, and samples have no grid picture.
    """
    without = next((sample.id for sample in inspection.samples if sample.image is None), None)
    if layout == "grid" and without is not None:
        raise PokegemmaError(f"--layout grid: {without} has no grid picture; choose --layout frames")
    return layout or ("grid" if without is None else "frames")


def check_page(path: Path) -> None:
    """Refuse to replace a file that is not an inspection page.

    Raises:
        PokegemmaError: it exists and is another file, or a folder.
    """
    if path.is_dir():
        raise PokegemmaError(f"--output_file {path} is a folder; name a file in it, such as {path / 'inspection.html'}")
    if path.is_file():
        with open(path, "rb") as file:
            if PAGE_MARK.encode() not in file.read(4096):
                raise PokegemmaError(f"--output_file {path} is not a page of this script, so it is not overwritten")


def write_page(path: Path, inspection: Inspection, blocks: Conversations, *, prompt_note: str) -> int:
    """Write the page, and return its size in bytes."""
    page = render_inspection(
        inspection.sessions,
        inspection.marks,
        source=inspection.path.resolve().name,
        num_found=inspection.num_found,
        problems=inspection.problems,
        blocks=blocks,
        prompt_note=prompt_note,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path.stat().st_size


def format_counts(inspection: Inspection, *, page: Path, num_bytes: int) -> str:
    """Return the counts as a table for a terminal."""
    summary = inspection.summary
    reasons = ", ".join(f"{count} {name}" for name, count in summary["turns_without_sample"].items()) or "none"
    of_found = f" of {inspection.num_found}, evenly spread" if inspection.num_found > summary["sessions"] else ""
    rows = [
        ("sessions", f"{summary['sessions']}{of_found}"),
        ("turns", f"{summary['turns']}"),
        ("samples", f"{summary['samples']}"),
        ("turns without a sample", f"{sum(summary['turns_without_sample'].values())} ({reasons})"),
        ("samples without effect", f"{summary['samples_without_effect']}"),
        ("repeated samples", f"{summary['repeated_samples']}"),
        ("turns on duplicate screens", f"{summary['turns_on_duplicate_screens']}"),
        ("screens with different buttons", f"{summary['screens_with_different_buttons']}"),
        ("distinct screens", f"{summary['distinct_screens']} ({summary['picture_bytes'] / 1e6:.1f} MB)"),
        ("problems", f"{len(inspection.problems) + sum(len(session.problems) for session in inspection.sessions)}"),
        ("written to", f"{page} ({num_bytes / 1e6:.1f} MB)"),
    ]
    return format_table(rows, num_left=2)
