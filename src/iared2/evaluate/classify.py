"""Classification: a reduced model and its dense backbone on the same pictures, batch by batch, in one run."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Int
from rich.console import Console
from rich.progress import track
from torch import Tensor

from iared2 import cost
from iared2.data.arrays import Preprocess
from iared2.data.batches import make_batches
from iared2.data.cluster import Cluster
from iared2.data.labels import check_labels, model_class_ids
from iared2.data.sources import Data, open_data
from iared2.data.streams import StreamedImages
from iared2.errors import ConfigError, DataError
from iared2.evaluate.judge import finite
from iared2.evaluate.machine import describe_machine, synchronise, versions
from iared2.evaluate.report import SCHEMA, EvalReport, Row, SourceRow, check_writable, write_json
from iared2.evaluate.tally import Outcome, Tally
from iared2.model import ReducedTransformer
from iared2.runtime import pick_device, precision
from iared2.saving import load_reduced
from iared2.trace import Trace

logger = logging.getLogger("iared2.evaluate")

WARM_UP = 2  # passes of each model over the first batch before anything is timed


class EvalBatches(Protocol):
    """What `evaluate` reads: batches with `images`, `labels` and `indices`."""

    def steps(self, world: int = 1) -> int: ...

    def epoch(self, epoch: int, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[dict[str, Tensor]]: ...


@dataclass(frozen=True)
class Measured:
    """One batch: what came of it, the numbers of its pictures, and its height and width in pixels."""

    outcome: Outcome
    index_B: Int[Tensor, " B"]
    size: tuple[int, int]


class Clock:
    """Times the two models alternately: whoever went first in one batch goes second in the next."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.turn = device, 0
        self.seconds = {"dense": 0.0, "reduced": 0.0}

    def run(self, passes: dict[str, Callable[[], Any]]) -> dict[str, Any]:
        """Runs both passes and adds up their times; warms up before the first."""
        if self.turn == 0:
            for _ in range(WARM_UP):
                for work in passes.values():
                    work()
        results = {}
        for name in sorted(passes, reverse=self.turn % 2 == 1):
            synchronise(self.device)
            start = time.perf_counter()
            results[name] = passes[name]()
            synchronise(self.device)
            self.seconds[name] += time.perf_counter() - start
        self.turn += 1
        return results


@torch.inference_mode()
def evaluate(model: ReducedTransformer, batches: EvalBatches, sources: Sequence[str] | None = None, progress: bool = False) -> EvalReport:
    """Measures a reduced model beside its dense backbone, on the model's own device; autocast around it decides the precision.

    Args:
        batches: evaluation batches (`train=False`).
        sources: where each picture comes from, by index; gives one more row per source.
        progress: show a bar on a terminal.

    Raises:
        ConfigError: an answer that is not finite.
        DataError: no readable picture, or a label that the model does not have.
    """
    clock = Clock(next(model.parameters()).device)
    return report(model, outcomes(model, batches, clock, progress), clock, sources)


@torch.inference_mode()
def outcomes(model: ReducedTransformer, batches: EvalBatches, clock: Clock, progress: bool = False) -> Iterator[Measured]:
    """Both models on every batch: what came of it, and the numbers of the pictures.

    Raises:
        ConfigError: an answer that is not finite.
        DataError: a label that the model does not have.
    """
    parameter, training = next(model.parameters()), model.training
    model.eval()
    console = Console(stderr=True)
    hidden = not (progress and console.is_terminal)
    for batch in track(batches.epoch(0), "evaluating", total=batches.steps(), console=console, disable=hidden):
        check_labels(batch["labels"], model.num_classes, "data")
        images = batch["images"].to(parameter.device, parameter.dtype)
        size = (images.shape[-2], images.shape[-1])
        found = clock.run({"dense": partial(model.backbone, images), "reduced": partial(model.answer, images)})
        answer = found["reduced"]
        for whose, answers in (("the dense model", found["dense"]), ("the reduced model", answer.logits)):
            finite(answers, whose)
        trace = model.make_trace(answer.state.reductions, size, answer.again_B).cpu()
        yield Measured(_outcome(model, batch["labels"], (found["dense"], answer.logits), trace, size), batch["indices"], size)
    model.train(training)


