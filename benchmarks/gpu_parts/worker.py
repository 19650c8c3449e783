"""The process of a part of on_gpu.py: measures its units one after the other, and writes a row for each."""

import importlib
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu_parts.plan import Part, Run
from pokegemma.errors import PokegemmaError


def measure_units(part: Part, run: Run, *, ends: float) -> None:
    """Measure the units of a part that have no row yet; leave out those for which too little time is left.

    That is a unit for which one of those before took longer than what is left until `ends`. An error ends the process;
    the one that started it adds the row of that unit.
    """
    measure = importlib.import_module(part.module).measure
    for unit in part.units[len(run.rows(part.name)) :]:
        began = time.monotonic()
        slowest_s = max((row.get("seconds", 0) for row in run.rows(part.name)), default=0)
        left_s = ends - began
        row: dict[str, Any] = {"skipped": f"{left_s:.0f} s were left, and a unit before took {slowest_s:.0f} s"}
        if slowest_s <= left_s:
            row = measure(unit, run)
        run.add_row(part.name, {"unit": unit, **row, "seconds": round(time.monotonic() - began, 1)})


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    task = json.loads(sys.argv[1])
    try:
        measure_units(Part(**task["part"]), Run(Path(task["folder"]), task["rehearse"]), ends=task["ends"])
    except PokegemmaError as error:
        sys.exit(f"error: {error}")
