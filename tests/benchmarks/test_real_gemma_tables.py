"""The benchmark of a real Gemma 3: its parts on a tiny model, and its page."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import real_gemma
from benchmarks.gpu_parts.plan import Run
from benchmarks.real_gemma import PARTS, RealGemmaOptions, write_page
from benchmarks.real_gemma_parts import decisions, memory, rounding, scripts, tokens, training
from pokegemma.data.samples import read_samples
from pokegemma.environment import GIB
from pokegemma.errors import PokegemmaError
from pokegemma.gemma.loading import open_checkpoint


@pytest.fixture(scope="module")
def tiny_run(tiny_model: Path, toy_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("real_gemma")
    (folder / "checkpoint").symlink_to(tiny_model)
    (folder / "dataset").symlink_to(toy_dataset)
    return Run(folder, rehearse=False)


def test_texts_are_counted_and_estimates_that_are_too_low_are_named(tiny_run: Run) -> None:
    record = tokens.measure_counts(tiny_run)
    assert {layout: found["number"] for layout, found in record["conversations"].items()} == {
        "grid": 50,
        "frames": 50,
        "trajectory": 5,
    }
    assert record["texts"]["context"]["too_low"] == []
    assert "| context |" in tokens.counts_table(record)
    hostile = [replace(sample, context="gqgqgqgq") for sample in read_samples(tiny_run.dataset / "eval.jsonl")]
    found = tokens.compare_estimates(open_checkpoint(tiny_run.checkpoint).processor.tokenizer, hostile)["context"]
    assert (found["too_low"], found["least_margin"]) == (["gqgqgqgq"], 2 - found["most"])
    record = tokens.measure_buttons(tiny_run)
    assert record["read_from_a_server"] == list(record["branches"])
    assert "| select |" in tokens.buttons_table(record)


@pytest.mark.slow(4)
def test_training_is_compared_with_stock_in_both_types(tiny_run: Run) -> None:
    record = training.measure(tiny_run)
    assert list(record["differences"]) == [training.STOCK_FRAMES, training.STOCK_TRAJECTORY, *training.WAYS]
    rounding = record["differences"][training.STOCK_FRAMES]["bfloat16"]
    assert rounding["gradient"] > 1e-3
    for name in training.WAYS:
        exact, rounded = record["differences"][name].values()
        assert exact["loss"] < 1e-5 and exact["gradient"] < 1e-4, name
        assert rounded["gradient"] < 2 * rounding["gradient"], name
    assert record["tokens"]["frames, shared row"] < record["tokens"]["frames"]
    assert training.table(record).count("itself in float32") == 2


def test_decisions_are_compared_with_plain_passes_in_both_types(tiny_run: Run) -> None:
    record = decisions.measure(tiny_run)
    rows = {(row["layout"], row["way"], row["dtype"]): row for row in record["differences"]}
    assert len(rows) == 2 * (5 + 5 + 4)
    for (_, way, dtype), row in rows.items():
        assert row["decisions"] == 3
        if dtype == "float32":
            assert row["largest"] < 1e-5 and row["same_button"] == 3
        elif way == decisions.PLAIN:
            assert row["largest"] > 1e-5
    assert decisions.table(record).count("| trajectory: ") == 4


def test_a_file_that_fails_a_gate_is_named_in_the_table() -> None:
    spread = {"mean": 0.5, "max": 1.25}
    engine = {
        "name": "llama.cpp q4_k_m",
        "button_agreement": 0.75,
        "button_log_probability_difference": spread,
        "log_probability_difference": spread,
        "max_log_probability_difference": 3.0,
        "prompts_equal": True,
        "passed": False,
        "failures": [{"gate": "button_agreement"}],
    }
    variant = {name: value for name, value in engine.items() if name not in ("passed", "failures")}
    variant |= {"name": "reference in bfloat16", "max_log_probability_difference": None}
    parity = {"num_samples": 4, "variants": [variant], "engines": [engine]}
    table = scripts.gguf_table({"parity": parity, "files": {"model-q4_k_m.gguf": {"bytes": 2**20}}})
    assert "model-q4_k_m.gguf 1 MiB" in table
    assert "| reference in bfloat16 | 3 of 4 | 0.5000 / 1.250 | 0.5000 / 1.250 |  | yes |  |" in table
    row = "| llama.cpp q4_k_m | 3 of 4 | 0.5000 / 1.250 | 0.5000 / 1.250 | 3.0000 | yes | fail: button_agreement |"
    assert row in table


def test_the_memory_table_has_estimate_and_measurement() -> None:
    trial = {"estimated_bytes": {"weights": GIB, "runtime": 2 * GIB}, "trial": {"peak_bytes": 2 * GIB}}
    way = {"finetuning": "lora", "dtype": "float32", "longest_rows_tokens": [1352], "trials": [trial]}
    table = memory.table({"ways": [way]})
    assert "1,352 tokens" in table
    assert "| lora, float32 | 3.00 | 2.00 | 1.50 | weights 1.00, runtime 2.00 |" in table


def test_rounding_is_compared_for_each_part(tiny_run: Run) -> None:
    differences = rounding.measure(tiny_run)["differences"]
    assert list(differences) == list(rounding.PARTS)
    assert all(1e-4 < difference < 0.1 for difference in differences.values())
    assert "| language model |" in rounding.table({"differences": differences})


def test_the_page_has_a_place_for_each_part_and_only_that_is_written() -> None:
    page = real_gemma.PAGE.read_text(encoding="utf-8")
    for name in PARTS:
        written = write_page(page, name, "new text\n")
        assert "new text" in written
        assert write_page(written, name, "other text\n") == write_page(page, name, "other text\n")
        outside = [text for other in PARTS if other != name for text in [f"<!-- end of {other} -->"]]
        assert all(mark in written for mark in outside)
    with pytest.raises(PokegemmaError, match=r"real_gemma\.md has no place for other"):
        write_page(page, "other", "")


def test_a_number_of_tokens_that_no_picture_has_is_refused() -> None:
    with pytest.raises(PokegemmaError, match="--num_image_tokens 5"):
        RealGemmaOptions("runs", "out", num_image_tokens=5)
