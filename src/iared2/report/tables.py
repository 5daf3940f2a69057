"""Cells and lines of tables, in Markdown, CSV, LaTeX and for the screen."""

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

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


# ---- tables of methods with figures, intervals and costs ------------------------------------------------------

Figures = Mapping[str, float]
Ends = Mapping[str, tuple[float, float]]


class CostedRow(Protocol):
    """A method on some pictures: what a map costs, and why there are no figures where there are none."""

    @property
    def method(self) -> str: ...
    @property
    def images(self) -> int: ...
    @property
    def forwards(self) -> float | None: ...
    @property
    def milliseconds(self) -> float | None: ...
    @property
    def slow(self) -> bool: ...
    @property
    def why(self) -> str | None: ...


Row = TypeVar("Row", bound=CostedRow)


def body_of(rows: Sequence[Row], cells: Callable[[Row], list[str]]) -> list[list[str]]:
    """A line per method with figures: its name, how many pictures, its own cells, and what a map costs."""
    return [[row.method, str(row.images), *cells(row), *costs(row.forwards, row.milliseconds)] for row in rows if row.why is None]


def slow_note(rows: Sequence[CostedRow]) -> list[str]:
    """Which methods ran on fewer pictures; nothing where none did."""
    sizes = ", ".join(f"{row.method} on {row.images}" for row in rows if row.slow and row.why is None)
    return ["", f"Slow methods ran on a fixed random subset of the images: {sizes}."] if sizes else []


def without_name(method: str, why: str) -> str:
    """A reason that will stand behind its method's name: without that name, or its part before the colon, at the beginning."""
    for name in (method, method.partition(":")[0]):
        if why.startswith(f"{name}: "):
            return why.removeprefix(f"{name}: ")
    return why


def missing_note(rows: Sequence[CostedRow]) -> list[str]:
    """Which methods have no figures, and why; nothing where all have."""
    found = [f"- {row.method}: {without_name(row.method, row.why)}" for row in rows if row.why is not None]
    return ["", "No figures:", "", *found] if found else []


def csv_of(rows: Sequence[Row], names: Sequence[str], parts: Mapping[str, Callable[[Row], tuple[Figures, Ends]]]) -> str:
    """One line per method; each figure with the ends of its interval.

    Args:
        parts: by what column names begin with, a method's figures and their intervals.
    """
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    columns = [f"{kind}{name}{end}" for kind in parts for name in names for end in ("", "_low", "_high")]
    writer.writerow(["method", "images", "forwards", "milliseconds", *columns, "slow", "error"])
    for row in rows:
        values: list[float] = []
        for figures, ends in (part(row) for part in parts.values()):
            for name in names:
                values += [figures.get(name, math.nan), *ends.get(name, (math.nan, math.nan))]
        numbers = [bare(row.forwards, 2), bare(row.milliseconds, 3), *(bare(value, 4) for value in values)]
        writer.writerow([row.method, row.images, *numbers, int(row.slow), row.why or ""])
    return stream.getvalue()


def booktabs(note: str, columns: str, head: Sequence[str], body: Sequence[list[str]], rows: Sequence[CostedRow]) -> str:
    """A table for papers; methods without figures become comments.

    Args:
        note: said beside the package that is needed.
        columns: alignment, as LaTeX wants it.
        head: lines of the heading.
    """
    text = [f"% needs \\usepackage{{booktabs}}{note}", rf"\begin{{tabular}}{{{columns}}}", r"\toprule", *head, r"\midrule"]
    text += [" & ".join([tex(cells[0]), *cells[1:]]) + r" \\" for cells in body]
    text += [f"% {row.method}: {without_name(row.method, row.why)}" for row in rows if row.why is not None]
    return "\n".join([*text, r"\bottomrule", r"\end{tabular}"]) + "\n"
