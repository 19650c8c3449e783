"""What importing pokegemma sets for the libraries that are loaded after it."""

import importlib
import os
import re
import subprocess
import sys

import pytest

import pokegemma
from pokegemma.provenance import PROJECT_ROOT

VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


@pytest.mark.skipif(sys.platform != "linux", reason="torch for macOS comes with another OpenMP library")
def test_the_openmp_library_of_torch_stops_spinning_early() -> None:
    environ = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    library = "ctypes.CDLL(next(pathlib.Path(importlib.util.find_spec('torch').origin).parent.glob('lib/libgomp*')))"
    child = subprocess.run(
        [sys.executable, "-c", f"import pokegemma, ctypes, importlib.util, pathlib; {library}"],
        env={**environ, "OMP_DISPLAY_ENV": "VERBOSE", "PYTHONPATH": str(PROJECT_ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert re.search(r"GOMP_SPINCOUNT = '(\d+)'", child.stderr).group(1) == "2000"


@pytest.mark.parametrize(("name", "value"), [("GOMP_SPINCOUNT", "7"), ("OMP_WAIT_POLICY", "ACTIVE")])
def test_a_users_own_openmp_setting_stays(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(name, value)
    importlib.reload(pokegemma)
    assert {variable: os.environ[variable] for variable in VARIABLES if variable in os.environ} == {name: value}
