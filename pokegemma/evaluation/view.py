"""How samples are shown to a model: as in its training, unless the user chooses otherwise."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pokegemma.data.prompts import LAYOUTS, Layout
from pokegemma.data.trajectories import DEFAULT_MAX_DECISIONS, DEFAULT_OVERLAP
from pokegemma.errors import PokegemmaError
from pokegemma.provenance import read_run_record


@dataclass(frozen=True)
class View:
    """A layout, and the length and overlap of trajectories; see `cut_trajectories`."""

    layout: Layout
    max_decisions: int
    overlap_decisions: int


def resolve_view(
    model_path: str | Path,
    *,
    layout: Layout | None = None,
    max_decisions: int | None = None,
    overlap_decisions: int | None = None,
) -> View:
    """Return the view. Values that are None are taken from the model's run.json, else they are training's defaults.

    Raises:
        PokegemmaError: run.json is damaged, or the overlap is not smaller than a trajectory.
    """
    trained = _training_options(Path(model_path))
    layout = layout or (trained.get("layout") if trained.get("layout") in LAYOUTS else "grid")
    max_decisions = max_decisions or trained.get("max_decisions") or DEFAULT_MAX_DECISIONS
    if overlap_decisions is None:
        overlap_decisions = min(trained.get("overlap_decisions", DEFAULT_OVERLAP), max_decisions - 1)
    if not 0 <= overlap_decisions < max_decisions:
        raise PokegemmaError(f"--overlap_decisions {overlap_decisions}: must be between 0 and {max_decisions - 1}")
    return View(layout, max_decisions, overlap_decisions)


def _training_options(model: Path) -> Mapping[str, Any]:
    record = read_run_record(model) or {}
    record = record.get("training") or record  # run.json of a merged model contains that of its adapter
    return record.get("options", {})
