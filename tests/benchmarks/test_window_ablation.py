"""The ablation of windows: which cells there are, what they show, and how a stopped run goes on."""

import json
from pathlib import Path

import pytest

from benchmarks.window_ablation import NOT_OF_A_CELL, AblationOptions, Cell, list_cells, read_results, show
from pokegemma.data.samples import read_samples
from pokegemma.errors import PokegemmaError


def test_cells_that_would_show_the_same_are_left_out() -> None:
    cells = list_cells()
    assert len(set(cells)) == len(cells) == 17
    assert not {Cell("grid", 8, True), Cell("trajectory", 1, True), Cell("trajectory", 4, False)} & set(cells)


def test_a_cell_hides_the_earlier_buttons_from_the_model_only(toy_dataset: Path) -> None:
    sample = list(read_samples(toy_dataset / "train.jsonl"))[3]
    with_buttons, without = (show(sample, Cell("frames", 2, shows)) for shows in (True, False))
    assert (with_buttons.question, without.question) == (sample.question, "Next button?")
    assert without.previous_buttons == sample.previous_buttons != []
    assert json.loads(without.output) == {**json.loads(sample.output), "reasoning": "", "context": ""}


def test_a_run_is_continued_with_the_same_options_only(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    assert read_results(file, AblationOptions()) == []
    options = {name: value for name, value in vars(AblationOptions()).items() if name not in NOT_OF_A_CELL}
    file.write_text(json.dumps({"options": options}) + "\n", encoding="utf-8")
    assert len(read_results(file, AblationOptions(output_dir=str(tmp_path)))) == 1
    with pytest.raises(PokegemmaError, match="--num_steps 9"):
        read_results(file, AblationOptions(num_steps=9))
