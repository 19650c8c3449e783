"""What the package and its scripts import is declared, and what is declared is used."""

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pokegemma.provenance import PROJECT_ROOT

DISTRIBUTIONS = {
    "PIL": "pillow",
    "dotenv": "python-dotenv",
    "llama_cpp": "llama-cpp-python",
    "mlflow": "mlflow-skinny",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}
"""The distribution of a module of another name."""

NOT_IMPORTED = {
    "bitsandbytes": "transformers loads nf4 weights with it",
    "gguf": "transformers reads GGUF files with it",
    "protobuf": "transformers reads tokenizer.model with it",
    "tensorboard": "transformers logs with it",
    "sqlparse": "MLflow reads its own queries with it",
    "timm": "transformers makes Gemma 3n's vision tower of it",
    "torchvision": "timm imports it",
}


def imported_modules() -> Iterator[str]:
    """Yield the top-level name of every import, also within functions."""
    for folder in ("pokegemma", "scripts"):
        for path in sorted((PROJECT_ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    yield from (alias.name.partition(".")[0] for alias in node.names)
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    yield node.module.partition(".")[0]


def declared() -> dict[str, set[str]]:
    """Return the distributions that pyproject.toml names, of each extra ("" is none)."""
    with (PROJECT_ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    groups = {"": project["dependencies"], **project["optional-dependencies"]}
    return {extra: {canonicalize_name(Requirement(line).name) for line in lines} for extra, lines in groups.items()}


def pinned(path: Path) -> set[str]:
    lines = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return {canonicalize_name(Requirement(line).name) for line in lines if line}


def test_every_import_is_declared_and_every_dependency_imported() -> None:
    outside = set(imported_modules()) - sys.stdlib_module_names - {"pokegemma", "scripts"}
    imported = {canonicalize_name(DISTRIBUTIONS.get(name, name)) for name in outside}
    names = set().union(*declared().values())
    assert imported - names == set(), "imported, but not in pyproject.toml"
    assert names - imported == set(NOT_IMPORTED), "in pyproject.toml, but not imported"


def test_every_dependency_has_its_pin() -> None:
    for extra, names in declared().items():
        assert pinned(PROJECT_ROOT / f"requirements{extra and '-'}{extra}.txt") == names
