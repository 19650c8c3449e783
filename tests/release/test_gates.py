"""Gates: a value that was not measured or is beyond its limit stops a release."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pokegemma.errors import CheckFailedError, PokegemmaError
from pokegemma.release.gates import Gate, check_gates, read_gates
from pokegemma.release.options import PipelineOptions


def test_a_gate_names_value_and_limit() -> None:
    gates = [Gate("--min_accuracy", "accuracy", 0.41, at_least=0.6), Gate("--max_x", "x", 1.0, at_most=2.0)]
    with pytest.raises(CheckFailedError) as caught:
        check_gates("evaluate", gates)
    assert str(caught.value) == "the gate of evaluate failed: accuracy 0.41, --min_accuracy 0.6 (at least)"
    check_gates("evaluate", gates[1:])


@pytest.mark.parametrize("value", [None, float("nan")])
def test_a_value_that_was_not_measured_passes_no_gate(value: float | None) -> None:
    assert not Gate("--a", "a", value, at_least=0.0).holds
    assert not Gate("--a", "a", value, at_most=1.0).holds


@pytest.fixture
def failed(tmp_path: Path) -> Callable[..., list[str]]:
    """Return a function that returns the gates of a step that do not hold, for an export to GGUF."""
    outputs = {"export_gguf": tmp_path / "gguf", "parity": tmp_path / "parity"}

    def find(step: str, **changes: Any) -> list[str]:
        options = PipelineOptions(checkpoint="x", dataset_path="x", output_dir=str(tmp_path), **changes)
        return [str(gate) for gate in read_gates(step, outputs[step], options) if not gate.holds]

    return find


def test_the_smallest_model_of_an_export_with_its_vision_part_has_a_limit(
    failed: Callable[..., list[str]], tmp_path: Path
) -> None:
    for name, size in (("model-f16.gguf", 4 << 20), ("model-q8_0.gguf", 2 << 20), ("mmproj-f16.gguf", 1 << 20)):
        (tmp_path / "gguf").mkdir(parents=True, exist_ok=True)
        (tmp_path / "gguf" / name).write_bytes(bytes(size))
    assert failed("export_gguf", max_export_gib=0.004) == []
    assert failed("export_gguf", max_export_gib=0.002) == [
        "smallest model in gguf 0.00293, --max_export_gib 0.002 (at most)"
    ]


def test_engines_of_parity_are_compared_with_the_limits(failed: Callable[..., list[str]], tmp_path: Path) -> None:
    failure = {"gate": "log_probability_difference", "value": 0.3, "limit": 0.2, "message": "0.3 is above 0.2"}
    engine = {
        "name": "model-q8_0.gguf",
        "button_agreement": 0.96,
        "written_agreement": None,
        "failures": [failure],
        "button_log_probability_difference": {"mean": 0.1, "max": 1.0},
        "log_probability_difference": {"mean": 0.3, "max": 1.0},
    }
    (tmp_path / "parity").mkdir()
    (tmp_path / "parity" / "parity.json").write_text(json.dumps({"engines": [engine]}))
    unlike = "model-q8_0.gguf button_agreement 0.96, --min_agreement 0.98 (at least)"
    far = "model-q8_0.gguf log_probability_difference 0.3, --max_log_probability_difference"
    assert failed("parity") == [unlike, f"{far} 0.2 (at most)"]
    assert failed("parity", min_agreement=0.95) == [f"{far} 0.2 (at most)"]
    assert failed("parity", min_agreement=0.95, max_log_probability_difference=0.25) == [f"{far} 0.25 (at most)"]
    assert failed("parity", min_agreement=0.95, max_log_probability_difference=0.35) == []
    silent = {**failure, "value": None, "message": "no log-probabilities"}
    (tmp_path / "parity" / "parity.json").write_text(
        json.dumps({"engines": [{**engine, "log_probability_difference": None, "failures": [silent]}]})
    )
    assert failed("parity", min_agreement=0.95) == [
        "model-q8_0.gguf log_probability_difference not measured, --max_log_probability_difference 0.2 (at most)"
    ]
    died = {
        "name": "mlx",
        "passed": False,
        "failures": [
            {
                "gate": "runs",
                "value": None,
                "limit": None,
                "sample": None,
                "message": "killed by SIGKILL: out of memory",
            }
        ],
    }
    (tmp_path / "parity" / "parity.json").write_text(json.dumps({"engines": [died]}))
    for changes in ({"min_agreement": 0.0}, {"min_agreement": 0.0, "max_log_probability_difference": 9.0}):
        assert failed("parity", **changes) == [
            "mlx failed (killed by SIGKILL: out of memory), its agreement not measured, --min_agreement 0 (at least)"
        ]


def test_a_model_that_solves_too_few_rooms_stops_a_release(tmp_path: Path) -> None:
    row = {
        "key": "scored",
        "accuracy": 1.0,
        "accuracy_interval": None,
        "macro_f1": 1.0,
        "change_accuracy": 1.0,
        "nll": 0.1,
    }
    headline = {
        "model": "scored",
        "points_above_baseline": 50.0,
        "best_baseline": "markov",
        "best_baseline_accuracy": 0.5,
    }
    counts = {"valid_json_rate": None, "num_decisions": 10, "num_sessions": 2}
    played = {"players": {"model": {"success": 0.55}}}
    metrics = {"headline": headline, "rows": [row], **counts, "closed_loop": played}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))

    def gates_that_fail(**changes: Any) -> list[str]:
        options = PipelineOptions(checkpoint="x", dataset_path="x", output_dir="x", closed_loop=20, **changes)
        return [str(gate) for gate in read_gates("evaluate", tmp_path, options) if not gate.holds]

    assert gates_that_fail(min_solved=0.5) == gates_that_fail() == []
    assert gates_that_fail(min_solved=0.6) == ["share of rooms solved 0.55, --min_solved 0.6 (at least)"]


def test_a_share_of_rooms_needs_rooms() -> None:
    with pytest.raises(PokegemmaError, match=r"--min_solved 0\.5"):
        PipelineOptions(checkpoint="x", dataset_path="x", output_dir="x", min_solved=0.5)
