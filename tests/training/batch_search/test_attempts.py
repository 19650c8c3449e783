"""Which batch sizes are tried and taken, on a made-up machine whose memory is known."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pokegemma.environment import GIB
from pokegemma.errors import PokegemmaError
from pokegemma.training.batch_search.attempts import (
    Attempt,
    Trial,
    batch_sizes,
    combine_trials,
    fastest,
    largest_fitting,
    try_sizes,
)
from pokegemma.training.batch_search.report import explain_attempts


class Machine:
    """A batch needs 2 GiB and 1 more a sample, twice that without checkpointing; `speed` is that of (batch, on)."""

    def __init__(self, limit_gib: int, speed=lambda batch, on: batch * (1 if on else 1.5)) -> None:
        self.limit_gib, self.speed, self.calls = limit_gib, speed, []

    def __call__(self, batch_size: int, gradient_checkpointing: bool) -> Trial:
        self.calls.append((batch_size, gradient_checkpointing))
        needed = 2 + batch_size * (1 if gradient_checkpointing else 2)
        if needed > self.limit_gib:
            return Trial(False, needed * GIB, reason=f"{needed} GiB")
        return Trial(True, needed * GIB, self.speed(batch_size, gradient_checkpointing))


def find(machine: Machine, sizes: list[int], checkpointing: tuple[bool, ...] = (True, False)) -> Attempt | None:
    return fastest(try_sizes(machine, sizes, gradient_checkpointing=checkpointing))


def test_only_sizes_that_divide_the_share_of_a_process_are_tried() -> None:
    assert batch_sizes(16, 1) == [1, 2, 4, 8, 16]
    assert batch_sizes(24, 2) == [1, 2, 3, 4, 6, 12]
    assert batch_sizes(7, 7) == [1]


@pytest.mark.parametrize(("effective", "processes"), [(16, 3), (2, 4), (0, 1)])
def test_an_effective_batch_that_processes_cannot_share_is_refused(effective: int, processes: int) -> None:
    with pytest.raises(PokegemmaError, match=f"--effective_batch_size.* {effective} .* {processes} processes"):
        batch_sizes(effective, processes)


@given(effective=st.integers(1, 5000), limit=st.integers(0, 6000))
def test_the_largest_divisor_that_fits_is_found_with_few_trials(effective: int, limit: int) -> None:
    sizes, calls = batch_sizes(effective, 1), []
    found = largest_fitting(lambda size: calls.append(size) or size <= limit, sizes)
    assert found == max((size for size in sizes if size <= limit), default=None)
    assert len(set(calls)) == len(calls) <= math.log2(effective) + math.log2(len(sizes)) + 2


@given(
    effective=st.integers(1, 500), limit=st.integers(0, 600), checkpointing=st.sampled_from([(True,), (True, False)])
)
def test_what_is_taken_fits_and_divides(effective: int, limit: int, checkpointing: tuple[bool, ...]) -> None:
    machine = Machine(limit)
    chosen = find(machine, batch_sizes(effective, 1), checkpointing)
    if limit < 3:
        assert chosen is None
    else:
        assert effective % chosen.batch_size == 0
        assert chosen.trial.peak_bytes <= limit * GIB
        assert chosen.trial.decisions_per_second == max(
            machine.speed(*call) for call in machine.calls if 2 + call[0] * (1 if call[1] else 2) <= limit
        )


def test_sizes_are_doubled_then_bisected() -> None:
    machine = Machine(22)
    try_sizes(machine, batch_sizes(48, 1), gradient_checkpointing=[True])
    assert machine.calls == [(1, True), (2, True), (4, True), (8, True), (16, True), (48, True), (24, True)]


def test_without_checkpointing_no_larger_batch_is_tried_than_fits_with_it() -> None:
    machine = Machine(10)
    try_sizes(machine, batch_sizes(16, 1), gradient_checkpointing=[True, False])
    assert machine.calls[:5] == [(1, True), (2, True), (4, True), (8, True), (16, True)]
    assert machine.calls[5:] == [(1, False), (2, False), (4, False), (8, False)]


def test_without_checkpointing_nothing_is_tried_if_one_sample_does_not_fit_with_it() -> None:
    machine = Machine(2)
    assert find(machine, [1, 2, 4]) is None
    assert machine.calls == [(1, True)]


def test_speed_beats_size() -> None:
    machine = Machine(100, speed=lambda batch, on: 10 - abs(batch - 4) - on)
    chosen = find(machine, batch_sizes(16, 1))
    assert (chosen.batch_size, chosen.gradient_checkpointing) == (4, False)


def test_checkpointing_is_kept_where_the_larger_batch_makes_up_for_it() -> None:
    machine = Machine(18, speed=lambda batch, on: batch)
    chosen = find(machine, batch_sizes(16, 1))
    assert (chosen.batch_size, chosen.gradient_checkpointing) == (16, True)


def test_of_equally_fast_sizes_the_smallest_is_taken() -> None:
    assert find(Machine(100, speed=lambda batch, on: 3.0), batch_sizes(16, 1), (True,)).batch_size == 1


def test_several_processes_take_the_smallest_fit_and_the_slowest_speed() -> None:
    assert combine_trials([Trial(True, 5, 3.0), Trial(True, 7, 2.0)]) == Trial(True, 7, 4.0)
    assert combine_trials([Trial(True, 5, 3.0), Trial(False, 9, reason="too much")]) == Trial(
        False, 9, reason="too much"
    )
    assert combine_trials([Trial(False, reason="died"), Trial(True, 4, 1.0)]) == Trial(False, 4, reason="died")


def test_the_explanation_says_what_fits_what_does_not_and_how_fast() -> None:
    attempts = try_sizes(Machine(10), batch_sizes(16, 1), gradient_checkpointing=[True, False])
    assert explain_attempts(attempts, limit_bytes=10 * GIB) == [
        "gradient checkpointing on: batch 8 fits (10.00 of 10.00 GiB), 16 does not (18 GiB)",
        "gradient checkpointing off: batch 4 fits (10.00 of 10.00 GiB), 8 does not (18 GiB)",
        "decisions/s by batch and checkpointing: 8 (batch 8, on), 6 (batch 4, off), 4 (batch 4, on), 3 (batch 2, off), "
        "2 (batch 2, on), 1.5 (batch 1, off), 1 (batch 1, on)",
    ]


def test_speeds_in_the_explanation_fall() -> None:
    line = explain_attempts(try_sizes(Machine(50), [1, 2, 4, 8], gradient_checkpointing=[True]), limit_bytes=50 * GIB)[
        -1
    ]
    speeds = [float(part.split()[0]) for part in line.partition(": ")[2].split(", batch")[0].split("), ")]
    assert all(first >= second for first, second in pairwise(speeds))
