"""The benchmark of reading battles: what it makes passes the checks of shapes, and other tensors are refused."""

import pytest
import torch

from benchmarks.battles_reading import ReadingOptions, measure, read_file, read_packed, write_battles
from pokegemma.battles.trajectories.files import find_trajectory_files
from pokegemma.battles.trajectories.packed import PackedTrajectories
from pokegemma.errors import PokegemmaError


def test_both_ways_give_the_same_tensors(tmp_path):
    write_battles(tmp_path / "files", num_battles=2, num_states=3)
    rates = measure(tmp_path / "files", tmp_path / "packed", repeats=1)
    assert {name: len(values) for name, values in rates.items()} == {"json": 1, "files": 1, "packed": 1}
    battles = PackedTrajectories(tmp_path / "packed")
    numbers = {word: place for place, word in enumerate(battles.words)}
    plain = read_file(find_trajectory_files(tmp_path / "files")[1], numbers)
    assert [tuple(tensor.shape) for tensor in plain] == [(3, 87), (3, 48), (3,), (3, 13), (2, 3)]
    assert all(map(torch.equal, plain, read_packed(battles, 1)))
    assert not all(map(torch.equal, plain, read_packed(battles, 0)))


@pytest.mark.parametrize(("option", "value"), [("num_battles", 0), ("num_states", 1), ("repeats", 0)])
def test_what_cannot_be_measured_is_refused(option, value):
    with pytest.raises(PokegemmaError, match=rf"^--{option} {value}: "):
        ReadingOptions(**{option: value})
