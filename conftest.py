"""Quick tests first: those marked slow run last, so that a mistake shows early."""

import os
import secrets

import pytest

# Tiny models gain nothing from threads, and lose much when the cores are busy. Subprocesses inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A token for the Ray clusters of the tests: without one, Ray would write one to the home folder.
os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32), RAY_USAGE_STATS_ENABLED="0")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)  # stable: else the order stays
