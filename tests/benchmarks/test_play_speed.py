"""The benchmark of play on the ROM: its arithmetic and what it refuses."""

import pytest

from benchmarks.play_speed import PlayedRoom, SpeedOptions, share_outside, stage_rows, turns_between
from pokegemma.errors import PokegemmaError
from pokegemma.play.loop import STAGES


def room(*, began: float, ended: float, **seconds: list[float]) -> PlayedRoom:
    return PlayedRoom(1, began, ended, {**{stage: [0.0, 0.0] for stage in STAGES}, **seconds})


@pytest.mark.parametrize(("began", "ended", "num_turns"), [(0, 10, 2), (5, 10, 1), (2.5, 5, 0.5), (20, 30, 0)])
def test_a_part_of_a_room_has_a_part_of_its_turns(began: float, ended: float, num_turns: float) -> None:
    assert turns_between(room(began=0, ended=10), began, ended) == num_turns


def test_a_stage_has_its_share_of_the_time() -> None:
    rows = {row["stage"]: row for row in stage_rows([room(began=0, ended=1, decide=[0.2, 0.4], press=[0.1, 0.3])])}
    assert rows["decide"]["share"] == pytest.approx(0.6)
    assert (rows["press"]["mean"], rows["press"]["p50"]) == pytest.approx((200, 200))
    assert rows["record"]["share"] == 0


def test_what_is_not_the_models_is_outside() -> None:
    rows = stage_rows([room(began=0, ended=1, decide=[0.2, 0.4], prepare=[0.1, 0.1], press=[0.1, 0.1])])
    assert share_outside(rows, "mean") == pytest.approx(0.2)


@pytest.mark.parametrize(("option", "value"), [("num_turns", 0), ("num_workers", 1), ("num_rooms", 3)])
def test_an_option_that_cannot_be_measured_is_refused(option: str, value: int) -> None:
    with pytest.raises(PokegemmaError, match=rf"^--{option} {value}: "):
        SpeedOptions(**{option: value})