def report(model: ReducedTransformer, measured: Iterable[Measured], clock: Clock, sources: Sequence[str] | None) -> EvalReport:
    """Adds up what was measured.

    Raises:
        DataError: nothing was.
    """
    tallies: dict[str, Tally] = {}
    size: tuple[int, int] = (0, 0)
    for one in measured:
        size = one.size
        for name, rows in _by_source(sources, one.index_B).items():
            tally = tallies.setdefault(name, Tally(model.num_classes, len(model.reducers)))
            tally.update(one.outcome if rows is None else one.outcome.rows(rows))
    if not tallies:
        raise DataError("there is no readable picture in this data")
    return _report(model, tallies, clock, size)


def _by_source(sources: Sequence[str] | None, indices: Int[Tensor, " B"]) -> dict[str, Int[Tensor, " b"] | None]:
    """Rows of the batch for "all" (None: every row) and for each source."""
    found: dict[str, Int[Tensor, " b"] | None] = {"all": None}
    if sources is not None:
        names = [sources[index] for index in indices.tolist()]
        for name in dict.fromkeys(names):
            found[f"source {name}"] = torch.tensor([row for row, other in enumerate(names) if other == name])
    return found


def _outcome(
    model: ReducedTransformer, labels: Int[Tensor, " B"], logits: tuple[Tensor, Tensor], trace: Trace, size: tuple[int, int]
) -> Outcome:
    pairs = list(zip(trace.keep_GBN.sum(-1).T.tolist(), trace.again, strict=True))
    patches = math.prod(trace.grid)

    @cache
    def linear(kept: tuple[int, ...], again: bool) -> int:
        once = model.macs(size, patches, kept, products=False)
        return once + (model.second_look_macs(size, patches, products=False) if again else 0)

    dense_linear = cost.dense_macs(model.adapter, *size, products=False)
    return Outcome(
        labels=labels,
        dense=logits[0].float().cpu(),
        reduced=logits[1].float().cpu(),
        keep_ratio=trace.keep_ratio,
        share=torch.tensor([macs / trace.dense_macs for macs in trace.macs], dtype=torch.float64),
        linear_share=torch.tensor([linear(tuple(kept), again) / dense_linear for kept, again in pairs], dtype=torch.float64),
        again=torch.tensor(trace.again, dtype=torch.float64),
    )


def _report(model: ReducedTransformer, tallies: dict[str, Tally], clock: Clock, size: tuple[int, int]) -> EvalReport:
    tally = tallies["all"]
    macs, linear = cost.dense_macs(model.adapter, *size), cost.dense_macs(model.adapter, *size, products=False)
    dense = Row(
        name="dense",
        top1=tally.percent("dense_top1"),
        top5=tally.percent("dense_top5"),
        agreement=100.0,
        kl=0.0,
        macs=macs,
        macs_share=1.0,
        macs_linear=linear,
        keep_ratio=(1.0,) * len(model.reducers),
        images_per_second=tally.count / clock.seconds["dense"],
    )
    share = tally.mean("share")
    reduced = Row(
        name="reduced",
        top1=tally.percent("reduced_top1"),
        top5=tally.percent("reduced_top5"),
        agreement=tally.percent("agreement"),
        kl=tally.mean("kl"),
        macs=round(share * macs),
        macs_share=share,
        macs_linear=round(tally.mean("linear_share") * linear),
        keep_ratio=tally.keep_ratio(),
        images_per_second=tally.count / clock.seconds["reduced"],
        looked_again=100 * tally.mean("again"),
    )
    parts = [_source_row(name.removeprefix("source "), part) for name, part in sorted(tallies.items()) if name != "all"]
    return EvalReport(images=tally.count, rows=(dense, reduced), comparison=_source_row("all", tally), sources=tuple(parts))


def _source_row(name: str, tally: Tally) -> SourceRow:
    names = ("dense_top1", "reduced_top1", "dense_top5", "reduced_top5", "agreement")
    difference, error = tally.difference()
    figures = {name: tally.percent(name) for name in names}
    return SourceRow(source=name, images=tally.count, difference=difference, standard_error=error, **figures)


def eval_preprocess(model: ReducedTransformer) -> Preprocess:
    """Resize and centre crop as timm's data configuration says, at the size the backbone was built for."""
    return Preprocess.of(model.backbone)


