"""The numbers behind Figure 4: which share of each group's kept patches lies on the object, and how keeping follows the object's area."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from iared2.data.masks import MaskedImages
from iared2.errors import DataError
from iared2.evaluate.bootstrap import DRAWS, interval, means, resamples
from iared2.evaluate.kept import OURS, PARTS, Kept, KeptRow
from iared2.model import ReducedTransformer
from iared2.report.screen import progress
from iared2.report.tables import lines
from iared2.reproduce.maps import Figure, MapsBench, over_seeds
from iared2.reproduce.trend import listed
from iared2.reproduce.write import figure

BINS = 5
HEADINGS = {
    "kept": "kept",
    "inside": "of the kept, on the object",
    "of_object": "of the object, kept",
    "of_rest": "of the background, kept",
}
BLURRED = 0.5  # percentage points that a share must rise by to count as risen


def hierarchy_numbers(
    name: str, bench: MapsBench, models: Sequence[ReducedTransformer], data: dict[str, MaskedImages]
) -> tuple[dict[str, Any], list[str], bool]:
    """Measures what groups keep on every data set, and draws OUT/NAME-DATA.png for each.

    Returns:
        A record for JSON, lines of Markdown, and whether pictures were broken.

    Raises:
        DataError: no picture of a data set can be read.
    """
    record, text, wrong = dict[str, Any](), list[str](), False
    for title, pictures in data.items():
        rows = [_row(bench, model, pictures) for model in models]
        curve = bench.output / f"{name}-{''.join(c if c.isalnum() else '_' for c in title)}.png"
        record[title] = _record(rows)
        text += [*section(title, rows), "", f"![Keep ratio against the object's area]({curve.name})", ""]
        text += [f"{len(pictures.skipped)} broken pictures were left out.", ""] if pictures.skipped else []
        wrong |= bool(pictures.skipped)
        plot(title, rows, curve)
    return record, text, wrong


def _row(bench: MapsBench, model: ReducedTransformer, pictures: MaskedImages) -> KeptRow:
    task = Kept(model, pictures, bench.options(), bench.records)
    bench.open_output()
    with progress() as bar:
        line = bar.add_task("what groups keep", total=task.work([OURS]))
        row = task.run([OURS], partial(bar.advance, line))[0]
    if row.why is not None:
        raise DataError(f"masks: what groups keep cannot be measured; {row.why}")
    return row


# ---- figures --------------------------------------------------------------------------------------------------


def parts_of(rows: Sequence[KeptRow]) -> dict[str, list[Figure]]:
    """`PARTS` per group in percent; intervals over pictures of one seed, over seeds of several."""
    each, ends = [row.means() for row in rows], rows[0].intervals()
    return {part: [over_seeds([one[part][g] for one in each], ends[part][g]) for g in range(rows[0].groups)] for part in PARTS}


def correlations_of(rows: Sequence[KeptRow]) -> list[Figure]:
    """Rank correlation of keep ratio and object's area, per group: mean over seeds, interval over pictures.

    Over pictures even where there are several seeds, because few pictures move a correlation more than other interpreters do.
    """
    mean_G = torch.stack([row.correlations() for row in rows]).mean(0)
    drawn_GD = torch.stack([row.drawn_correlations() for row in rows]).mean(0)
    return [Figure(float(mean), interval(drawn_D)) for mean, drawn_D in zip(mean_G, drawn_GD, strict=True)]


def area_of(row: KeptRow) -> Figure:
    """The object's share of the pictures, mean in percent."""
    value_N1 = 100 * row.area_N[:, None]
    mean = float(means(value_N1, torch.ones(1, len(value_N1), dtype=torch.float64)))
    return Figure(mean, interval(means(value_N1, resamples(len(value_N1), row.seed))[:, 0]))


@dataclass(frozen=True)
class Bin:
    """Pictures whose objects are about as large: areas and keep ratios per group, in percent."""

    area_N: Float[Tensor, " N"]
    kept_NG: Float[Tensor, "N G"]

    @property
    def area(self) -> float:
        return float(self.area_N.nanmean())

    def kept(self) -> list[float]:
        """The mean keep ratio after each group."""
        return self.kept_NG.mean(0).tolist()

    def bars(self) -> list[float]:
        """Half of the 95 % interval of each of these means over pictures; 0 for one picture."""
        count = len(self.kept_NG)
        return (1.96 * self.kept_NG.std(0) / math.sqrt(count)).tolist() if count > 1 else [0.0] * self.kept_NG.shape[1]


def bins_of(row: KeptRow) -> list[Bin]:
    """Pictures in bins of equal number by the object's area."""
    order_N = row.area_N.argsort(stable=True)
    return [Bin(100 * row.area_N[part], 100 * row.part_NG["kept"][part]) for part in order_N.tensor_split(min(BINS, len(order_N)))]


def binned(rows: Sequence[KeptRow]) -> list[tuple[Bin, list[float]]]:
    """Each bin of the first seed, and its keep ratios as means over seeds."""
    return [
        (bins[0], [statistics.mean(one) for one in zip(*(each.kept() for each in bins), strict=True)])
        for bins in zip(*map(bins_of, rows), strict=True)
    ]


