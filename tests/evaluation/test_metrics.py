"""Every expected number here was worked out by hand."""

import numpy as np
import pytest

from pokegemma.data.prompts import BUTTONS, build_output
from pokegemma.data.samples import Sample
from pokegemma.errors import PokegemmaError
from pokegemma.evaluation import metrics
from pokegemma.evaluation.metrics import INVALID, NO_BUTTON, Decisions

UP, DOWN, LEFT = 0, 1, 2


def decisions(truth, *, previous=None, sessions=None, situations=None):
    n = len(truth)
    return Decisions(
        truth=np.array(truth),
        previous=np.array(previous if previous is not None else [NO_BUTTON] * n),
        sessions=tuple(sessions or ["s1"] * n),
        situations=tuple(situations or ["unknown"] * n),
    )


# Truth: up up up down. Pressed: up up left, and one answer without a button.
TRUTH = np.array([UP, UP, UP, DOWN])
PRESSED = np.array([UP, UP, LEFT, INVALID])


def test_confusion_has_true_buttons_in_rows_and_a_column_for_invalid_answers():
    confusion = metrics.confusion_matrix(TRUTH, PRESSED)
    assert confusion.shape == (8, 9)
    assert confusion[UP].tolist() == [2, 0, 1, 0, 0, 0, 0, 0, 0]
    assert confusion[DOWN].tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 1]
    assert confusion.sum() == 4


def test_invalid_answer_counts_as_wrong():
    assert metrics.accuracy(metrics.confusion_matrix(TRUTH, PRESSED)) == 0.5


def test_macro_f1_averages_the_buttons_that_occur_in_the_truth():
    # up: precision 2/2, recall 2/3, F1 = 0.8; down: F1 = 0; left is pressed but never true: not averaged.
    assert metrics.macro_f1(metrics.confusion_matrix(TRUTH, PRESSED)) == pytest.approx(0.4)


def test_button_table_gives_support_precision_recall_and_f1():
    table = metrics.button_table(metrics.confusion_matrix(TRUTH, PRESSED))
    assert [row["button"] for row in table] == list(BUTTONS)
    assert table[UP] == {"button": "up", "support": 3, "pressed": 2, "precision": 1.0, "recall": 2 / 3, "f1": 0.8}
    assert table[DOWN] == {"button": "down", "support": 1, "pressed": 0, "precision": None, "recall": 0.0, "f1": 0.0}
    assert table[LEFT] == {"button": "left", "support": 0, "pressed": 1, "precision": 0.0, "recall": None, "f1": 0.0}
    assert table[3]["f1"] is None


def test_f1_agrees_with_sklearn_on_random_decisions():
    from sklearn.metrics import f1_score

    generator = np.random.default_rng(0)
    truth, pressed = generator.integers(0, 5, 300), generator.integers(0, 9, 300)
    expected = f1_score(truth, pressed, labels=range(5), average="macro")
    assert metrics.macro_f1(metrics.confusion_matrix(truth, pressed)) == pytest.approx(expected)


def test_situation_table_is_sorted_by_support():
    known = decisions(TRUTH, situations=["door", "menu", "menu", "menu"])
    assert metrics.situation_table(known, PRESSED) == [
        {"situation": "menu", "support": 3, "accuracy": 1 / 3, "macro_f1": pytest.approx(1 / 3)},
        {"situation": "door", "support": 1, "accuracy": 1.0, "macro_f1": 1.0},
    ]


def test_change_turns_need_a_previous_button():
    known = decisions([UP, UP, DOWN], previous=[NO_BUTTON, UP, UP])
    assert known.is_change.tolist() == [False, False, True]
    row = metrics.build_row("model", "model", known, np.array([UP, UP, LEFT]), None, {})
    assert row["accuracy"] == pytest.approx(2 / 3)
    assert row["change_accuracy"] == 0.0


def test_change_accuracy_is_none_where_nothing_changes():
    row = metrics.build_row("model", "model", decisions([UP]), np.array([UP]), None, {})
    assert row["change_accuracy"] is None and row["nll"] is None


def test_negative_log_likelihood_is_the_mean_over_true_buttons():
    probabilities = np.array([[0.5, 0.5] + [0.0] * 6, [0.75, 0.25] + [0.0] * 6])
    assert metrics.negative_log_likelihood(np.array([UP, DOWN]), probabilities) == pytest.approx(1.0397207708)


def test_impossible_true_button_gives_a_finite_likelihood():
    assert np.isfinite(metrics.negative_log_likelihood(np.array([DOWN]), np.eye(8)[:1]))


def test_reliability_bins_hold_confidence_and_accuracy():
    probabilities = np.array([[0.95, 0.05], [0.91, 0.09], [0.45, 0.55]])
    table = metrics.reliability_table(np.array([0, 1, 1]), probabilities)
    assert [(row["low"], row["count"], row["accuracy"]) for row in table] == [(0.5, 1, 1.0), (0.9, 2, 0.5)]
    assert table[1]["confidence"] == pytest.approx(0.93)