def run_eval(  # noqa: PLR0913 - the command's options
    model: str,
    data: Path,
    *,
    weights: Path | None = None,
    threshold: float | None = None,
    on_drop: str | None = None,
    json_file: Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int = 32,
    workers: int = 0,
    seed: int = 0,
    limit: int | None = None,
    cluster: Cluster | None = None,
) -> int:
    """`iared2 eval`: prints a table and writes the JSON file. Returns 1 if pictures were broken, else 0.

    Raises:
        IARED2Error: whatever stands in the way, in one line.
    """
    if batch_size < 1 or (limit is not None and limit < 1):
        raise ConfigError(f"batch size and limit must be at least 1; got {batch_size} and {limit}")
    if json_file is not None:
        check_writable(json_file)
    place = pick_device(device)
    context = precision(place, dtype)
    open_model = partial(_open_model, model, weights, place, threshold, on_drop)
    open_pictures = partial(_pictures, data=data.absolute() if data.exists() else data, limit=limit, seed=seed)
    reduced = open_model()
    pictures = open_pictures(reduced)
    if cluster is None:
        batches = make_batches(pictures, eval_preprocess(reduced), batch_size, seed, train=False, workers=workers)
        with context:
            found = evaluate(reduced, batches, getattr(pictures, "sources", None), progress=True)
    else:
        from iared2.evaluate.sharded import EvalShards, evaluate_sharded

        job = EvalShards(open_model, open_pictures, batch_size, workers, dtype)
        records = None if json_file is None else json_file.with_name(json_file.name + ".shards")
        found = evaluate_sharded(reduced, pictures, job, records, cluster)
    Console().print(found.markdown(), markup=False, highlight=False, soft_wrap=True)
    skipped: dict[str, str] = getattr(pictures, "skipped", {})
    if skipped:
        logger.warning("%d broken pictures were skipped: %s", len(skipped), ", ".join(skipped))
    if json_file is not None:
        settings = {
            "weights": None if weights is None else str(weights),
            "device": str(place),
            "dtype": "float32" if dtype == "auto" else dtype,
            "batch_size": batch_size,
            "workers": workers,
            "limit": limit,
        }
        about = {"schema_version": SCHEMA, "model": model, "data": str(data), "seed": seed, "settings": settings | _choices(reduced)}
        about |= {"versions": versions(), "machine": describe_machine(place), "skipped": skipped}
        write_json(json_file, about | found.model_dump(mode="json"))
    return 1 if skipped else 0


def _choices(model: ReducedTransformer) -> dict[str, Any]:
    """What decides the figures beside the weights."""
    how = eval_preprocess(model)
    seen = {name: getattr(how, name) for name in ("size", "mean", "std", "crop_pct", "crop_mode", "interpolation")}
    thresholds = model.config.model_dump(mode="json")["thresholds"] or [0.5]
    threshold = thresholds[0] if len(set(thresholds)) == 1 else thresholds
    config = model.config
    return {"threshold": threshold, "rule": config.rule, "on_drop": config.on_drop, "second_look": config.second_look, "preprocess": seen}


def _open_model(name: str, weights: Path | None, place: torch.device, threshold: float | None, on_drop: str | None) -> ReducedTransformer:
    return _prepare(load_reduced(name, weights=weights, device=place), threshold, on_drop)


def _prepare(model: ReducedTransformer, threshold: float | None, on_drop: str | None) -> ReducedTransformer:
    if model.num_classes < 1:
        raise ConfigError("this model has no classifier, so there is nothing to evaluate; load one with classes")
    if threshold is not None:
        model.threshold = threshold
    if on_drop is not None:
        model.configure(on_drop=on_drop)
    return model


def _pictures(model: ReducedTransformer, data: Path, limit: int | None, seed: int) -> Data:
    pictures = open_data(data, "val", model_class_ids(model.backbone))
    if not len(pictures):
        raise DataError(f"{data}: there are no pictures in it")
    if not isinstance(pictures, StreamedImages):  # a stream's labels are checked as they come
        check_labels(pictures.labels, model.num_classes, str(data))
    return pictures if limit is None else pictures.subset(limit, seed)