def section(title: str, rows: Sequence[KeptRow]) -> list[str]:
    """Both tables of a data set, and the sentences that compare them with what the paper says."""
    first, area, parts, follow = rows[0], area_of(rows[0]), parts_of(rows), correlations_of(rows)
    seeds = "" if len(rows) == 1 else f", {len(rows)} seeds of interpreters"
    head = ["after group", *(HEADINGS[part] for part in PARTS), "rank correlation of kept and area"]
    body = [[str(g + 1), *(parts[part][g].text() for part in PARTS), follow[g].text(2)] for g in range(first.groups)]
    out = [
        f"## What groups keep on {title}",
        "",
        f"{first.images} pictures{seeds}; percent. The object covers {area.text()} of a picture: of",
    ]
    out += [
        "patches kept by chance as many lie on it. A token counts once, at its own place, however many patches it carries. Intervals: 95 %,"
    ]
    out += [
        f"bootstrap over pictures ({DRAWS} resamples)"
        + ("" if len(rows) == 1 else "; plus and minus: over seeds, Student's t (not of correlations)")
        + "."
    ]
    out += ["", *lines(head, body), "", *sentences(parts, follow, area), ""]
    head = ["object's area", "pictures", *(f"kept after group {g + 1}" for g in range(first.groups))]
    body = [[f"{one.area:.1f}", str(len(one.area_N)), *(f"{value:.1f}" for value in kept)] for one, kept in binned(rows)]
    return [*out, *lines(head, body)]


def sentences(parts: dict[str, list[Figure]], follow: Sequence[Figure], area: Figure) -> list[str]:
    """The paper's claims on Figure 4, each answered by the numbers."""
    inside, kept = [one.value for one in parts["inside"]], [one.value for one in parts["kept"]]
    if len(kept) == 1:
        return _of_one_group(kept[0], inside[0], follow[0], area)
    first = _share(kept[0])
    falls = all(later < before for before, later in zip(kept, kept[1:], strict=False))
    rises = all(later >= before - BLURRED for before, later in zip(inside, inside[1:], strict=False)) and inside[-1] > area.value + BLURRED
    yes = [str(g + 1) for g, one in enumerate(follow) if one.interval is not None and one.interval[0] > 0]
    no = [str(g + 1) for g, one in enumerate(follow) if one.interval is not None and one.interval[1] < 0]
    out = [f"The paper: all at first, then the object, then its parts. Here the first group keeps {first}, the last {kept[-1]:.0f} %"]
    out[0] += f" ({'fewer from group to group' if falls else 'not fewer from group to group'}); of what is kept,"
    out += [
        f"{inside[0]:.1f} % lies on the object after the first group and {inside[-1]:.1f} % after the last; by chance {area.value:.1f} %:"
    ]
    out += ["the trend is the same." if rises and falls else "the trend is not the same."]
    out += ["The paper: pictures with more background have more redundancy. Here more is kept where the object is larger"]
    out += [f"{f'after {_groups(yes)}' if yes else 'after no group'}" + (f", less after {_groups(no)}" if no else "") + "."]
    return out


def _of_one_group(kept: float, inside: float, follow: Figure, area: Figure) -> list[str]:
    """The same where there is one group, so that nothing can be said of an order."""
    ends = follow.interval or (0.0, 0.0)
    how = "more is kept" if ends[0] > 0 else "less is kept" if ends[1] < 0 else "neither more nor less is kept for certain"
    return [
        f"Here {_share(kept)} is kept; of that, {inside:.1f} % lies on the object; by chance {area.value:.1f} %.",
        "There is one reduction, so nothing to compare with the paper's all at first, then the object, then its parts.",
        f"The paper: pictures with more background have more redundancy. Here {how} where the object is larger.",
    ]


def _share(kept: float) -> str:
    return "nearly all" if kept >= 95 else f"{kept:.0f} %"


def _groups(numbers: Sequence[str]) -> str:
    return f"group{'' if len(numbers) == 1 else 's'} {listed(numbers)}"


def _record(rows: Sequence[KeptRow]) -> dict[str, Any]:
    parts, follow = parts_of(rows), correlations_of(rows)
    found: dict[str, Any] = {part: [one.record() for one in values] for part, values in parts.items()}
    found |= {"pictures": rows[0].images, "seeds": len(rows), "area": area_of(rows[0]).record()}
    found["rank_correlation"] = [one.record() for one in follow]
    found["bins"] = [{"pictures": len(one.area_N), "area": one.area, "kept": kept} for one, kept in binned(rows)]
    return found


def plot(title: str, rows: Sequence[KeptRow], path: Path) -> None:
    """Keep ratio against the object's area, one line per group; bars are 95 % of the mean over the pictures of a bin (first seed)."""
    axes, finish = figure("object's share of the picture, %", "patches kept, %", f"What groups keep on {title}")
    found = binned(rows)
    for group in range(rows[0].groups):
        kept, bars = [values[group] for _, values in found], [one.bars()[group] for one, _ in found]
        label = f"after group {group + 1}"
        axes.errorbar([one.area for one, _ in found], kept, bars, fmt="o-", markersize=4, capsize=2, color=f"C{group}", label=label)
    axes.set_ylim(0, 104)
    finish(path)
