"""`iared2 segment`: the run, and its tables as Markdown, CSV, LaTeX and JSON."""

import csv
import io
import json
import math
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
from iared2.report.files import open_folder, write
from iared2.report.methods import Request, check_limits, facts_of, tell_rows
from iared2.report.screen import progress
from iared2.report.tables import Table, bare, cell, costs, lines, span, tex

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
    body = [
        [
            row.method,
            str(row.images),
            *(cell(row.raw.get(name)) for name in names),
            *(cell(row.rank.get(name)) for name in ("miou", "map")),
            *costs(row.forwards, row.milliseconds),
        ]
        for row in rows
        if row.why is None
    ]
    return head, body


def markdown(rows: Sequence[MapRow]) -> str:
    """Figures of raw maps and of their ranks side by side, then their intervals, then what is missing and why."""
    good = [row for row in rows if row.why is None]
    pairs = [f"{HEADINGS[name]} {kind}" for name in FIGURES for kind in ("raw", "rank")]
    figures = [
        [
            row.method,
            str(row.images),
            *(cell(part.get(name)) for name in FIGURES for part in (row.raw, row.rank)),
            *costs(row.forwards, row.milliseconds),
        ]
        for row in good
    ]
    intervals = [
        [row.method, *(span(part.get(name)) for name in FIGURES for part in (row.raw_intervals, row.rank_intervals))] for row in good
    ]
    text = ["# Maps against masks", ""]
    text += ["Percent. `raw`: maps as methods give them; `rank`: their values replaced by ranks. Cut at the mean of each map."]
    if any(row.slow for row in good):
        sizes = ", ".join(f"{row.method} on {row.images}" for row in good if row.slow)
        text += ["", f"Slow methods ran on a fixed random subset of the images: {sizes}."]
    text += ["", *lines(["method", "images", *pairs, "forwards", "ms per image"], figures)]
    text += ["", f"95 % intervals (bootstrap over images, {DRAWS} resamples):", "", *lines(["method", *pairs], intervals)]
    missing = [f"- {row.method}: {row.why}" for row in rows if row.why is not None]
    text += ["", "No figures:", "", *missing] if missing else []
    return "\n".join(text) + "\n"


def table_csv(rows: Sequence[MapRow]) -> str:
    """One line per method; each figure with the ends of its interval; those of ranks have names that begin with `rank_`."""
    columns = [f"{kind}{name}{end}" for kind in ("", "rank_") for name in FIGURES for end in ("", "_low", "_high")]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["method", "images", "forwards", "milliseconds", *columns, "slow", "error"])
    for row in rows:
        values: list[float] = []
        for figures, pairs in ((row.raw, row.raw_intervals), (row.rank, row.rank_intervals)):
            for name in FIGURES:
                values += [figures.get(name, math.nan), *pairs.get(name, (math.nan, math.nan))]
        numbers = [bare(row.forwards, 2), bare(row.milliseconds, 3), *(bare(value, 4) for value in values)]
        writer.writerow([row.method, row.images, *numbers, int(row.slow), row.why or ""])
    return stream.getvalue()


def latex(rows: Sequence[MapRow]) -> str:
    """A table for papers (package booktabs): raw and rank figures side by side."""
    spans = " & ".join(rf"\multicolumn{{2}}{{c}}{{{HEADINGS[name]}}}" for name in FIGURES)
    text = [
        "% needs \\usepackage{booktabs}; percent, raw maps and rank-normalised maps",
        rf"\begin{{tabular}}{{lr{'rr' * len(FIGURES)}rr}}",
        r"\toprule",
        rf"method & images & {spans} & forwards & ms \\",
        rf" & & {' & '.join(['raw & rank'] * len(FIGURES))} & & \\",
        r"\midrule",
    ]
    for row in rows:
        if row.why is not None:
            text.append(f"% {row.method}: {row.why}")
            continue
        cells = [cell(part.get(name)) for name in FIGURES for part in (row.raw, row.rank)]
        text.append(rf"{tex(row.method)} & {row.images} & {' & '.join(cells)} & {' & '.join(costs(row.forwards, row.milliseconds))} \\")
    return "\n".join([*text, r"\bottomrule", r"\end{tabular}"]) + "\n"
