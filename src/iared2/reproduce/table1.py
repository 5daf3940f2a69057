"""Table 1: maps against masks, weakly supervised segmentation, the paper's numbers beside ours."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from iared2.data.masks import MaskedImages
from iared2.evaluate.bootstrap import DRAWS
from iared2.evaluate.segment import MapRow
from iared2.model import ReducedTransformer
from iared2.report.segment import HEADINGS
from iared2.report.tables import costs, lines, without_name
from iared2.reproduce.maps import NO_MEMNET, Figure, MapsBench, Seeds, command, facts, figures_of, map_rows
from iared2.reproduce.runs import write_json
from iared2.reproduce.trend import Trend, listed, places, trend

SHOWN = ("pixel_accuracy", "macc", "miou", "map")
PAPERS = SHOWN[:3]  # what the paper reports
SOURCE = "Table 1: weakly supervised segmentation with maps"
SETTING = "DeiT-S, ImageNet-Segmentation"


@dataclass(frozen=True)
class Method:
    """One line: a method's id, its name for people, and the paper's numbers in the order of `PAPERS`, where it has any."""

    id: str
    label: str
    paper: tuple[float, float, float] | None = None


def second_group(model: ReducedTransformer) -> str:
    """The id of the paper's map: the scores of the second group (of the only one, where there is one)."""
    return f"ours:{min(1, len(model.reducers) - 1)}"


def methods(bench: MapsBench, model: ReducedTransformer) -> list[Method]:
    """The paper's rows, then our best maps, the peers that the paper leaves out, and what knows nothing."""
    memnet = "memorability" if bench.memnet is None else f"memorability:{bench.memnet}"
    last = model.adapter.depth - 1
    return [
        Method("attention:1", "raw attention, second block", (67.87, 61.77, 46.37)),
        Method("lime", "LIME", (67.32, 47.80, 33.94)),
        Method(memnet, "MemNet", (52.81, 53.70, 34.66)),
        Method("gradcam", "GradCAM", (65.91, 55.04, 41.31)),
        Method("lrp", "LRP", (50.72, 50.62, 32.62)),
        Method(second_group(model), "ours, second group", (70.36, 64.86, 49.42)),
        Method("ours", "ours, all groups"),
        Method("ours_gradient", "ours with one gradient"),
        Method(f"attention:{last}", "raw attention, last block"),
        Method("rollout", "rollout"),
        Method("grad_rollout", "gradient rollout"),
        Method("partial_lrp", "partial LRP"),
        Method("attnlrp", "AttnLRP"),
        Method("legrad", "LeGrad"),
        Method("chefer", "generic attribution"),
        Method("transformer_attribution", "transformer attribution"),
        Method("random", "random"),
        Method("gaussian", "centred Gaussian"),
        Method("background", "the same everywhere"),
    ]


def run_table1(bench: MapsBench) -> int:
    """Scores every method on every data set and writes OUT/table1.md and .json after each.

    Returns:
        0; 1 where pictures were broken or a method (but MemNet, whose weights must be given) has no figures.

    Raises:
        IARED2Error: whatever stands in the way, in one line.
    """
    data, models = bench.open_masks(), bench.open_models()
    chosen = methods(bench, models[0])
    record, text = {**facts("table1", bench, models[0]), "source": SOURCE, "tables": {}}, [f"# {SOURCE}", "", *_head(bench)]
    wrong = False
    for name, pictures in data.items():
        rows = map_rows(bench, models, pictures, [method.id for method in chosen])
        text += ["", *section(name, pictures, chosen, rows)]
        record["tables"][name] = _record(chosen, rows)
        (bench.output / "table1.md").write_text("\n".join(text) + "\n")
        write_json(bench.output / "table1.json", record)
        failed = any(row.why is not None for found in rows.values() for row in found if row.method != "memorability")
        wrong |= failed or bool(pictures.skipped)
    return int(wrong)


def _head(bench: MapsBench) -> list[str]:
    out = ["    " + command("table1", bench), ""]
    out += [f"The paper ({SETTING}) finds ours first in every figure. Percent, maps as methods give them, cut at their mean."]
    seeds = len(bench.models)
    brackets = f"In brackets: 95 % intervals (bootstrap over pictures, {DRAWS} resamples)."
    many = (
        f" Plus and minus: 95 % interval of the mean over {seeds} seeds of interpreters (Student's t), rows of ours only."
        if seeds > 1
        else ""
    )
    return [*out, brackets + many + " Forwards: passes of the dense model that a map costs."]


