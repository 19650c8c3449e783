"""Imports point one way, and what needs no torch loads none."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import resolve_name

import pytest

from pokegemma.provenance import PROJECT_ROOT

PACKAGE = PROJECT_ROOT / "pokegemma"

LAYERS = (
    "parallel",
    "data",
    "gemma",
    "training",
    "evaluation",
    "engines",
    "export",
    "serving",
    "parity",
    "release",
    "play",
)
"""A layer may import itself, those before it, and the base."""

BASE = ("cli", "environment", "errors", "fingerprints", "outputs", "provenance", "settings", "tables")
OUTSIDE = ("scripts", "tests", "benchmarks", "conftest")

MODULES = {
    ".".join(path.relative_to(PROJECT_ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imported_by(source: str, module: str) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) for all that `source` imports, also within functions; a name in it may be a module."""
    package = module if PACKAGE.joinpath(*module.split(".")[1:]).is_dir() else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = resolve_name("." * node.level + (node.module or ""), package)
            yield from ((node.lineno, f"{origin}.{alias.name}") for alias in node.names)


def wrong_imports(source: str, module: str) -> list[str]:
    """Return what `source` may not import as `module`, each with its line."""
    part = module.split(".")[1] if "." in module else ""
    allowed = LAYERS[: LAYERS.index(part) + 1] if part in LAYERS else ()
    wrong = []
    for line, name in imported_by(source, module):
        top, *rest = name.split(".")
        if top in OUTSIDE or (top == "pokegemma" and rest and rest[0] in LAYERS and rest[0] not in allowed):
            wrong.append(f"{module}:{line} imports {name}")
    return wrong


def test_every_part_of_the_package_has_its_place() -> None:
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert (folders, modules) == (set(LAYERS), set(BASE)), "new here? give it a place in LAYERS or BASE"


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str) -> None:
    assert wrong_imports(MODULES[module].read_text(encoding="utf-8"), module) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pokegemma.data.grids", "from pokegemma.gemma.loading import open_checkpoint"),
        ("pokegemma.data.grids", "def read():\n    from pokegemma import training"),
        ("pokegemma.data.grids", "from ..play import toy_world"),
        ("pokegemma.data", "from ..training import sft"),
        ("pokegemma.training.sft", "import pokegemma.evaluation.metrics"),
        ("pokegemma.evaluation.metrics", "import pokegemma.release"),
        ("pokegemma.outputs", "from pokegemma.data.samples import Sample"),
        ("pokegemma", "from pokegemma.data import samples"),
        ("pokegemma.play.toy_world", "import scripts.evaluate"),
        ("pokegemma.play.toy_world", "from tests.conftest import frame_png"),
    ],
)
def test_an_import_against_the_order_is_found(module: str, source: str) -> None:
    assert len(wrong_imports(source, module)) == 1


def test_data_and_the_toy_game_load_no_torch() -> None:
    modules = [name for name in MODULES if name.startswith(("pokegemma.data", "pokegemma.play.toy_"))]
    assert {"pokegemma.data.convert", "pokegemma.data.checks.leakage", "pokegemma.play.toy_world"} <= set(modules)
    code = (
        f"import importlib, sys\nfor name in {modules!r}:\n    importlib.import_module(name)\n"
        "print(*sorted({'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT_ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr
