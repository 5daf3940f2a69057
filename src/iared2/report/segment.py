"""`iared2 segment`: the run, and its tables as Markdown, CSV, LaTeX and JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from iared2.data.masks import open_masks
from iared2.evaluate.bootstrap import DRAWS
from iared2.evaluate.map_scores import FIGURES
from iared2.evaluate.report import check_writable, write_json
from iared2.evaluate.segment import MapRow, Segmentation, SegmentOptions
from iared2.explain.methods import find_explainer
from iared2.model import ReducedTransformer
from iared2.output import open_folder, write
from iared2.report.methods import Request, check_limits, facts_of, tell_rows
from iared2.report.screen import progress
from iared2.report.tables import Table, body_of, booktabs, cell, csv_of, lines, missing_note, slow_note, span

SCHEMA = 1
HEADINGS = dict(zip(FIGURES, ("pixel acc.", "mIoU", "mAP", "mAcc", "pointing", "mass"), strict=True))


def run_segment(model: ReducedTransformer, request: Request, options: SegmentOptions) -> int:
    """Scores methods against masks and writes OUT/segment.md, .csv, .tex and .json; finished shards stay in OUT/.shards.

    Returns:
        0; 1 where pictures were broken or a method has no figures; 2 where none has.

    Raises:
        IARED2Error: whatever stands in the way, in one line.
    """
    check_limits(request.limit, options.slow_limit)
    pictures = open_masks(request.data)
    pictures = pictures if request.limit is None else pictures.subset(request.limit, options.seed)
    task = Segmentation(model, pictures, find_explainer, options, request.output / ".shards")
    open_folder(request.output)  # after what may be wrong with the data, so that a refused run leaves nothing
    if request.json_file is not None:
        check_writable(request.json_file)
    with progress() as bar:
        line = bar.add_task("scoring maps", total=task.work(request.methods))
        rows = task.run(request.methods, lambda done: bar.advance(line, done))
    facts = {"schema_version": SCHEMA, **facts_of(model, request, asdict(options)), "skipped": task.skipped}
    write_tables(rows, facts, request.output)
    if request.json_file is not None:
        write_json(request.json_file, facts | {"rows": [row.record() for row in rows]})
    where = f"Tables are in {request.output / 'segment.md'}, and beside it as .csv, .tex and .json"
    return tell_rows("\n".join(lines(*short_table(rows))), where, rows, task.skipped)


# ---- tables ---------------------------------------------------------------------------------------------------


def write_tables(rows: Sequence[MapRow], facts: dict[str, Any], output: Path) -> None:
    """Writes segment.md, segment.csv, segment.tex and, last, segment.json.

    Raises:
        OutputError: a file cannot be written.
    """
    for ending, text in (("md", markdown(rows)), ("csv", table_csv(rows)), ("tex", latex(rows))):
        write(output / f"segment.{ending}", text.encode())
    content = json.dumps(facts | {"rows": [row.record() for row in rows]}, indent=2, allow_nan=False)
    write(output / "segment.json", (content + "\n").encode())


def short_table(rows: Sequence[MapRow]) -> Table:
    """For the screen: raw maps, and mIoU and mAP of their ranks."""
    names = ("pixel_accuracy", "miou", "map", "macc")
    head = ["method", "images", *(HEADINGS[name] for name in names), "rank mIoU", "rank mAP", "forwards", "ms"]
    body = body_of(
        rows,
        lambda row: [*(cell(row.raw.get(name)) for name in names), *(cell(row.rank.get(name)) for name in ("miou", "map"))],
    )
    return head, body


def markdown(rows: Sequence[MapRow]) -> str:
    """Figures of raw maps and of their ranks side by side, then their intervals, then what is missing and why."""
    pairs = [f"{HEADINGS[name]} {kind}" for name in FIGURES for kind in ("raw", "rank")]
    intervals = [
        [row.method, *(span(part.get(name)) for name in FIGURES for part in (row.raw_intervals, row.rank_intervals))]
        for row in rows
        if row.why is None
    ]
    text = ["# Maps against masks", ""]
    text += ["Percent. `raw`: maps as methods give them; `rank`: their values replaced by ranks. Cut at the mean of each map."]
    text += slow_note(rows)
    text += ["", *lines(["method", "images", *pairs, "forwards", "ms per image"], body_of(rows, _raw_and_rank))]
    text += ["", f"95 % intervals (bootstrap over images, {DRAWS} resamples):", "", *lines(["method", *pairs], intervals)]
    return "\n".join([*text, *missing_note(rows)]) + "\n"


def _raw_and_rank(row: MapRow) -> list[str]:
    """A method's figures, of its maps as they are and of their ranks side by side."""
    return [cell(part.get(name)) for name in FIGURES for part in (row.raw, row.rank)]


def table_csv(rows: Sequence[MapRow]) -> str:
    """One line per method; each figure with the ends of its interval; those of ranks have names that begin with `rank_`."""
    return csv_of(rows, FIGURES, {"": lambda row: (row.raw, row.raw_intervals), "rank_": lambda row: (row.rank, row.rank_intervals)})


def latex(rows: Sequence[MapRow]) -> str:
    """A table for papers (package booktabs): raw and rank figures side by side."""
    spans = " & ".join(rf"\multicolumn{{2}}{{c}}{{{HEADINGS[name]}}}" for name in FIGURES)
    head = [rf"method & images & {spans} & forwards & ms \\", rf" & & {' & '.join(['raw & rank'] * len(FIGURES))} & & \\"]
    note = "; percent, raw maps and rank-normalised maps"
    return booktabs(note, f"lr{'rr' * len(FIGURES)}rr", head, body_of(rows, _raw_and_rank), rows)