def section(name: str, pictures: MaskedImages, chosen: Sequence[Method], rows: Seeds) -> list[str]:
    """The table of one data set, the sentence that compares it with the paper's, and what is missing."""
    good = [method for method in chosen if figures_of(rows[method.id])]
    head = [
        "method",
        "paper: " + " / ".join(HEADINGS[one] for one in PAPERS),
        *(HEADINGS[one] for one in SHOWN),
        "forwards",
        "ms",
        "images",
    ]
    out = [f"## {name}", "", *lines(head, [_line(method, rows[method.id]) for method in good]), ""]
    fewer = [method.label for method in good if _on_fewer(method, rows)]
    words = "on fewer pictures, a fixed random subset, since slow; not among the places and pairs that follow"
    out += [f"{listed(fewer)}: {words}.", ""] if fewer else []
    out += _sentences(chosen, rows)
    missing = [(method.label, _why(method, rows)) for method in chosen if method not in good]
    out += ["", *(f"- {label}: {why}" for label, why in missing)] if missing else []
    skipped = len(pictures.skipped)
    return [*out, "", f"{skipped} broken pictures were left out."] if skipped else out


def _on_fewer(method: Method, rows: Seeds) -> bool:
    """Whether a method saw fewer pictures than others did, so that its figures do not stand beside theirs."""
    return rows[method.id][0].images < max(found[0].images for found in rows.values())


def _why(method: Method, rows: Seeds) -> str:
    """Why a method has no figures: the first reason among seeds."""
    return (
        NO_MEMNET
        if method.id == "memorability"
        else next(without_name(method.id, row.why) for row in rows[method.id] if row.why is not None)
    )


def _line(method: Method, found: Sequence[MapRow]) -> list[str]:
    figures, first = figures_of(found), found[0]
    paper = "-" if method.paper is None else " / ".join(f"{value:.2f}" for value in method.paper)
    spent = costs(_mean([row.forwards for row in found]), _mean([row.milliseconds for row in found]))
    return [method.label, paper, *(figures[one].text() for one in SHOWN), *spent, str(first.images)]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def trends(chosen: Sequence[Method], rows: Seeds) -> dict[str, Trend]:
    """For the paper's map, and for each of our others in its place: how it stands among the paper's rows on the same pictures."""
    there = [method for method in chosen if figures_of(rows[method.id]) and not _on_fewer(method, rows)]
    here = {method.id: _values(figures_of(rows[method.id])) for method in there}
    paper = {method.id: dict(zip(PAPERS, method.paper, strict=True)) for method in chosen if method.paper is not None}
    claimed = next(method.id for method in chosen if method.id.startswith("ours:"))
    stands = [method for method in chosen if method.id.startswith("ours") and method.id in here]
    return {method.label: trend(paper, here, claimed, method.id) for method in stands}


def _values(figures: dict[str, Figure]) -> dict[str, float]:
    return {name: one.value for name, one in figures.items()}


def _sentences(chosen: Sequence[Method], rows: Seeds) -> list[str]:
    found = trends(chosen, rows)
    if not found:
        return ["Nothing to compare with the paper: none of our maps has figures."]
    (label, own), *others = found.items()
    if own.holds is None:
        return ["Nothing to compare with the paper: of its other rows none has figures on the same pictures."]
    same = "the trend is the same" if own.holds else "the trend is not the same"
    out = [f"Among the paper's rows {label} is: {places(own, HEADINGS)}; {same}."]
    order = ", ".join(f"{own.same[one]} ({HEADINGS[one]})" for one in PAPERS)
    out[0] += f" Of {own.pairs} pairs of the paper's rows that have figures on these pictures, in the paper's order: {order}."
    out += [f"In its place {other} would be: {places(one, HEADINGS)}." for other, one in others]
    return out


def _record(chosen: Sequence[Method], rows: Seeds) -> dict[str, Any]:
    """A data set's rows for JSON: each method's figures and every seed's own row."""
    found = []
    for method in chosen:
        paper = None if method.paper is None else dict(zip(PAPERS, method.paper, strict=True))
        figures = {name: one.record() for name, one in figures_of(rows[method.id]).items()}
        seeds = [row.record() | {"method": method.label} for row in rows[method.id]]
        found.append(
            {
                "method": method.label,
                "id": method.id.partition(":")[0] if method.id.startswith("memorability") else method.id,
                "paper": paper,
                "figures": figures,
                "seeds": seeds,
            }
        )
    return {"rows": found, "trend": {label: one.record() for label, one in trends(chosen, rows).items()}}
