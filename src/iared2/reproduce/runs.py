"""One configuration and one seed: trained once, measured once, remembered in OUT/runs."""

import hashlib
import json
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from iared2 import cost
from iared2.data.batches import make_batches
from iared2.errors import ConfigError, DataError
from iared2.evaluate.boxes import inside
from iared2.evaluate.calibrate import FAR, Calibrator
from iared2.model import ReducedTransformer, reduce
from iared2.output import open_folder, write
from iared2.reducers.baselines import RandomReducer, with_reducers
from iared2.reproduce.bench import Bench, Start
from iared2.runtime import from_main, pick_device, precision
from iared2.saving import load_reduced
from iared2.tokens.grid import to_pixels
from iared2.train.recipes import Recipe
from iared2.train.run import RunOptions, build_backbone, open_accelerator, run_settings, train
from iared2.train.tasks import BlocksTask
from iared2.train.trainer import Stage, Trainer

logger = logging.getLogger("iared2.reproduce")

Row = dict[str, Any]
CALIBRATED_ON = 256  # training pictures on which thresholds for a budget are chosen


@dataclass(frozen=True)
class Configuration:
    """What is trained, and where its thresholds lie when it is measured.

    Attributes:
        name: for people.
        changes: fields of the recipe, by dotted path.
        kind: the curriculum; the dense model as it is; random dropping at the input with fine-tuning as long (Tables 2 and 6).
        threshold: one for all groups, in place of 0.5, without training again.
        budget: share of the dense multiply-adds that thresholds are chosen for, after training.
        base: DeiT-B at the paper's scale.
        start: at the small scale, whether interpreters imitate before REINFORCE, or start from random weights as in the paper.
    """

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    kind: Literal["curriculum", "dense", "random"] = "curriculum"
    threshold: float | None = None
    budget: float | None = None
    base: bool = False
    start: Start = "imitation"

    def at(self, threshold: float) -> "Configuration":
        """The same model at another threshold."""
        return replace(self, name=f"threshold {threshold:g}", threshold=threshold)


def figures(bench: Bench, what: Configuration, seed: int) -> Row:
    """The figures of one run; trained and measured only if OUT/runs does not know them yet.

    Several processes train together; the main one measures, and tells the others.

    Returns:
        top1 (percent), correct (one digit per picture), macs_share, keep_ratio (per group), inside and outside_in (percent of the
        second group's map, and of its reverse, within boxes; None where there are none), seconds, train_seconds (of these; None if the
        model was there already), and what was run. After a training that was killed, times are those of what was left.
    """
    recipe = bench.recipe(what.changes, seed, what.base, what.start)
    folder = bench.output / "runs" / f"{what.kind}-{digest(recipe, bench.start_hash)}-{seed}"
    path = folder / f"figures-{digest(what.threshold, what.budget, bench.val_images)}.json"
    open_accelerator(bench.device, recipe.precision)  # from here on processes know one another
    known = from_main(partial(read_json, path))
    if known is not None:
        return {**known, "name": what.name}
    start = time.perf_counter()
    there = what.kind == "dense" or from_main((folder / "model" / "config.json").is_file)
    model = _model(bench, what, recipe, folder)
    train_seconds = None if there else round(time.perf_counter() - start, 1)
    validation = bench.pictures[1]

    def measured() -> Row:
        with precision(pick_device(bench.device), "bfloat16" if recipe.precision == "bf16" else "float32"):
            met = what.budget is None or _meet(model, bench, recipe, what.budget)
            found = measure(model, bench.held_out(recipe, model.backbone), validation)
        row: Row = {"name": what.name, "seed": seed, **found, "budget_met": met}
        row |= {"seconds": round(time.perf_counter() - start, 1), "train_seconds": train_seconds}
        row |= {"changes": dict(what.changes), "kind": what.kind, "threshold": what.threshold, "budget": what.budget, "start": what.start}
        write_json(path, row)
        return row

    row = from_main(measured)
    spent = f"{row['seconds']:.0f} s" if train_seconds is None else f"{row['seconds']:.0f} s, {train_seconds:.0f} of them to train"
    logger.info("%s, seed %d: top-1 %.2f %% at %.3fx of the multiply-adds, %s", what.name, seed, row["top1"], row["macs_share"], spent)
    return row


def _model(bench: Bench, what: Configuration, recipe: Recipe, folder: Path) -> ReducedTransformer:
    """The model to measure, trained as far as it was not."""
    device = pick_device(bench.device)
    if what.kind == "dense":
        model = reduce(build_backbone(recipe), (0,)).to(device)
        model.threshold = -1
        return model
    if what.kind == "random":
        return _random(bench, recipe, folder)
    if not from_main((folder / "model" / "config.json").is_file):
        train(recipe, RunOptions(folder, bench.device, bench.workers), bench.feeds(recipe, build_backbone(recipe)))
    # Blocks that were not trained are not saved: then the weights are where they were.
    weights = None if (folder / "model" / "backbone.safetensors").is_file() else recipe.backbone.weights
    model = load_reduced(folder / "model", weights=weights, device=device)
    if what.threshold is not None:
        model.threshold = what.threshold
    return model


