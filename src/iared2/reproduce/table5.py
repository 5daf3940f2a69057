"""Table 5: raw attention of blocks 0, 1 and 2 as a map, and as a policy that drops patches at the input, beside ours."""

import math
import statistics
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from iared2.data.batches import make_batches
from iared2.data.cluster import fingerprint, weights_of
from iared2.data.labels import check_labels, model_class_ids
from iared2.data.raw import RawImages, raw_images
from iared2.data.sources import open_data
from iared2.errors import ConfigError
from iared2.evaluate.classify import eval_preprocess, evaluate
from iared2.evaluate.policies import Policies, PolicyRow, count_for, paper_count
from iared2.evaluate.report import EvalReport
from iared2.explain.methods import find_explainer
from iared2.model import ReducedTransformer
from iared2.report.screen import progress
from iared2.report.segment import HEADINGS
from iared2.report.tables import cell, lines, without_name
from iared2.reproduce.maps import MapsBench, command, facts, figures_of, map_rows, over_seeds
from iared2.reproduce.runs import read_json, write_json
from iared2.reproduce.table1 import PAPERS, second_group
from iared2.reproduce.trend import listed
from iared2.runtime import precision

SOURCE = "Table 5: raw attention of the first three blocks"
BLOCKS = (0, 1, 2)
# The paper (DeiT-S): pixel accuracy, mAcc, mIoU on ImageNet-Segmentation; then its multiply-adds in G, top-1 and top-5 on ImageNet-1k.
PAPER_MAPS = {0: (68.3, 50.5, 37.1), 1: (67.9, 61.8, 46.4), 2: (71.9, 55.7, 42.6)}
PAPER_POLICIES = {0: (2.9, 78.6, 94.2), 1: (3.3, 78.4, 94.1), 2: (3.6, 79.3, 94.6)}
PAPER_OURS = (70.36, 64.86, 49.42), (2.9, 79.1, 94.5)


def run_table5(bench: MapsBench) -> int:
    """The part on maps with --data, the part on policies with --photos; writes OUT/table5.md and .json after each.

    Returns:
        0; 1 where pictures were broken or a row has no figures.

    Raises:
        IARED2Error: whatever stands in the way, in one line.
    """
    data, models = bench.open_masks(), bench.open_models()
    blocks = [block for block in BLOCKS if block < models[0].adapter.depth]
    photos = _open_photos(bench, models[0]) if bench.photos else None
    record, text = {**facts("table5", bench, models[0]), "source": SOURCE}, [f"# {SOURCE}", "", "    " + command("table5", bench)]
    wrong = False
    for name, pictures in data.items():
        part = _maps(bench, models, (name, pictures), blocks)
        wrong |= bool(pictures.skipped) or any(row["figures"] == {} for row in part["rows"])
        text += ["", *_maps_text(name, part)]
        record.setdefault("segmentation", {})[name] = part
        _write(bench, text, record)
    if photos is not None:
        rows, ours = _policies(bench, models, photos, blocks)
        wrong |= bool(photos.skipped) or any(row.why is not None for row in rows.values())
        text += ["", *_policies_text(rows, ours, len(photos))]
        record["classification"] = {"ours": [one.model_dump(mode="json") for one in ours], "policies": [vars(row) for row in rows.values()]}
        _write(bench, text, record)
    return int(wrong)


def _write(bench: MapsBench, text: Sequence[str], record: dict[str, Any]) -> None:
    (bench.output / "table5.md").write_text("\n".join(text) + "\n")
    write_json(bench.output / "table5.json", record)


# ---- maps -----------------------------------------------------------------------------------------------------


def _maps(bench: MapsBench, models: Sequence[ReducedTransformer], data: tuple[str, Any], blocks: Sequence[int]) -> dict[str, Any]:
    """The rows of one data set, and which block is the best in each figure, here and in the paper."""
    own = second_group(models[0])
    asked = {f"attention:{block}": PAPER_MAPS[block] for block in blocks} | {own: PAPER_OURS[0]}
    found = map_rows(bench, models, data[1], [*asked, "ours_gradient"])
    figures = {name: figures_of(rows) for name, rows in found.items()}
    rows = [
        {"id": name, "paper": list(asked.get(name, ())), "figures": {key: one.record() for key, one in figures[name].items()},
         "text": {key: one.text() for key, one in figures[name].items()}, "images": found[name][0].images, "error": found[name][0].why}
        for name in found
    ]  # fmt: skip
    known = [block for block in blocks if figures[f"attention:{block}"]]
    best = {key: max(known, key=lambda block: figures[f"attention:{block}"][key].value) for key in PAPERS} if known else {}
    papers = {key: _papers_best(column) for column, key in enumerate(PAPERS)}
    return {"rows": rows, "best_block": best, "paper_best_block": papers, "lacking_blocks": [one for one in BLOCKS if one not in blocks]}


