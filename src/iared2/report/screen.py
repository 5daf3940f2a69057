"""What a command says: tables on standard output, progress and trouble on the error stream."""

import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from iared2.report.gallery import Outcome

_SHOWN = 20  # photos listed on the screen; the page has all


def screen() -> Console:
    """Standard output, without guesses about what to colour, and wide enough for tables where nobody watches."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=120)


def progress() -> Progress:
    """A bar on the error stream, only where somebody watches."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def tell(outcome: "Outcome", output: Path, total: int) -> int:
    """The result on the screen: a table of photos, the speed, where to look, and what failed."""
    if not outcome.photos:
        for failure in outcome.failed:
            complain(failure.reason)
        if outcome.stopped:
            complain(outcome.stopped)
        elif total > 1:
            complain(f"none of {total} files could be used")
        return outcome.exit_code
    _print_table(outcome)
    if outcome.stopped:
        complain(f"{outcome.stopped}; {len(outcome.photos)} of {total} photos were finished before that")
    else:
        screen().print(f"Open {escape(str(output / 'index.html'))}", soft_wrap=True)
    if outcome.failed:
        complain(f"{len(outcome.failed)} could not be used:")
        for failure in outcome.failed:
            Console(stderr=True, highlight=False).print(f"  {escape(failure.reason)}", soft_wrap=True)
    return outcome.exit_code


def _print_table(outcome: "Outcome") -> None:
    from iared2.report.records import mean_speed

    console = screen()
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("photo", overflow="fold", min_width=12)
    table.add_column("taken for", overflow="ellipsis", no_wrap=True, max_width=28)
    for heading in ("", "kept per group", "MACs"):
        table.add_column(heading, justify="right", no_wrap=True)
    for photo in outcome.photos[:_SHOWN]:
        best = photo.explanation.predictions[0] if photo.explanation.predictions else None
        name = escape(photo.name) + "".join(f"\n[dim]{escape(note)}[/dim]" for note in photo.notes)
        kept = " > ".join(f"{100 * ratio:.0f} %" for ratio in photo.keep_ratio)
        label, chance = (escape(best.label.split(",")[0]), f"{100 * best.probability:.0f} %") if best else ("", "")
        table.add_row(name, label, chance, kept, f"{100 * photo.macs_share:.0f} %")
    console.print(table)
    if len(outcome.photos) > _SHOWN:
        console.print(f"... and {len(outcome.photos) - _SHOWN} more")
    share = sum(photo.macs_share for photo in outcome.photos) / len(outcome.photos)
    speed = mean_speed(outcome.speeds)
    times = f"; {speed.reduced_ms:.3g} ms per photo, dense {speed.dense_ms:.3g} ms" if speed else ""
    console.print(f"{100 * share:.0f} % of the dense backbone's multiply-adds (MACs){times}", soft_wrap=True)


def complain(message: str) -> None:
    """One line on the error stream."""
    with suppress(BrokenPipeError):
        sys.stderr.write("iared2: " + " ".join(message.split()) + "\n")
