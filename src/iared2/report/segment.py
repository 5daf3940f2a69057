"""`iared2 segment`: the run, and its tables as Markdown, CSV, LaTeX and JSON."""

import csv
import difflib
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from iared2.data.masks import open_masks
from iared2.errors import ConfigError
from iared2.evaluate.machine import describe_machine, versions
from iared2.evaluate.map_scores import DRAWS, FIGURES
from iared2.evaluate.report import check_writable, write_json
from iared2.evaluate.segment import MapRow, Segmentation, SegmentOptions
from iared2.explain.methods import find_explainer, method_names
from iared2.model import ReducedTransformer
from iared2.report.files import open_folder, write
from iared2.report.screen import complain, progress, screen

SCHEMA = 1
HEADINGS = dict(zip(FIGURES, ("pixel acc.", "mIoU", "mAP", "mAcc", "pointing", "mass"), strict=True))
EVERY = "all"


def choose_methods(text: str) -> list[str]:
    """Names separated by commas, each once; "all" is every method there is.

    Raises:
        ConfigError: no name, or one that does not exist; the message has the nearest one that does.
    """
    known = method_names()
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise ConfigError(f"--methods: got none; wanted names separated by commas, of {', '.join(known)}; or {EVERY}")
    if names == [EVERY]:
        return known
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, [*known, EVERY], n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}? Known" if near else "known"
            raise ConfigError(f"--methods: got {name!r}, which is no method; {hint}: {', '.join(known)}")
    return names


@dataclass(frozen=True)
class Request:
    """What to score, and where to write it.

    Attributes:
        limit: use a fixed random subset of this many pictures.
        json_file: one more place for the JSON file.
        about: what else the JSON file should say.
    """

    data: Path
    methods: Sequence[str]
    output: Path
    limit: int | None = None
    json_file: Path | None = None
    about: dict[str, Any] = field(default_factory=dict)


def run_segment(model: ReducedTransformer, request: Request, options: SegmentOptions) -> int:
    """Scores methods against masks and writes OUT/segment.md, .csv, .tex and .json; finished shards stay in OUT/.shards.

    Returns:
        0; 1 where pictures were broken or a method has no figures; 2 where none has.

    Raises:
        IARED2Error: whatever stands in the way, in one line.
    """
    for name, value in (("--limit", request.limit), ("--slow-limit", options.slow_limit)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}: got {value}, wanted 1 or more")
    pictures = open_masks(request.data)
    pictures = pictures if request.limit is None else pictures.subset(request.limit, options.seed)
    task = Segmentation(model, pictures, find_explainer, options, request.output / ".shards")
    open_folder(request.output)  # after what may be wrong with the data, so that a refused run leaves nothing
    if request.json_file is not None:
        check_writable(request.json_file)
    with progress() as bar:
        line = bar.add_task("scoring maps", total=task.work(request.methods))
        rows = task.run(request.methods, lambda done: bar.advance(line, done))
    how, device = task.how, next(model.parameters()).device
    facts = {"schema_version": SCHEMA, **request.about, "data": str(request.data), "limit": request.limit, "settings": asdict(options)}
    facts |= {"protocol": {"size": list(how.size), "mean": list(how.mean), "std": list(how.std), "bootstrap": DRAWS}}
    facts |= {"versions": versions(), "machine": describe_machine(device), "skipped": task.skipped}
    write_tables(rows, facts, request.output)
    if request.json_file is not None:
        write_json(request.json_file, facts | {"rows": [row.record() for row in rows]})
    return _tell(rows, task.skipped, request.output)


def _tell(rows: Sequence[MapRow], skipped: dict[str, str], output: Path) -> int:
    screen().print("\n".join(_lines(*short_table(rows))), markup=False, soft_wrap=True)
    screen().print(f"Tables are in {output / 'segment.md'}, and beside it as .csv, .tex and .json", markup=False, soft_wrap=True)
    failed = [row for row in rows if row.why is not None]
    for row in failed:
        complain(f"{row.method}: {row.why}")
    if skipped:
        complain(f"{len(skipped)} broken pictures were left out: {', '.join(list(skipped)[:5])}{', ...' if len(skipped) > 5 else ''}")
    return 2 if len(failed) == len(rows) else int(bool(failed or skipped))


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


