"""Fixtures of releases: a registry."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def empty_registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a registry's file with tables and no version; making it takes seconds, copying it none."""
    from pokegemma.release.registry import Registry

    path = tmp_path_factory.mktemp("registry") / "registry.db"
    assert Registry(str(path), "pokegemma", create=True).versions() == []
    return path