def _papers_best(column: int) -> int:
    """The best of all three blocks, whether or not the model has so many."""
    return max(BLOCKS, key=lambda block: PAPER_MAPS[block][column])


def _maps_text(name: str, part: dict[str, Any]) -> list[str]:
    head = ["map", "paper: " + " / ".join(HEADINGS[one] for one in PAPERS), *(HEADINGS[one] for one in PAPERS), "images"]
    body = [
        [row["id"], " / ".join(f"{value:.1f}" for value in row["paper"]) or "-", *(row["text"][one] for one in PAPERS), str(row["images"])]
        for row in part["rows"]
        if row["figures"]
    ]
    out = [f"## Maps on {name}", "", *lines(head, body), ""]
    out += [f"- {row['id']}: no figures; {without_name(row['id'], row['error'])}" for row in part["rows"] if not row["figures"]]
    if part["best_block"]:
        words = [f"{HEADINGS[key]} block {part['best_block'][key]} (the paper: {part['paper_best_block'][key]})" for key in PAPERS]
        out += [f"Best of the blocks, counted from 0: {listed(words)}; {_same(part['best_block'] == part['paper_best_block'])}."]
        out[-1] += _lacking(part["lacking_blocks"])
    return out


def _lacking(blocks: Sequence[int]) -> str:
    return f" This model has no {listed([f'block {block}' for block in blocks])}." if blocks else ""


def _same(same: bool) -> str:
    return "the trend is the same" if same else "the trend is not the same"


# ---- policies -------------------------------------------------------------------------------------------------


def _open_photos(bench: MapsBench, model: ReducedTransformer) -> RawImages:
    """The labelled photos, as many as the limit allows.

    Raises:
        ConfigError: several folders, or a model without a classifier.
        DataError: no labels, or such as the model does not have.
    """
    if len(bench.photos) != 1:
        raise ConfigError(f"--photos: got {len(bench.photos)} names, but table5 wants one folder of labelled photos")
    if model.num_classes < 1:
        raise ConfigError("table5: this model has no classifier, so --photos cannot be classified; leave it out")
    path = Path(bench.photos[0])
    photos = raw_images(open_data(path, "val", model_class_ids(model.backbone)), path)
    photos = photos if bench.limit is None else photos.subset(bench.limit, bench.seed)
    check_labels(photos.data.labels, model.num_classes, str(path))
    return photos


def _policies(
    bench: MapsBench, models: Sequence[ReducedTransformer], photos: RawImages, blocks: Sequence[int]
) -> tuple[dict[str, PolicyRow], list[EvalReport]]:
    """Our models on the photos, then each block's attention with 30 % dropped, as in the paper, and at the cost of ours."""
    bench.open_output()
    for model in models:
        model.configure(skip_unread=False)  # the policies compute all of the last block as well
    ours = [_ours(bench, model, photos) for model in models]
    model, budget = models[0], statistics.mean(one.reduced.macs_share for one in ours)
    task = Policies(model, photos, find_explainer, bench.options(), bench.records)
    size, rows = task.how.size, dict[str, PolicyRow]()
    grid = model.adapter.grid(*size)
    wanted: dict[str, str] = {}
    for stem in (*(f"attention:{block}" for block in blocks), "random"):
        wanted[f"{stem}, 30 % dropped"] = f"{stem}@{paper_count(grid[0] * grid[1])}"
        count = count_for(model.adapter, size, stem, budget)
        label = f"{stem}, at the cost of ours"
        if count is None:
            rows[label] = PolicyRow(label, why=f"asking alone costs more than ours does ({budget:.2f} of dense)")
        else:
            wanted[label] = f"{stem}@{count}"
    names = list(dict.fromkeys(wanted.values()))
    with progress() as bar:
        line = bar.add_task("dropping by attention", total=task.work(names))
        made = dict(zip(names, task.run(names, partial(bar.advance, line)), strict=True))
    return {label: made[name] for label, name in wanted.items()} | rows, ours


def _ours(bench: MapsBench, model: ReducedTransformer, photos: RawImages) -> EvalReport:
    """Our model and the dense one on the photos; remembered by weights, settings and photos."""
    how = eval_preprocess(model)
    key = fingerprint(weights_of(model.state_dict()), model.config.model_dump_json(), how, bench.dtype, photos.names, photos.stamps)
    path = bench.records / f"eval-{key}.json"
    with suppress(ValidationError):  # none, or one of a single photo, whose standard error is no number
        return EvalReport.model_validate(read_json(path))
    batches = make_batches(photos.data, how, bench.batch_size, bench.seed, train=False, workers=bench.workers)
    with precision(next(model.parameters()).device, bench.dtype):
        found = evaluate(model, batches, progress=True)
    write_json(path, found.model_dump(mode="json"))
    return found