Table = tuple[list[str], list[list[str]]]


def short_table(rows: Sequence[MapRow]) -> Table:
    """For the screen: raw maps, and mIoU and mAP of their ranks."""
    names = ("pixel_accuracy", "miou", "map", "macc")
    head = ["method", "images", *(HEADINGS[name] for name in names), "rank mIoU", "rank mAP", "forwards", "ms"]
    body = [
        [
            row.method,
            str(row.images),
            *(_cell(row.raw.get(name)) for name in names),
            *(_cell(row.rank.get(name)) for name in ("miou", "map")),
            *_costs(row),
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
        [row.method, str(row.images), *(_cell(part.get(name)) for name in FIGURES for part in (row.raw, row.rank)), *_costs(row)]
        for row in good
    ]
    intervals = [
        [row.method, *(_interval(part.get(name)) for name in FIGURES for part in (row.raw_intervals, row.rank_intervals))] for row in good
    ]
    text = ["# Maps against masks", ""]
    text += ["Percent. `raw`: maps as methods give them; `rank`: their values replaced by ranks. Cut at the mean of each map."]
    if any(row.slow for row in good):
        sizes = ", ".join(f"{row.method} on {row.images}" for row in good if row.slow)
        text += ["", f"Slow methods ran on a fixed random subset of the images: {sizes}."]
    text += ["", *_lines(["method", "images", *pairs, "forwards", "ms per image"], figures)]
    text += ["", f"95 % intervals (bootstrap over images, {DRAWS} resamples):", "", *_lines(["method", *pairs], intervals)]
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
        numbers = [_bare(row.forwards, 2), _bare(row.milliseconds, 3), *(_bare(value, 4) for value in values)]
        writer.writerow([row.method, row.images, *numbers, int(row.slow), row.why or ""])
    return stream.getvalue()


def latex(rows: Sequence[MapRow]) -> str:
    """A table for papers (package booktabs): raw and rank figures side by side."""
    spans = " & ".join(rf"\multicolumn{{2}}{{c}}{{{HEADINGS[name]}}}" for name in FIGURES)
    lines = [
        "% needs \\usepackage{booktabs}; percent, raw maps and rank-normalised maps",
        rf"\begin{{tabular}}{{lr{'rr' * len(FIGURES)}rr}}",
        r"\toprule",
        rf"method & images & {spans} & forwards & ms \\",
        rf" & & {' & '.join(['raw & rank'] * len(FIGURES))} & & \\",
        r"\midrule",
    ]
    for row in rows:
        if row.why is not None:
            lines.append(f"% {row.method}: {row.why}")
            continue
        cells = [_cell(part.get(name)) for name in FIGURES for part in (row.raw, row.rank)]
        lines.append(rf"{_tex(row.method)} & {row.images} & {' & '.join(cells)} & {' & '.join(_costs(row))} \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _tex(text: str) -> str:
    return "".join("\\" + c if c in "_%&#${}" else c for c in text)


def _lines(head: list[str], body: list[list[str]]) -> list[str]:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *body]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _costs(row: MapRow) -> list[str]:
    return [_bare(row.forwards, 2, short=True), _bare(row.milliseconds, 1)]


def _cell(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.2f}"


def _interval(pair: tuple[float, float] | None) -> str:
    return "-" if pair is None or not all(math.isfinite(end) for end in pair) else f"{pair[0]:.1f} to {pair[1]:.1f}"


def _bare(value: float | None, digits: int, short: bool = False) -> str:
    if value is None or not math.isfinite(value):
        return ""
    return f"{value:.{digits}f}".rstrip("0").rstrip(".") if short else f"{value:.{digits}f}"
