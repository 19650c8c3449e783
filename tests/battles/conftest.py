"""Fixtures of battles: metamon's own texts, numbers and rewards, and a trajectory of made-up states."""

import json
from pathlib import Path
from typing import Any

import pytest

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "battles_golden.jsonl"


@pytest.fixture(scope="session")
def golden_text() -> list[str]:
    """Return the lines of the oracle: 60 transitions with what metamon 1.4.0 makes of them."""
    if not GOLDEN.is_file():
        pytest.skip("the oracle (../shared/battles_golden.jsonl) is not here")
    return GOLDEN.read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="session")
def golden(golden_text: list[str]) -> list[dict[str, Any]]:
    """Return the transitions of the oracle."""
    return [json.loads(line) for line in golden_text]
