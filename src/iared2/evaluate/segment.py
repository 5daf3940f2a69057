"""Any methods on any model against masks, shard by shard: finished shards are recorded, and not done again.

This module knows no method. It takes a function that finds explainers by name, and hands their maps to `iared2.evaluate.map_scores`.
"""

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from iared2 import __version__
from iared2.data.arrays import normalise
from iared2.data.cluster import fingerprint, shards_of, weights_of
from iared2.data.images import first_reason, note_broken, reason
from iared2.data.masks import MaskedBatch, MaskedImages
from iared2.data.views import seeded
from iared2.errors import ConfigError, DataError, IARED2Error
from iared2.evaluate.classify import eval_preprocess
from iared2.evaluate.machine import synchronise
from iared2.evaluate.map_scores import FIGURES, MapScores, rank_normalise, score_maps
from iared2.model import ReducedTransformer
from iared2.runtime import precision
from iared2.seeds import derive_seed


class Explainer(Protocol):
    """What makes maps: images (B, 3, H, W) and the classes to explain (None: those that the model names) -> maps (B, h, w).

    Attributes:
        forwards: cost of a map in forward passes of the model.
        slow: whether it costs so much that a subset of the images must do.
    """

    name: str
    forwards: float
    slow: bool

    def __call__(self, images: Tensor, target: Tensor | None = None, /) -> Tensor: ...


Find = Callable[[str, ReducedTransformer, int], Explainer]  # name, model, seed


@dataclass(frozen=True)
class SegmentOptions:
    """How to run.

    Attributes:
        batch_size: images per call of a method, and per shard: what is lost at most when a run is killed.
        workers: threads that decode.
        seed: of what methods draw, of subsets, and of intervals.
        target: the class to explain; None: the one that the model names for each image.
        dtype: precision of matrix products.
        slow_limit: images for methods that are slow.
    """

    batch_size: int = 16
    workers: int = 0
    seed: int = 0
    target: int | None = None
    dtype: str = "float32"
    slow_limit: int = 100


@dataclass(frozen=True)
class MapRow:
    """One method's figures in percent, of its maps as they are and of their ranks; or why there are none.

    Attributes:
        raw, rank: by the names in `FIGURES`.
        raw_intervals, rank_intervals: 95 % intervals of the same.
        forwards: cost of a map in forward passes.
        milliseconds: per image, median over shards; None without figures.
        why: one line that says why there are no figures.
    """

    method: str
    images: int = 0
    raw: dict[str, float] = field(default_factory=dict)
    rank: dict[str, float] = field(default_factory=dict)
    raw_intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    rank_intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    forwards: float | None = None
    milliseconds: float | None = None
    slow: bool = False
    why: str | None = None

    def record(self) -> dict[str, Any]:
        """For JSON: the raw maps' figures beside the method's name, those of ranks under `rank`; no number is null."""
        return {
            "method": self.method,
            **_plain(self.raw),
            "forwards": self.forwards,
            "milliseconds": None if self.milliseconds is None else round(self.milliseconds, 3),
            "images": self.images,
            "slow": self.slow,
            "error": self.why,
            "intervals": _plain_pairs(self.raw_intervals),
            "rank": {**_plain(self.rank), "intervals": _plain_pairs(self.rank_intervals)},
        }


def _number(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None


def _plain(figures: dict[str, float]) -> dict[str, float | None]:
    return {name: _number(figures[name]) if name in figures else None for name in FIGURES}


def _plain_pairs(pairs: dict[str, tuple[float, float]]) -> dict[str, list[float | None] | None]:
    return {name: [_number(end) for end in pairs[name]] if name in pairs else None for name in FIGURES}


@dataclass(frozen=True)
class Shard:
    """What one method did on one shard."""

    raw: list[list[float]]
    rank: list[list[float]]
    seconds: float
    skipped: dict[str, str]


class Records:
    """Finished shards, in a folder or, without one, for as long as the process lives."""

    def __init__(self, folder: Path | None) -> None:
        self.folder, self.kept = folder, dict[tuple[str, int], Shard]()

    def get(self, key: str, number: int) -> Shard | None:
        """What is recorded, or None; a damaged record counts as none."""
        if (key, number) not in self.kept and self.folder is not None:
            try:
                self.kept[key, number] = Shard(**json.loads(self._path(key, number).read_text()))
            except (OSError, ValueError, TypeError):
                return None
        return self.kept.get((key, number))

    def put(self, key: str, number: int, shard: Shard) -> None:
        """Records a shard in one move.

        Raises:
            DataError: it cannot be written.
        """
        self.kept[key, number] = shard
        if self.folder is None:
            return
        path = self._path(key, number)
        part = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(asdict(shard)))
            part.replace(path)
        except OSError as error:
            raise DataError(f"{path}: cannot keep finished shards ({error.strerror or error}); choose another output") from None

    def _path(self, key: str, number: int) -> Path:
        assert self.folder is not None  # noqa: S101 - both callers have looked
        return self.folder / key / f"{number:06d}.json"


