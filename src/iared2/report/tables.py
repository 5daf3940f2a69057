"""Cells and lines of tables, in Markdown, LaTeX and for the screen."""

import math

Table = tuple[list[str], list[list[str]]]  # headings, rows


def lines(head: list[str], body: list[list[str]]) -> list[str]:
    """A Markdown table: the first column is text, the others are numbers."""
    rows = [head, ["---"] + ["---:"] * (len(head) - 1), *body]
    return [f"| {' | '.join(cells)} |" for cells in rows]


def tex(text: str) -> str:
    """Text that LaTeX prints as it is."""
    return "".join("\\" + c if c in "_%&#${}" else c for c in text)


def cell(value: float | None, digits: int = 2) -> str:
    """A figure, or a dash."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def span(pair: tuple[float, float] | None, digits: int = 1) -> str:
    """The ends of an interval, or a dash."""
    return "-" if pair is None or not all(math.isfinite(end) for end in pair) else f"{pair[0]:.{digits}f} to {pair[1]:.{digits}f}"


def bare(value: float | None, digits: int, short: bool = False) -> str:
    """A number for machines, or nothing; `short`: without zeros at the end."""
    if value is None or not math.isfinite(value):
        return ""
    return f"{value:.{digits}f}".rstrip("0").rstrip(".") if short else f"{value:.{digits}f}"


def costs(forwards: float | None, milliseconds: float | None) -> list[str]:
    """What a map costs, as two cells."""
    return [bare(forwards, 2, short=True), bare(milliseconds, 1)]