def test_certainty_falls_into_the_last_reliability_bin():
    assert metrics.reliability_table(np.array([0]), np.eye(8)[:1])[0]["high"] == 1.0


def test_bootstrap_draws_whole_sessions():
    # Session a all right (2 turns), session b all wrong (2 turns): a draw is aa, ab, ba or bb.
    known = decisions([UP, UP, DOWN, DOWN], sessions=["a", "a", "b", "b"])
    draws = metrics.resample_sessions(known, {"model": np.array([UP] * 4)}, seed=0)["model"]["accuracy"]
    assert len(draws) == 2000
    assert set(draws) == {0.0, 0.5, 1.0}
    assert np.mean(draws == 0.5) == pytest.approx(0.5, abs=0.05)
    assert metrics.interval(draws) == [0.0, 1.0]


def test_bootstrap_equals_a_plain_loop_over_the_same_draws():
    generator = np.random.default_rng(1)
    sessions = [f"s{number}" for number in generator.integers(0, 5, 60)]
    known = decisions(generator.integers(0, 4, 60), sessions=sessions)
    pressed = generator.integers(0, 9, 60)
    draws = metrics.resample_sessions(known, {"model": pressed}, seed=3, num_resamples=20)["model"]
    names = sorted(set(sessions))
    for number, times in enumerate(np.random.default_rng(3).multinomial(5, [0.2] * 5, 20)):
        rows = [
            row
            for name, count in zip(names, times, strict=True)
            for row in np.flatnonzero(np.array(sessions) == name).tolist() * count
        ]
        confusion = metrics.confusion_matrix(known.truth[rows], pressed[rows])
        assert draws["accuracy"][number] == pytest.approx(metrics.accuracy(confusion))
        assert draws["macro_f1"][number] == pytest.approx(metrics.macro_f1(confusion))


def test_bootstrap_is_the_same_for_the_same_seed():
    known = decisions([UP, UP, DOWN], sessions=["a", "b", "c"])
    first, second, other = (
        metrics.resample_sessions(known, {"m": np.array([UP, DOWN, DOWN])}, seed=seed)["m"]["accuracy"]
        for seed in (0, 0, 1)
    )
    assert np.array_equal(first, second) and not np.array_equal(first, other)


def test_difference_is_paired():
    # Model and baseline differ by half in every session, though each varies: the interval of the difference is a point.
    known = decisions([UP, UP, UP, UP, DOWN, UP], sessions=["a", "a", "b", "b", "c", "c"])
    predictions = {"model": np.array([UP, UP, UP, UP, UP, UP]), "base": np.array([UP, LEFT, UP, LEFT, UP, LEFT])}
    draws = metrics.resample_sessions(known, predictions)
    rows = [metrics.build_row(key, key, known, value, None, draws) for key, value in predictions.items()]
    difference = metrics.build_difference(*rows, draws)
    assert difference["accuracy"] == pytest.approx(0.5)
    assert difference["accuracy_interval"] == pytest.approx([0.5, 0.5])
    assert rows[0]["accuracy_interval"] == [0.5, 1.0]


def test_one_session_has_no_interval():
    known = decisions([UP, DOWN])
    draws = metrics.resample_sessions(known, {"model": np.array([UP, UP])})
    row = metrics.build_row("model", "model", known, np.array([UP, UP]), None, draws)
    assert row["accuracy"] == 0.5 and row["accuracy_interval"] is None and row["macro_f1_interval"] is None
    assert metrics.build_difference(row, row, draws)["accuracy_interval"] is None


def test_percentiles_are_in_milliseconds():
    summary = metrics.percentiles_ms([0.1, 0.2, 0.3])
    assert summary == {"p50": pytest.approx(200), "p95": pytest.approx(290), "num_decisions": 3}


def make_sample(button, previous, **metadata):
    return Sample(
        id="s/1",
        frames=("f.png",),
        image=None,
        context="c",
        question="q",
        output=build_output(button=button, reasoning="r", context="x"),
        metadata={"session": "s", "turn": 1, "previous_buttons": previous, **metadata},
    )


def test_decisions_are_read_from_samples():
    known = metrics.read_decisions([make_sample("down", [], situation="menu"), make_sample("up", ["a", "down"])])
    assert known.truth.tolist() == [DOWN, UP]
    assert known.previous.tolist() == [NO_BUTTON, DOWN]
    assert known.sessions == ("s", "s") and known.situations == ("menu", "unknown")


@pytest.mark.parametrize(("button", "previous"), [("fly", []), ("up", ["fly"])])
def test_unknown_button_is_an_error_that_names_the_sample(button, previous):
    with pytest.raises(PokegemmaError, match=r"^s/1: .*'fly'"):
        metrics.read_decisions([make_sample(button, previous)])


@pytest.mark.parametrize("total", [1, 60, 77, 100])
def test_an_interval_of_all_or_none_stays_inside_0_and_1(total):
    (none, some), (most, all_of_them) = metrics.wilson_interval(0, total), metrics.wilson_interval(total, total)
    assert f"{none:.1f}" == "0.0"  # not -0.0
    assert all_of_them <= 1
    assert some == pytest.approx(1 - most)
