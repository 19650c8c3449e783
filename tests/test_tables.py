"""Tables as text."""

from pokegemma.tables import format_table


def test_columns_are_aligned_by_their_widest_cell() -> None:
    rows = [("", "mark", "accuracy"), ("model", "", "97.7"), ("a long name", "PASS", "8.0")]
    assert format_table(rows).splitlines() == [
        "             mark  accuracy",
        "model                  97.7",
        "a long name  PASS       8.0",
    ]
    assert format_table(rows, num_left=2).splitlines()[2] == "a long name  PASS       8.0"
    assert format_table([("a", "b"), ("ccc", "dd")], num_left=2).splitlines() == ["a    b", "ccc  dd"]
