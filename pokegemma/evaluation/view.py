"""How samples are shown to a model: as in its training, unless the user chooses otherwise."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pokegemma.data.convert import WindowOptions
from pokegemma.data.prompts import LAYOUTS, Layout
from pokegemma.data.trajectories import DEFAULT_MAX_DECISIONS, DEFAULT_OVERLAP
from pokegemma.errors import PokegemmaError
from pokegemma.provenance import read_run_record

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class View:
    """A layout, and the length and overlap of trajectories; see `cut_trajectories`."""

    layout: Layout
    max_decisions: int
    overlap_decisions: int


def resolve_view(
    model_path: str | Path | None,
    *,
    layout: Layout | None = None,
    max_decisions: int | None = None,
    overlap_decisions: int | None = None,
) -> View:
    """Return the view. Values that are None are taken from the model's run.json, else they are training's defaults.

    `model_path` None: a model on a server, of which nothing is known.

    Raises:
        PokegemmaError: run.json is damaged, or the overlap is not smaller than a trajectory.
    """
    trained = training_record(model_path).get("options", {})
    layout = layout or (trained.get("layout") if trained.get("layout") in LAYOUTS else "grid")
    max_decisions = max_decisions or trained.get("max_decisions") or DEFAULT_MAX_DECISIONS
    if overlap_decisions is None:
        overlap_decisions = min(trained.get("overlap_decisions", DEFAULT_OVERLAP), max_decisions - 1)
    if not 0 <= overlap_decisions < max_decisions:
        raise PokegemmaError(f"--overlap_decisions {overlap_decisions}: must be between 0 and {max_decisions - 1}")
    return View(layout, max_decisions, overlap_decisions)


def resolve_window(
    model_path: str | Path | None,
    *,
    num_frames: int | None = None,
    min_frames: int | None = None,
    max_gap_s: float | None = None,
) -> WindowOptions:
    """Return which frames a decision shows. Values that are None are those of the dataset that the model learned from.

    Models trained by earlier versions do not record it, and other folders cannot: then they are the converter's
    defaults, and a line of the log names them.

    Raises:
        PokegemmaError: run.json is damaged, or a value is out of range.
    """
    recorded = training_record(model_path).get("window") or {}
    default = WindowOptions()
    if not recorded and None in (num_frames, max_gap_s):
        logger.warning(
            "%s: no run.json with the frames of its training; taking %d frames and a pause of %g s where they are not "
            "given (--num_frames, --max_gap_s)",
            model_path or "the model",
            num_frames or default.num_frames,
            max_gap_s or default.max_gap_s,
        )
    if num_frames is not None and min_frames is None:
        min_frames = min(num_frames, recorded.get("min_frames", default.min_frames))
    given = {"num_frames": num_frames, "min_frames": min_frames, "max_gap_s": max_gap_s}
    return WindowOptions(
        **{
            name: recorded.get(name, getattr(default, name)) if value is None else value
            for name, value in given.items()
        }
    )


def training_record(model_path: str | Path | None) -> Mapping[str, Any]:
    """Return the run.json of a model's training run; {} where there is none, also for the path None.

    That of a merged model contains its adapter's, and that of an exported model contains the merged model's.

    Raises:
        PokegemmaError: run.json is damaged.
    """
    record = (model_path is not None and read_run_record(Path(model_path))) or {}
    record = record.get("model") or record
    return record.get("training") or record
