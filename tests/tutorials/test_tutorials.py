"""The tutorials: every cell runs, the figures of the text are those that the cells compute, nothing is left out."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

from docs.make_notebooks import SOURCES, read_tutorial
from docs.tutorials.workspace import run
from pokegemma.provenance import PROJECT_ROOT
from tests.conftest import REAL_RUNS
from tests.tutorials.notebook_checks import (
    NUM_EXERCISES,
    PARTS,
    Quoted,
    execute,
    exercises_without_answer,
    headings,
    is_blank,
    pictures,
    quoted_figures,
    unproved_figures,
)

by_tutorial = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


def notebook_of(*texts: str) -> nbformat.NotebookNode:
    """Return a notebook of code cells (texts that begin with ">") and Markdown cells."""
    new_code, new_markdown = nbformat.v4.new_code_cell, nbformat.v4.new_markdown_cell
    cells = [new_code(text[1:]) if text.startswith(">") else new_markdown(text) for text in texts]
    return nbformat.v4.new_notebook(cells=cells)


@pytest.fixture
def kernel_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder in which a kernel starts, which has this checkout and writes nothing elsewhere."""
    for name in ("TMPDIR", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(PROJECT_ROOT))
    monkeypatch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # a remark of the debugger, which nobody uses
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel's own draws into the cells' outputs
    if REAL_RUNS.is_dir():
        monkeypatch.setenv("SESSIONS", str(REAL_RUNS))  # a reader's own sessions
    return tmp_path


@pytest.mark.slow(40)
@pytest.mark.timeout(1800)  # busy cores make it many times as slow
@by_tutorial
def test_a_tutorial_runs_and_shows_what_its_text_says(source: Path, kernel_folder: Path, forked_python: str) -> None:
    notebook = read_tutorial(source)
    values = execute(notebook, kernel_folder, python=forked_python)
    problems = [quoted.problem(value) for quoted, value in zip(quoted_figures(notebook), values, strict=True)]
    assert [problem for problem in problems if problem] == []
    drawn = pictures(notebook)
    assert [number for number, picture in enumerate(drawn) if is_blank(picture)] == []
    assert drawn


# --- what every tutorial has


@by_tutorial
def test_a_tutorial_has_all_parts(source: Path) -> None:
    notebook = read_tutorial(source)
    assert [part for part in headings(notebook, 2) if part in PARTS] == list(PARTS)
    exercises = [heading.partition(":")[0] for heading in headings(notebook, 3) if heading.startswith("Exercise")]
    assert exercises == [f"Exercise {number + 1}" for number in range(NUM_EXERCISES)]
    assert exercises_without_answer(notebook) == []
    assert quoted_figures(notebook)
    assert unproved_figures(notebook) == []


@by_tutorial
def test_all_tutorials_begin_with_the_same_cell(source: Path) -> None:
    cells = [next(cell for cell in read_tutorial(path).cells if cell.cell_type == "code") for path in SOURCES]
    number = SOURCES.index(source)
    assert (cells[number].source, cells[number].metadata.tags) == (cells[0].source, ["install"])


def test_the_index_links_to_all_tutorials() -> None:
    index = (PROJECT_ROOT / "docs" / "tutorials" / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\]\((\d\d_\w+\.md)\)", index) == [source.name for source in SOURCES]


def test_notebooks_are_built(tmp_path: Path) -> None:
    command = [sys.executable, "docs/make_notebooks.py", str(tmp_path), "--repository", "https://git.example/pokegemma"]
    done = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    built = sorted(tmp_path.iterdir())
    assert [path.stem for path in built] == [source.stem for source in SOURCES]
    notebook = nbformat.read(built[0], as_version=4)
    nbformat.validate(notebook)
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    assert "REPOSITORY = 'https://git.example/pokegemma'" in code[0]
    assert not [source for source in code if source.startswith("%%")]


@pytest.mark.slow(4)
def test_a_script_that_does_not_end_as_expected_stops_its_cell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = "scripts/record_toy_game.py --num_sessions 0 --output_dir"
    assert run(command, tmp_path / "toy", status=2) == ""
    assert "error: --num_sessions 0" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="exit status 2, not 0"):
        run(command, tmp_path / "toy")


# --- the checks find what they look for


@pytest.mark.slow(5)
def test_figures_are_compared_with_the_kernel(kernel_folder: Path) -> None:
    notebook = notebook_of("**3**<!-- x + 1 --> and 4<!-- x + 1 --> and `up`<!-- name -->", ">x = 2", ">name = 'up'")
    values = execute(notebook, kernel_folder)
    assert values == [3, 3, "up"]
    problems = [quoted.problem(value) for quoted, value in zip(quoted_figures(notebook), values, strict=True)]
    assert problems == [None, "'and 4' is quoted, but x + 1 is 3", None]


@pytest.mark.parametrize(
    ("text", "value", "is_right"),
    [
        ("97.4 %", 97.36, True),
        ("97.4 %", 97.34, False),
        ("about 1.25 MiB", 1.2549, True),
        ("1,024 tokens", 1024, True),
        ("1,024", 1025, False),
        ("-0.5", -0.5, True),
        ("at least 95 %", True, True),
        ("at least 95 %", False, False),
        ("the button `left", "left", True),
        ("the button `left", "right", False),
        ("many", 3, False),
    ],
)
def test_a_wrong_figure_is_found(text: str, value: object, is_right: bool) -> None:
    assert (Quoted(text, "x").problem(value) is None) == is_right


def test_a_figure_in_bold_needs_an_expression() -> None:
    assert unproved_figures(notebook_of("**3** of **4**<!-- x -->, **97.4 %**, **12 rooms**")) == [
        "**3**",
        "**97.4 %**",
    ]


def test_an_exercise_without_an_answer_is_found() -> None:
    answered = ("### Exercise 1", "#### Answer", ">x")
    cells = (*answered, "### Exercise 2", ">x", "### Exercise 3: more", "#### Answer", "## Next steps")
    assert exercises_without_answer(notebook_of(*cells)) == ["Exercise 2", "Exercise 3: more"]


def test_a_blank_picture_is_found() -> None:
    picture = np.full((100, 100, 3), 255, np.uint8)
    assert is_blank(Image.fromarray(picture))
    picture[:10, :10] = 0
    assert not is_blank(Image.fromarray(picture))
