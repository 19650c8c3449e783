"""Build the notebooks of docs/tutorials, which are written as Markdown.

python docs/make_notebooks.py outputs/notebooks

Jupyter, VS Code and Colab open them. The first cell of each installs the project where it is missing; for that it
needs the address of the git repository.
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import jupytext
import nbformat

from pokegemma.cli import parse_options, run
from pokegemma.options import option
from pokegemma.outputs import atomic_file
from pokegemma.provenance import PROJECT_ROOT

SOURCES = sorted((PROJECT_ROOT / "docs" / "tutorials").glob("[0-9][0-9]_*.md"))
NO_ADDRESS = 'REPOSITORY = ""'
"""Begins the line of the first cell that is to contain the address."""


@dataclass
class NotebookOptions:
    output_dir: str = option(..., "Folder of the notebooks.")
    repository: str | None = option(None, "Address to clone the project from. Default: that of the remote origin.")


def read_tutorial(source: Path, *, repository: str = "") -> nbformat.NotebookNode:
    """Return a tutorial as a notebook without outputs. Shell commands are shown, and not run.

    Args:
        source: in jupytext's Markdown format.
        repository: address that the first cell clones.
    """
    notebook = jupytext.read(source)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"{source.stem[:2]}-{number:03d}"  # jupytext's are random
        if cell.cell_type == "code" and cell.source.startswith("%%sh\n"):  # jupytext would run a block of ```sh
            shown = f"```sh\n{cell.source.removeprefix('%%sh').strip()}\n```"
            notebook.cells[number] = nbformat.v4.new_markdown_cell(shown, id=cell.id)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    first.source = first.source.replace(NO_ADDRESS, f"REPOSITORY = {repository!r}" if repository else NO_ADDRESS)
    return notebook


def origin() -> str:
    """Return the address of the remote origin of this checkout, "" where there is none."""
    command = ["git", "-C", PROJECT_ROOT, "remote", "get-url", "origin"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def main() -> None:
    words = sys.argv[1:]
    if words and not words[0].startswith("-"):
        words.insert(0, "--output_dir")
    (options,) = parse_options(NotebookOptions, description=__doc__, argv=words)
    repository = origin() if options.repository is None else options.repository
    for source in SOURCES:
        path = Path(options.output_dir) / f"{source.stem}.ipynb"
        with atomic_file(path) as temporary:
            nbformat.write(read_tutorial(source, repository=repository), temporary)
        print(path)


if __name__ == "__main__":
    run(main)
