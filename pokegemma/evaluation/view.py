"""How a model is shown its samples: as it was trained, unless the user says otherwise."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pokegemma.data.prompts import LAYOUTS, Layout
from pokegemma.errors import PokegemmaError
from pokegemma.provenance import read_run_record


@dataclass(frozen=True)
class View:
    """A layout; the other two are those of trajectories, see `cut_trajectories`."""

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
    """Return the view, None filled in from the model's run.json, or by training's own defaults where it has none.

    Raises:
        PokegemmaError: run.json is damaged, or the overlap leaves nothing of a trajectory.
    """
    trained = _training_options(Path(model_path))
    layout = layout or (trained.get("layout") if trained.get("layout") in LAYOUTS else "grid")
    max_decisions = max_decisions or trained.get("max_decisions") or 16
    if overlap_decisions is None:
        overlap_decisions = min(trained.get("overlap_decisions", 2), max_decisions - 1)
    if not 0 <= overlap_decisions < max_decisions:
        raise PokegemmaError(f"--overlap_decisions: {overlap_decisions} is not between 0 and {max_decisions - 1}")
    return View(layout, max_decisions, overlap_decisions)


def _training_options(model: Path) -> Mapping[str, Any]:
    record = read_run_record(model) or {}
    return (record.get("training") or record).get("options", {})  # a merged model's record holds its adapter's
