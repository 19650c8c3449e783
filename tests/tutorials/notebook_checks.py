"""Execute a tutorial, and compare its text with what its cells have computed."""

import base64
import io
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import nbformat
import numpy as np
from nbclient import NotebookClient
from PIL import Image

PARTS = ("Objectives", "Theory", "Practice", "A deeper look", "Tips", "Exercises", "Next steps")
"""Second-level headings of each tutorial, in order."""
NUM_EXERCISES = 3

_COMMENT = re.compile(r"([^\n]*?)<!--\s*(?!#)(.*?)\s*-->", re.DOTALL)
_NUMBER = re.compile(r"(?<![\w.,])([-−]?\d[\d,]*(?:\.\d+)?)(?: ?[^\d\s]{1,12})?$")
_BARE_NUMBER = re.compile(r"\*\*[-−]?\d[\d,.]*(?: ?%)?\*\*(?! ?<!--)")
_MIN_INK = 0.005
"""A picture whose most frequent colour covers all but so much of it is blank."""


@dataclass(frozen=True)
class Quoted:
    """A figure of the text, such as "97.4 %", and the expression behind it in an HTML comment."""

    text: str
    expression: str

    def problem(self, value: object) -> str | None:
        """Return how the figure differs from the value of its expression, None where it does not."""
        if self._agrees(value):
            return None
        return f"{self.text[-40:]!r} is quoted, but {self.expression} is {value!r}"

    def _agrees(self, value: object) -> bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str):
            return self.text.endswith(value)
        match = _NUMBER.search(self.text)
        if match is None:
            return False
        number = match[1].replace(",", "").replace("−", "-")
        decimals = len(number.partition(".")[2])
        return abs(value - float(number)) <= 0.5 * 10**-decimals * (1 + 1e-9)


def quoted_figures(notebook: nbformat.NotebookNode) -> list[Quoted]:
    """Return the figures of the text that are followed by an expression."""
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    return [Quoted(before.strip(" *`"), code) for text in texts for before, code in _COMMENT.findall(text)]


def unproved_figures(notebook: nbformat.NotebookNode) -> list[str]:
    """Return the numbers in bold that no expression follows."""
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    return [figure for text in texts for figure in _BARE_NUMBER.findall(text)]


def execute(notebook: nbformat.NotebookNode, folder: Path, *, python: str = sys.executable) -> list[object]:
    """Run all cells in `folder`, and return the values of the expressions that `quoted_figures` returns.

    Args:
        python: what the cells start scripts with.

    Raises:
        CellExecutionError: a cell failed; its traceback is the message.
    """
    expressions = [f"({quoted.expression})" for quoted in quoted_figures(notebook)]
    source = f"print(__import__('json').dumps([{', '.join(expressions)}], default=lambda value: value.item()))"
    notebook.cells.append(nbformat.v4.new_code_cell(source))
    first = f"import multiprocessing.spawn, sys; sys.executable = {python!r}"  # workers start with the kernel's own
    notebook.cells.insert(0, nbformat.v4.new_code_cell(first))
    client = NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.execute()
    del notebook.cells[0]
    return json.loads("".join(output.text for output in notebook.cells.pop().outputs if output.name == "stdout"))


def pictures(notebook: nbformat.NotebookNode) -> list[Image.Image]:
    """Return the pictures in the outputs of all cells."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    found = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    return [Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB") for content in found]


def is_blank(picture: Image.Image) -> bool:
    """Return whether a picture shows next to nothing."""
    _, counts = np.unique(np.asarray(picture).reshape(-1, 3), axis=0, return_counts=True)
    return counts.max() > (1 - _MIN_INK) * counts.sum()


def headings(notebook: nbformat.NotebookNode, level: int) -> list[str]:
    """Return the headings of a level, in order."""
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    return re.findall(rf"^{'#' * level} (.+)$", text, re.MULTILINE)


def exercises_without_answer(notebook: nbformat.NotebookNode) -> list[str]:
    """Return the exercises whose heading "#### Answer", with a code cell under it, is missing."""
    missing, exercise, is_answer = [], None, False
    for cell in notebook.cells:
        heading = re.match(r"#{2,4} .+", cell.source) if cell.cell_type == "markdown" else None
        if heading and not heading[0].startswith("####"):
            missing += [exercise] if exercise else []
            exercise = heading[0].lstrip("# ") if heading[0].startswith("### Exercise") else None
            is_answer = False
        elif heading:
            is_answer = heading[0] == "#### Answer"
        elif cell.cell_type == "code" and is_answer:
            exercise = None
    return missing + ([exercise] if exercise else [])
