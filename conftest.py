"""Configuration of pytest: the environment of the tests, their order, and the number of workers."""

import gc
import os
import secrets

import psutil
import pytest
from hypothesis import HealthCheck, settings

from pokegemma.environment import usable_cores

# Tiny models gain nothing from threads, and lose much when the cores are busy. Subprocesses inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What ./run_tests.sh sees to, for a pytest without it: offline, and no run is logged to the caller's account.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.pop("WANDB_API_KEY", None)
# A token for the Ray clusters of the tests: without one, Ray would write one to the home folder.
os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32), RAY_USAGE_STATS_ENABLED="0")
# A process that a signal such as SIGSEGV ends prints where it was.
os.environ.setdefault("PYTHONFAULTHANDLER", "1")
# Ray gives its first process 30 s to start, which a busy machine may exceed.
os.environ.update(RAY_gcs_server_port_wait_time_s="300")

# The same examples every time, however long one takes; --hypothesis-profile default looks for others.
settings.register_profile("steady", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")

# Importing all tests makes millions of objects, of which a collection after every 700 would find next to none unused.
gc.disable()

pytest_plugins = (
    "tests.model_fixtures",
    "tests.export_fixtures",
    "tests.forked_python",
    "tests.battles.simulated",
    "tests.battles.policies",
)


GIB_PER_WORKER = 4
"""A worker that has imported torch, and the processes that its tests start."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put tests marked slow last, so that a failure shows early; of these the longest first.

    A worker that has nothing left takes the last tests of another: short ones are shared, and no long test begins last.
    """

    def seconds(item: pytest.Item) -> float:
        mark = item.get_closest_marker("slow")
        return 0 if mark is None else mark.args[0] if mark.args else 10

    # Stable: tests with the same number stay in their order, next to those that share a fixture with them.
    items.sort(key=lambda item: (seconds(item) > 0, -seconds(item)))


def pytest_collection_finish() -> None:
    """Leave what was imported out of the garbage collections, which take a quarter of a second with it."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return what `-n auto` of ./run_tests.sh means: a worker for each core, none where single tests are selected.

    A worker takes several seconds to start, since it imports everything that the tests import.
    """
    if config.option.keyword or any(".py" in argument for argument in config.args):
        return 0
    return max(1, min(usable_cores(), psutil.virtual_memory().total // (GIB_PER_WORKER * 2**30)))
