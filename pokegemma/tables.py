"""Tables as text, for a terminal or in Markdown."""

from collections.abc import Iterable, Sequence


def format_table(rows: Sequence[Sequence[str]], *, num_left: int = 1) -> str:
    """Return rows of cells as aligned columns: the first `num_left` to the left, the others to the right.

    Example:
        >>> print(format_table([("", "accuracy"), ("model", "97.7")]))
               accuracy
        model      97.7
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place < num_left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def format_markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown, without a line break at its end."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def format_percent(value: float | None, *, digits: int = 1) -> str:
    """Return a share as "93.1 %", or a dash for None."""
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def format_interval(bounds: Sequence[float] | None) -> str:
    """Return an interval of shares as "90.0–96.2", in percent, or nothing for None."""
    return "" if bounds is None else f"{100 * bounds[0]:.1f}–{100 * bounds[1]:.1f}"