class Segmentation:
    """Methods on one model and one set of pictures with masks.

    Args:
        find: gives an explainer by name, or raises ConfigError where this model cannot have it.
        records: folder for finished shards; None keeps them for as long as this object lives.

    Raises:
        ConfigError: a class to explain that the model's head does not have.
        DataError: no pictures, or masks without a single object.
    """

    def __init__(
        self, model: ReducedTransformer, data: MaskedImages, find: Find, options: SegmentOptions | None = None, records: Path | None = None
    ) -> None:
        self.model, self.data, self.find, self.options = model.eval(), data, find, options or SegmentOptions()
        self.how, self.records, self.skipped = eval_preprocess(model), Records(records), dict[str, str]()
        self.facts = (__version__, weights_of(model.state_dict()), model.config.model_dump_json(), self.how)
        _check_target(self.options.target, model.num_classes)
        if not len(data):
            raise DataError("segmentation: there are no pictures")
        data.require_foreground(self.how.size)

    def run(self, methods: Sequence[str], advance: Callable[[int], object] | None = None) -> list[MapRow]:
        """A row for each method, in order. What was recorded before is not done again.

        Args:
            advance: told of images that are done with, method by method; `work` says how many there will be.

        Raises:
            DataError: no picture can be read.
        """
        advance = advance or (lambda _: None)
        rows: dict[str, MapRow] = {}
        found: dict[str, Explainer] = {}
        for name in methods:
            try:
                found[name] = self.find(name, self.model, self.options.seed)
            except (IARED2Error, RuntimeError) as error:
                rows[name] = MapRow(name, why=_why(error))
                advance(len(self.data))
        for slow, data in ((False, self.data), (True, self.data.subset(self.options.slow_limit, self.options.seed))):
            part = {name: explainer for name, explainer in found.items() if explainer.slow is slow}
            shards, failed = self._walk(part, data, advance)
            for name, explainer in part.items():
                why = failed.get(name)
                rows[name] = MapRow(name, slow=slow, why=why) if why is not None else self._row(explainer, name, shards[name])
        return [rows[name] for name in methods]

    def work(self, methods: Sequence[str]) -> int:
        """At most how many images `run` tells of."""
        return len(methods) * len(self.data)

    def _walk(
        self, explainers: dict[str, Explainer], data: MaskedImages, advance: Callable[[int], object]
    ) -> tuple[dict[str, list[Shard]], dict[str, str]]:
        """All methods on a shard, then the next shard, so that pictures are decoded once. Gives shards and reasons by method."""
        shards: dict[str, list[Shard]] = {name: [] for name in explainers}
        failed: dict[str, str] = {}
        keys = {name: self._key(name, data) for name in explainers}
        for number, rows in enumerate(shards_of(len(data), self.options.batch_size)):
            batch, decoded = None, False
            for name in explainers:
                shard = None if name in failed else self.records.get(keys[name], number)
                if shard is None and name not in failed:
                    if not decoded:
                        batch, decoded = data.batch(rows, self.how.size, self.options.workers), True
                    try:
                        shard = self._explain(name, batch, (data, rows, number))
                    except (IARED2Error, RuntimeError) as error:
                        failed[name] = _why(error)
                    else:
                        self.records.put(keys[name], number, shard)
                if shard is not None:
                    shards[name].append(shard)
                advance(len(rows))
        return shards, failed

    def _key(self, name: str, data: MaskedImages) -> str:
        options = self.options
        how = (options.batch_size, options.seed, options.target, options.dtype)
        return f"{''.join(c if c.isalnum() else '_' for c in name)}-{fingerprint(name, self.facts, how, data.names, data.stamps)}"

    def _explain(self, name: str, batch: MaskedBatch | None, where: tuple[MaskedImages, range, int]) -> Shard:
        """One method on one shard; what it draws depends on the shard alone, so that a run that goes on is the undisturbed one."""
        data, rows, number = where
        names = {data.names[row] for row in rows}
        skipped = {picture: why for picture, why in data.skipped.items() if picture in names}
        if batch is None:
            return Shard([], [], 0.0, skipped)
        parameter, options = next(self.model.parameters()), self.options
        images = normalise(batch.pixels_BHW3, self.how.mean, self.how.std).to(parameter.device, parameter.dtype)
        target = None if options.target is None else torch.full((len(images),), options.target, device=parameter.device)
        seed = derive_seed(options.seed, number) % 2**31
        with seeded(seed), precision(parameter.device, options.dtype):
            explainer = self.find(name, self.model, seed)
            synchronise(parameter.device)
            start = time.perf_counter()
            map_Bhw = explainer(images, target)
            synchronise(parameter.device)
            seconds = time.perf_counter() - start
        map_Bhw = map_Bhw.detach().float().cpu()
        both = [score_maps(maps, batch.mask_BHW, batch.ignore_BHW) for maps in (map_Bhw, rank_normalise(map_Bhw))]
        return Shard(both[0].value_N7.tolist(), both[1].value_N7.tolist(), seconds, skipped)

    def _row(self, explainer: Explainer, name: str, shards: Iterable[Shard]) -> MapRow:
        shards = list(shards)
        for shard in shards:
            for picture, why in shard.skipped.items():
                note_broken(self.skipped, picture, why)
        full = [shard for shard in shards if shard.raw]
        if not full:
            raise DataError(f"none of the {len(self.data)} pictures can be read; the first: {first_reason(self.skipped)}")
        raw, rank = (
            MapScores(torch.tensor([row for shard in full for row in getattr(shard, which)], dtype=torch.float64))
            for which in ("raw", "rank")
        )
        return MapRow(
            method=name,
            images=len(raw),
            raw=raw.figures(),
            rank=rank.figures(),
            raw_intervals=raw.intervals(self.options.seed),
            rank_intervals=rank.intervals(self.options.seed),
            forwards=float(explainer.forwards),
            milliseconds=statistics.median(1000 * shard.seconds / len(shard.raw) for shard in full),
            slow=explainer.slow,
        )


def _check_target(target: int | None, classes: int) -> None:
    if target is None:
        return
    if classes < 1:
        raise ConfigError(f"--target: got {target}, but this model has no classifier; leave it out")
    if not 0 <= target < classes:
        raise ConfigError(f"--target: got class {target}, outside the model's {classes} classes; wanted 0 to {classes - 1}")


def _why(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "a batch does not fit into the device's memory; use a smaller --batch-size"
    return reason(error)
