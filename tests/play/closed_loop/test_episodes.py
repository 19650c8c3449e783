"""What episodes of play show: success, detours, useless presses, and where they failed."""

import pytest

from pokegemma.play.closed_loop.episodes import Episode, ObservedTurn, pool_success, summarize_episodes

RIGHT = ObservedTurn("navigation", "up", "up", "up", True)
LOST = ObservedTurn("off_trail", "left", "down", "down", False)


def episode(*turns: ObservedTurn, seed: int = 0, is_solved: bool = False) -> Episode:
    return Episode(seed=seed, num_expert_turns=2, max_turns=6, is_solved=is_solved, turns=turns)


def test_a_failure_is_the_most_frequent_error_of_the_last_ten_turns() -> None:
    other = ObservedTurn("bell", "start", "a", "a", False)
    assert episode(*[other] * 20, *[LOST] * 6, *[other] * 4).failure == ("off_trail", "left", "down")
    assert episode(other, *[RIGHT] * 10).failure is None
    assert episode(LOST, is_solved=True).failure is None


def test_a_summary_counts_rooms_turns_and_errors() -> None:
    noisy = ObservedTurn("navigation", "up", "up", "a", False)
    summary = summarize_episodes(
        [
            episode(RIGHT, noisy, RIGHT, is_solved=True),
            episode(*[LOST] * 6, seed=1),
            episode(*[RIGHT] * 6, seed=2),
        ]
    )
    assert (summary["num_solved"], summary["num_episodes"], summary["num_turns"]) == (1, 3, 15)
    assert summary["success_interval"] == pytest.approx([0.0615, 0.7923], abs=1e-4)
    assert summary["turns_over_expert"] == 1.5
    assert summary["useless_presses"] == 7 / 15
    assert summary["right_buttons"] == 9 / 15
    assert summary["situations"] == [
        {"situation": "navigation", "num_turns": 9, "right_buttons": 1.0, "confusions": []},
        {
            "situation": "off_trail",
            "num_turns": 6,
            "right_buttons": 0.0,
            "confusions": [{"expert": "left", "chosen": "down", "count": 6}],
        },
    ]
    assert summary["failures"] == [
        {"count": 1, "situation": "off_trail", "expert": "left", "chosen": "down"},
        {"count": 1, "situation": "out of turns", "expert": None, "chosen": None},
    ]


def test_runs_are_pooled_by_their_rooms() -> None:
    share, interval = pool_success([{"num_solved": 40, "num_episodes": 50}, {"num_solved": 35, "num_episodes": 50}])
    assert share == 0.75
    assert interval == pytest.approx([0.6569, 0.8245], abs=1e-4)
