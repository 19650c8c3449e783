"""Imports point one way, and what needs no torch loads none."""

import ast
import subprocess
import sys
from collections import Counter, defaultdict
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
    "play",
    "release",
    "battles",
)
"""A layer may import itself, those before it, and the base."""

BASE = (
    "cli",
    "environment",
    "errors",
    "fingerprints",
    "options",
    "outputs",
    "pages",
    "provenance",
    "settings",
    "tables",
)
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
        ("pokegemma.data.grids", "from ..play.toy import world"),
        ("pokegemma.data", "from ..training import sft"),
        ("pokegemma.training.sft", "import pokegemma.evaluation.metrics"),
        ("pokegemma.evaluation.metrics", "import pokegemma.release"),
        ("pokegemma.outputs", "from pokegemma.data.samples import Sample"),
        ("pokegemma", "from pokegemma.data import samples"),
        ("pokegemma.play.toy.world", "import scripts.evaluate"),
        ("pokegemma.play.toy.world", "from tests.conftest import frame_png"),
    ],
)
def test_an_import_against_the_order_is_found(module: str, source: str) -> None:
    assert len(wrong_imports(source, module)) == 1


def test_data_and_the_toy_game_load_no_torch() -> None:
    modules = [
        name
        for name in MODULES
        if name.startswith(("pokegemma.data", "pokegemma.play.toy.", "pokegemma.play.emulators"))
    ]
    assert {"pokegemma.data.convert", "pokegemma.data.checks.leakage", "pokegemma.play.toy.world"} <= set(modules)
    code = (
        f"import importlib, sys\nfor name in {modules!r}:\n    importlib.import_module(name)\n"
        "print(*sorted({'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT_ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


def test_no_folder_has_more_than_fourteen_modules() -> None:
    counts = Counter(path.parent for path in MODULES.values())
    assert {str(folder): count for folder, count in counts.items() if count > 14} == {}


def test_no_two_test_files_have_one_name() -> None:
    """Pytest imports a file of a folder without __init__.py by its name, and reports the second as a mismatch."""
    folder = PROJECT_ROOT / "tests"
    counts = Counter(path.name for path in folder.glob("*/**/test_*.py"))
    assert [name for name, count in counts.items() if count > 1] == []


def imported_at_start(source: str, module: str) -> set[str]:
    """Return the modules of the package that are imported when `module` is, without those within its functions."""
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
    names = {name for _, name in imported_by(ast.unparse(tree), module)}
    return {name if name in MODULES else name.rpartition(".")[0] for name in names} & set(MODULES) - {module}


def find_circle(imports: dict[str, set[str]]) -> list[str]:
    """Return modules each of which imports the next and the last the first; an empty list if there are none."""
    done: set[str] = set()
    path: list[str] = []

    def visit(module: str) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module not in done:
            path.append(module)
            for name in sorted(imports[module]):
                if circle := visit(name):
                    return circle
            done.add(path.pop())
        return []

    return next(filter(None, map(visit, sorted(imports))), [])


def test_no_modules_import_each_other() -> None:
    imports = {name: imported_at_start(path.read_text(encoding="utf-8"), name) for name, path in MODULES.items()}
    assert "pokegemma.data.samples" in imports["pokegemma.data.prompts"]
    assert find_circle(imports) == []


def test_a_circle_is_found() -> None:
    assert find_circle({"a": {"b"}, "b": {"c", "d"}, "c": set(), "d": {"b"}}) == ["b", "d"]


def public_names(source: str) -> set[str]:
    """Return what a module defines at its top level, without private names and what every module may have."""
    names = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return {name for name in names if not name.startswith("_")} - {"main", "logger"}


def test_a_public_name_is_defined_once() -> None:
    places: defaultdict[str, list[str]] = defaultdict(list)
    for module, path in MODULES.items():
        for name in public_names(path.read_text(encoding="utf-8")):
            places[name].append(module)
    assert {name: modules for name, modules in places.items() if len(modules) > 1} == {}
