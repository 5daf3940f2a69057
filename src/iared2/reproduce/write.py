"""A table's rows as JSON, as Markdown with the paper's numbers beside ours, and as a figure."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from iared2.evaluate.machine import describe_machine, versions
from iared2.reproduce.bench import Bench
from iared2.reproduce.intervals import half_width, paired
from iared2.reproduce.runs import Row, write_json
from iared2.reproduce.tables import Table
from iared2.runtime import pick_device

Results = list[tuple[str, list[Row]]]  # for each line of a table: the paper's words, and a row per seed


def command(name: str, bench: Bench) -> str:
    """The command that makes these results again."""
    val = "" if bench.val_images is None else f" --val-images {bench.val_images}"
    images = f" --images {bench.images}" if bench.scale == "small" else ""
    return f"iared2 reproduce {name} --scale {bench.scale} --data FOLDER{images}{val} --seeds {bench.seeds} -o OUT"


def write_table(name: str, table: Table, dense: Row, results: Results, bench: Bench) -> None:
    """Writes OUT/NAME.json, OUT/NAME.md and OUT/NAME.png; unfinished tables are written too, as far as they are."""
    about = {"name": name, "source": table.source, "command": command(name, bench), **setting(bench)}
    rows = [{"paper": paper, **row} for paper, found in results for row in found]
    write_json(bench.output / f"{name}.json", {**about, "dense": dense, "rows": rows})
    (bench.output / f"{name}.md").write_text(markdown(name, table, dense, results, bench))
    plot(table, dense, results, bench.output / f"{name}.png")


def setting(bench: Bench) -> dict[str, Any]:
    """What the figures depend on beside the configuration."""
    device = pick_device(bench.device)
    return {"scale": bench.scale, "images": bench.images, "machine": describe_machine(device), "versions": versions()}


def machine_words(bench: Bench) -> str:
    """The machine as a sentence's part."""
    about = describe_machine(pick_device(bench.device))
    return str(about.get("accelerator") or f"{about['processor']}, {about['cores']} cores, {torch.get_num_threads()} thread")


def markdown(name: str, table: Table, dense: Row, results: Results, bench: Bench) -> str:
    """The table, one line per configuration."""
    boxes = table.boxes and dense["inside"] is not None
    head = ["", "paper", "top-1", "against dense", "multiply-adds", "patches left", "seeds"]
    head += ["map in boxes", "reversed map", "uniform map"] if boxes else []
    out = [f"# {table.source}", "", f"The paper: {table.claim}.", "", f"    {command(name, bench)}", ""]
    out += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), _dense_line(dense, len(head), boxes)]
    out += ["| " + " | ".join(_cells(paper, found, dense, boxes)) + " |" for paper, found in results if found]
    trained = f"{bench.images} training pictures, " if bench.scale == "small" else ""
    out += ["", f"{trained}{dense['pictures']} validation pictures; {machine_words(bench)}. Top-1 of several seeds: mean, and the"]
    out += [
        "half-width of its 95 % interval over seeds (Student's t). Against dense: paired difference in points, with its 95 % interval over"
    ]
    out += ["pictures, which does not say how another training would come out. Multiply-adds: as a share of the dense model's."]
    unmet = sorted({row["name"] for _, found in results for row in found if not row["budget_met"]})
    out += [f"The budget could not be met by: {', '.join(unmet)}; their thresholds are 0.5."] if unmet else []
    missing = sum(len(found) < bench.seeds for _, found in results)
    out += [f"Not finished when this was written: {missing} of {len(results)} lines."] if missing else []
    return "\n".join(out) + "\n"


def _dense_line(dense: Row, columns: int, boxes: bool) -> str:
    cells = ["dense", "-", f"{dense['top1']:.2f} %", "0", "1", "all", "-"]
    cells += ["-", "-", f"{dense['uniform_inside']:.1f} %"] if boxes else []
    return "| " + " | ".join(cells[:columns]) + " |"


def _cells(paper: str, found: Sequence[Row], dense: Row, boxes: bool) -> list[str]:
    difference, over_pictures = paired([row["correct"] for row in found], [dense["correct"]])
    kept = [statistics.mean(values) for values in zip(*(row["keep_ratio"] for row in found), strict=True)]
    cells = [found[0]["name"], paper, f"{_mean_and_half(found, 'top1', 2)} %", f"{difference:+.2f}{_half(over_pictures, 2)}"]
    cells += [f"{_mean_and_half(found, 'macs_share', 3)}x", ", ".join(f"{value:.2f}" for value in kept), str(len(found))]
    if boxes:
        cells += [f"{_mean_and_half(found, key, 1)} %" for key in ("inside", "reverse_inside", "uniform_inside")]
    return cells


def _mean_and_half(found: Sequence[Row], key: str, digits: int) -> str:
    values = [row[key] for row in found]
    return f"{statistics.mean(values):.{digits}f}{_half(half_width(values), digits)}"


def _half(value: float | None, digits: int) -> str:
    return "" if value is None or math.isnan(value) else f" ± {value:.{digits}f}"


def plot(table: Table, dense: Row, results: Results, path: Path) -> None:
    """Accuracy against multiply-adds: every run a point, and lines where a table is a curve."""
    axes, finish = figure("multiply-adds, share of dense", "top-1, %", table.source.partition(" (")[0])
    curves: dict[str, list[tuple[float, float]]] = {}
    for number, (_, found) in enumerate(results):
        if not found:
            continue
        points = [(row["macs_share"], row["top1"]) for row in found]
        word = found[0]["name"].partition(",")[0].split(" ")[0] if table.curve else found[0]["name"]
        colour = f"C{list(curves).index(word) if word in curves else len(curves)}" if table.curve else f"C{number}"
        axes.plot(*zip(*points, strict=True), "o", color=colour, label=None if word in curves else word)
        curves.setdefault(word, []).append((statistics.mean(x for x, _ in points), statistics.mean(y for _, y in points)))
    for number, (word, points) in enumerate(curves.items()):
        if len(points) > 1:
            axes.plot(*zip(*sorted(points), strict=True), "-", color=f"C{number}", alpha=0.5, label=f"{word}, mean of each row")
    axes.plot([1], [dense["top1"]], "k*", label="dense")
    finish(path)


def figure(across: str, up: str, title: str) -> tuple[Any, Any]:
    """Axes, and a function that saves them to a file of some 30 KB."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    plot_, axes = plt.subplots(figsize=(6, 4), dpi=100)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)

    def finish(path: Path) -> None:
        axes.legend(fontsize=7)
        plot_.tight_layout()
        plot_.savefig(path)
        plt.close(plot_)

    return axes, finish
