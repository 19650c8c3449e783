"""Read JSON lines that another program may still be writing."""

import json
from pathlib import Path
from typing import Any


def read_json_lines(path: Path, *, name: str) -> tuple[list[Any], list[str]]:
    """Return the objects of a file, None for a line that is not JSON, and a problem for each such line.

    Blank lines are left out, and a last line that is cut off is too, with a problem.

    Args:
        name: of the file, for the problems.
    """
    records: list[Any] = []
    problems: list[str] = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                records.append(json.loads(line))
            except (ValueError, RecursionError):
                if not line.endswith(b"\n"):
                    problems.append(f"{name}: its last line is cut off, and is not read")
                    break
                problems.append(f"{name} line {number}: not JSON")
                records.append(None)
    return records, problems