def _policies_text(rows: dict[str, PolicyRow], ours: Sequence[EvalReport], photos: int) -> list[str]:
    head = ["policy", "paper: G / top-1 / top-5", "patches at the input", "multiply-adds", "top-1", "against dense", "top-5"]
    dense = ours[0].dense
    body = [["dense", "4.2 / 79.8 / 95.0", "all", "1", cell(dense.top1), "0", cell(dense.top5)], _ours_cells(ours)]
    for label, row in rows.items():
        if row.why is None:
            found = row.figures
            lost = _lost(found["difference"], 1.96 * found["standard_error"])
            shares = [f"{row.kept:.3f}", f"{row.macs_share:.3f}x"]
            body.append([label, _papers_policy(label), *shares, cell(found["top1"]), lost, cell(found["top5"])])
    out = [f"## Policies on {photos} labelled photos", "", *lines(head, body), ""]
    out += [f"- {label}: {without_name(label.partition(',')[0], row.why)}" for label, row in rows.items() if row.why is not None]
    out += ["Nothing is retrained: the dense model meets fewer patches as it is. The paper fine-tunes every row; its G leave out the"]
    out += ["products of attention. Multiply-adds: share of the dense model's, what the map costs included; all rows compute the last"]
    out += ["block in full. Against dense: paired, with its 95 % interval over photos; of several seeds of ours, over seeds (Student's t)."]
    return [*out, "", _verdict(rows, ours)]


def _ours_cells(ours: Sequence[EvalReport]) -> list[str]:
    pair = ours[0].comparison
    half = 1.96 * pair.standard_error
    lost = over_seeds([one.comparison.difference for one in ours], (pair.difference - half, pair.difference + half))
    half = math.nan if lost.interval is None else (lost.interval[1] - lost.interval[0]) / 2
    share, top1, top5 = (statistics.mean(getattr(one.reduced, key) for one in ours) for key in ("macs_share", "top1", "top5"))
    name = "ours" if len(ours) == 1 else f"ours, {len(ours)} seeds"
    paper = " / ".join(f"{value:.1f}" for value in PAPER_OURS[1])
    return [name, paper, "all, dropped group by group", f"{share:.3f}x", cell(top1), _lost(lost.value, half), cell(top5)]


def _lost(difference: float, half: float) -> str:
    """A difference and half of its interval; of one photo there is none."""
    return f"{difference:+.2f}" + (f" ± {half:.2f}" if math.isfinite(half) else "")


def _papers_policy(label: str) -> str:
    """The paper's numbers stand beside what it did: 30 % dropped."""
    stem, _, rest = label.partition(", ")
    block = stem.partition(":")[2]
    return " / ".join(f"{value:.1f}" for value in PAPER_POLICIES[int(block)]) if block and rest.startswith("30") else "-"


def _verdict(rows: dict[str, PolicyRow], ours: Sequence[EvalReport]) -> str:
    """Which blocks' attention is ahead of ours, with 30 % dropped, here and in the paper, and at the cost of ours."""
    own = statistics.mean(one.reduced.top1 for one in ours)
    top1 = {label: row.figures["top1"] for label, row in rows.items() if row.why is None and label.startswith("attention")}
    paper = [block for block, (_, accuracy, _) in PAPER_POLICIES.items() if accuracy > PAPER_OURS[1][1]]
    dropped, matched = (_ahead(top1, kind, own) for kind in ("30 % dropped", "at the cost of ours"))
    words = f"Ahead of ours ({own:.2f} %) with 30 % dropped: {_blocks(dropped)} (the paper: {_blocks(paper)}); {_same(dropped == paper)}."
    lacking = [block for block in BLOCKS if not any(label.startswith(f"attention:{block},") for label in rows)]
    return f"{words} At the cost of ours: {_blocks(matched)}.{_lacking(lacking)}"


def _ahead(top1: dict[str, float], kind: str, own: float) -> list[int]:
    """The blocks whose attention, used in that way, is more accurate than ours."""
    return [int(label.partition(":")[2].partition(",")[0]) for label, value in top1.items() if label.endswith(kind) and value > own]


def _blocks(blocks: Sequence[int]) -> str:
    return listed([f"block {block}" for block in blocks]) if blocks else "none"
