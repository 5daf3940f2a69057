"""`iared2 faithfulness`: the run, its tables as Markdown, CSV, LaTeX and JSON, and its curves as JSON and as one picture."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from iared2.data.labels import model_class_ids
from iared2.data.raw import RawImages, raw_images
from iared2.data.sources import open_data
from iared2.errors import ConfigError, DataError
from iared2.evaluate.bootstrap import DRAWS
from iared2.evaluate.faithful_run import LABEL, FaithfulnessRun, FaithOptions, FaithRow
from iared2.evaluate.faithfulness import FIGURES, TESTS
from iared2.evaluate.report import check_writable, write_json
from iared2.explain.methods import find_explainer
from iared2.model import ReducedTransformer
from iared2.output import open_folder, write
from iared2.report.curves import curves_png
from iared2.report.methods import Request, check_limits, facts_of, tell_rows
from iared2.report.screen import progress, screen
from iared2.report.tables import Table, body_of, booktabs, cell, csv_of, lines, missing_note, slow_note, span

SCHEMA = 1
CHANCE = "random"  # a row that every table has
SHORT = ("positive", "negative", "tokens_positive", "tokens_negative", "road_positive", "road_negative", "saco", "randomised_all")
HEADINGS = {
    "positive": "pos. ↓",
    "negative": "neg. ↑",
    "deletion_zero": "del. black ↓",
    "insertion_zero": "ins. black ↑",
    "tokens_positive": "tokens pos. ↓",
    "tokens_negative": "tokens neg. ↑",
    "road_positive": "ROAD pos. ↓",
    "road_negative": "ROAD neg. ↑",
    "deletion_blur": "del. blur ↓",
    "insertion_blur": "ins. blur ↑",
    "saco": "SaCo ↑",
    "gini": "Gini",
    "randomised_1": "last block random ↓",
    "randomised_all": "all random ↓",
}
UNIT = ("saco", "gini", "randomised_1", "randomised_all")  # figures that are no percentages: three digits


def choose_tests(text: str) -> tuple[str, ...]:
    """Names of tests separated by commas; "all" is every one.

    Raises:
        ConfigError: none, or one that does not exist.
    """
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if names == ("all",):
        return tuple(TESTS)
    for name in names or ("",):
        if name not in TESTS:
            raise ConfigError(f"--tests: got {name!r}, wanted names separated by commas, of {', '.join(TESTS)}; or all")
    return names


def choose_target(text: str) -> str | int:
    """The class to explain: a word, or a number."""
    return int(text) if text.lstrip("-").isdecimal() else text


def run_faithfulness(model: ReducedTransformer, request: Request, options: FaithOptions) -> int:
    """Judges methods and writes OUT/faithfulness.md, .csv, .tex and .json, OUT/curves.json and .png; shards stay in OUT/.shards.

    Returns:
        0; 1 where pictures were broken or a method has no figures; 2 where none has.

    Raises:
        IARED2Error: whatever stands in the way, in one line.
    """
    check_limits(request.limit, options.slow_limit)
    pictures = _open(request, model, options)
    total = len(pictures)
    pictures = pictures if request.limit is None else pictures.subset(request.limit, options.seed)
    task = FaithfulnessRun(model, pictures, find_explainer, options, request.output / ".shards")
    open_folder(request.output)  # after what may be wrong with the data, so that a refused run leaves nothing
    if request.json_file is not None:
        check_writable(request.json_file)
    size = f"{len(pictures)} of {total} pictures" + (", a fixed random subset" if len(pictures) < total else "")
    screen().print(f"{size}; slow methods on {min(options.slow_limit, len(pictures))}", markup=False, soft_wrap=True)
    methods = [*request.methods, *([] if CHANCE in request.methods else [CHANCE])]
    with progress() as bar:
        line = bar.add_task("judging maps", total=task.work(methods))
        rows = task.run(methods, lambda done: bar.advance(line, done))
    facts = {"schema_version": SCHEMA, **facts_of(model, request, asdict(options)), "pictures": total, "skipped": task.skipped}
    write_files(rows, facts, request)
    where = f"Tables are in {request.output / 'faithfulness.md'}, and beside it as .csv, .tex and .json; curves as curves.json and .png"
    shown = [name for name in SHORT if name in _shown(rows)] or _shown(rows)
    return tell_rows("\n".join(lines(*table(rows, shown))), where, rows, task.skipped)


def _open(request: Request, model: ReducedTransformer, options: FaithOptions) -> RawImages:
    """The pictures that `eval` would read; where labels are not needed, a plain folder of pictures too."""
    classes = model_class_ids(model.backbone)
    try:
        data = open_data(request.data, "val", classes)
    except DataError:
        if options.target == LABEL:
            raise
        data = open_data(request.data, "val", classes, labels=False)
    return raw_images(data, request.data)


# ---- files ----------------------------------------------------------------------------------------------------


def write_files(rows: Sequence[FaithRow], facts: dict[str, Any], request: Request) -> None:
    """Tables and curves; last the JSON file that says that all is there.

    Raises:
        OutputError: a file cannot be written.
    """
    output = request.output
    for ending, text in (("md", markdown(rows)), ("csv", table_csv(rows)), ("tex", latex(rows))):
        write(output / f"faithfulness.{ending}", text.encode())
    curves = {row.method: {"images": row.images, **row.curves} for row in rows if row.why is None}
    if any(row.curves for row in rows):
        write(output / "curves.png", curves_png({row.method: row.curves for row in rows if row.why is None}))
    write(output / "curves.json", (json.dumps({**facts, "curves": curves}, indent=1, allow_nan=False) + "\n").encode())
    content = facts | {"rows": [row.record() for row in rows]}
    write(output / "faithfulness.json", (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())
    if request.json_file is not None:
        write_json(request.json_file, content)


def _shown(rows: Sequence[FaithRow]) -> list[str]:
    """The figures that were asked for."""
    return [name for name in FIGURES if any(name in row.figures for row in rows)]


def _digits(name: str, percent: int) -> int:
    return 3 if name in UNIT else percent


def table(rows: Sequence[FaithRow], names: Sequence[str]) -> Table:
    """Figures by method."""
    head = ["method", "images", *(HEADINGS[name] for name in names), "forwards", "ms"]
    body = body_of(rows, lambda row: [cell(row.figures.get(name), _digits(name, 2)) for name in names])
    return head, body


def markdown(rows: Sequence[FaithRow]) -> str:
    """Figures, then their intervals, then what is missing and why."""
    names = _shown(rows)
    intervals = [[row.method, *(span(row.intervals.get(name), _digits(name, 1)) for name in names)] for row in rows if row.why is None]
    text = ["# Faithfulness of maps", ""]
    text += ["Arrows say what is better; the dense backbone is the judge. Pos. and neg.: area under the top-1 curve from 10 to 90 %"]
    text += ["removed, most or least relevant first, in percent; pixels become black, patches are dropped (tokens), pixels are imputed"]
    text += ["(ROAD). Del. and ins.: area under the explained class's probability, in percent. Random: rank correlation of maps."]
    text += slow_note(rows)
    text += ["", *lines(*table(rows, names))]
    text += ["", f"95 % intervals (bootstrap over images, {DRAWS} resamples):", ""]
    text += lines(["method", *(HEADINGS[name] for name in names)], intervals)
    return "\n".join([*text, *missing_note(rows)]) + "\n"


def table_csv(rows: Sequence[FaithRow]) -> str:
    """One line per method; each figure with the ends of its interval."""
    return csv_of(rows, FIGURES, {"": lambda row: (row.figures, row.intervals)})


def latex(rows: Sequence[FaithRow]) -> str:
    """A table for papers (package booktabs)."""
    head, body = table(rows, _shown(rows))
    signs = {"↓": r"$\downarrow$", "↑": r"$\uparrow$"}
    first = " & ".join("".join(signs.get(c, c) for c in heading) for heading in head) + r" \\"
    return booktabs("", f"l{'r' * (len(head) - 1)}", [first], body, rows)