def _random(bench: Bench, recipe: Recipe, folder: Path) -> ReducedTransformer:
    """30 % of the patches dropped at random at the input, blocks fine-tuned for as many epochs as the curriculum's."""
    settings = recipe.reduction
    if settings is None:
        raise ConfigError("the random baseline is fine-tuned as a reduction's blocks are; this recipe has none")
    backbone = build_backbone(recipe)
    dense = build_backbone(recipe).eval().requires_grad_(False) if settings.block_target == "dense" else None
    accelerator = open_accelerator(bench.device, recipe.precision)
    model = reduce(backbone, (0,))
    with_reducers(model, [RandomReducer(0.7, seed=recipe.seed)])
    model = model.to(accelerator.device)
    groups = settings.groups if isinstance(settings.groups, int) else len(settings.groups)
    task = BlocksTask(model, 0, settings.train_head, None if dense is None else dense.to(accelerator.device))
    stage = Stage("random", task, bench.feeds(recipe, backbone).train, groups * settings.block_epochs, settings.block_optim)
    Trainer(model, run_settings(recipe, folder), accelerator).fit([stage])
    return model.eval()


def _meet(model: ReducedTransformer, bench: Bench, recipe: Recipe, budget: float) -> bool:
    """Chooses thresholds for a budget on training pictures; False where the reductions of this model cannot get near it."""
    chosen = bench.pictures[0].subset(CALIBRATED_ON, 0)
    batches = make_batches(chosen, bench.how(recipe, model.backbone), CALIBRATED_ON, 0, train=False, workers=bench.workers)
    images = next(iter(batches.epoch(0)))["images"].to(next(model.parameters()).device)
    calibrator = Calibrator(model, [images])
    try:
        return abs(calibrator.to_share(budget).share - budget) <= FAR
    except ConfigError as error:
        logger.warning("%s", error)
        return False


@torch.inference_mode()
def measure(model: ReducedTransformer, batches: Any, data: Any) -> Row:
    """Top-1, cost, what is kept, and how much of the second group's map (or of its reverse) lies within ground-truth boxes."""
    model.eval()
    device, boxes = next(model.parameters()).device, getattr(data, "boxes", None)
    correct: list[int] = []
    macs, kept, shares = 0.0, torch.zeros(len(model.reducers), dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    dense = 0
    for batch in batches.epoch(0):
        images = batch["images"].to(device)
        logits, trace = model.trace(images)
        correct += (logits.argmax(1).cpu() == batch["labels"]).int().tolist()
        dense = cost.dense_macs(model.adapter, images.shape[-2], images.shape[-1])
        macs += sum(trace.macs)
        kept += trace.keep_ratio.sum(0).cpu().double()
        if boxes is not None:
            maps = to_pixels(trace.cpu().heatmap(min(1, trace.groups - 1)).float(), tuple(data.pixels.shape[1:3]))
            box_B4 = boxes[batch["indices"]]
            shares += torch.stack([inside(m, box_B4).double().sum() for m in (maps, 1 - maps, torch.ones_like(maps))])
    if not correct:
        raise DataError("there is no readable validation picture")
    count = len(correct)
    row: Row = {"top1": 100 * sum(correct) / count, "correct": "".join(map(str, correct)), "macs_share": macs / count / dense}
    row |= {"keep_ratio": [round(value / count, 4) for value in kept.tolist()], "pictures": count}
    names = ("inside", "reverse_inside", "uniform_inside")
    return row | {name: None if boxes is None else 100 * value / count for name, value in zip(names, shares.tolist(), strict=True)}


def digest(*parts: Any) -> str:
    """Ten digits that name settings; a recipe counts without what does not change its result."""
    quiet = {"log_every", "checkpoint_every"}
    text = "|".join(part.model_dump_json(exclude=quiet) if isinstance(part, Recipe) else repr(part) for part in parts)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def read_json(path: Path) -> Any:
    """A JSON file's content, or None where there is none that can be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def write_json(path: Path, value: Any) -> None:
    """A JSON file; what is not a number is null.

    Raises:
        OutputError: it cannot be written.
    """
    write(open_folder(path.parent) / path.name, json.dumps(_plain(value), indent=1, allow_nan=False).encode() + b"\n")


def _plain(value: Any) -> Any:
    """The same with None in place of NaN and infinity, which JSON has no words for."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
