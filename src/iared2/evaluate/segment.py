"""Any methods on any model against masks, in shards that are recorded; `iared2.evaluate.shards` says how.

This module knows no method. It takes a function that finds explainers by name, and hands their maps to `iared2.evaluate.map_scores`.
"""

import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from iared2.data.arrays import normalise
from iared2.data.masks import MaskedBatch, MaskedImages
from iared2.errors import DataError
from iared2.evaluate.map_scores import FIGURES, MapScores, rank_normalise, score_maps
from iared2.evaluate.shards import (
    FORWARDS,
    Explainer,
    Find,
    MethodRow,
    Shard,
    ShardedMethods,
    check_class,
    mean_forwards,
    plain_by_name,
    plain_pairs,
    timed,
)
from iared2.model import ReducedTransformer


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
class MapRow(MethodRow):
    """One method's figures in percent, of its maps as they are and of their ranks; or why there are none.

    Attributes:
        raw, rank: by the names in `FIGURES`.
        raw_intervals, rank_intervals: 95 % intervals of the same.
    """

    raw: dict[str, float] = field(default_factory=dict)
    rank: dict[str, float] = field(default_factory=dict)
    raw_intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    rank_intervals: dict[str, tuple[float, float]] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """For JSON: the raw maps' figures beside the method's name, those of ranks under `rank`; no number is null."""
        return {
            "method": self.method,
            **plain_by_name(self.raw, FIGURES),
            **self.spent(),
            "intervals": plain_pairs(self.raw_intervals, FIGURES),
            "rank": {**plain_by_name(self.rank, FIGURES), "intervals": plain_pairs(self.rank_intervals, FIGURES)},
        }


class Segmentation(ShardedMethods[MaskedImages, MaskedBatch, MapRow]):
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
        self.options = options or SegmentOptions()
        super().__init__(model, data, find, self.options, records)
        check_class(self.options.target, model.num_classes)
        if not len(data):
            raise DataError("segmentation: there are no pictures")
        data.require_foreground(self.how.size)

    def deciding(self) -> tuple[Any, ...]:
        return (self.options.target,)

    def read(self, data: MaskedImages, rows: range) -> MaskedBatch | None:
        return data.batch(rows, self.how.size, self.options.workers)

    def score(self, name: str, batch: MaskedBatch, seed: int) -> tuple[dict[str, list[Any]], float]:
        parameter = next(self.model.parameters())
        images = normalise(batch.pixels_BHW3, self.how.mean, self.how.std).to(parameter.device, parameter.dtype)
        target = self.options.target
        target_B = None if target is None else torch.full((len(images),), target, device=parameter.device)
        explainer = self.find(name, self.model, seed)
        map_Bhw, seconds = timed(explainer, images, target_B)
        map_Bhw = map_Bhw.cpu()
        both = [score_maps(maps, batch.mask_BHW, batch.ignore_BHW) for maps in (map_Bhw, rank_normalise(map_Bhw))]
        found = {"raw": both[0].value_N7.tolist(), "rank": both[1].value_N7.tolist()}
        return found | {FORWARDS: [explainer.forwards] * len(map_Bhw)}, seconds

    def row(self, explainer: Explainer, name: str, shards: list[Shard]) -> MapRow:
        raw, rank = (
            MapScores(torch.tensor([row for shard in shards for row in shard.found[which]], dtype=torch.float64))
            for which in ("raw", "rank")
        )
        return MapRow(
            method=name,
            images=len(raw),
            raw=raw.figures(),
            rank=rank.figures(),
            raw_intervals=raw.intervals(self.options.seed),
            rank_intervals=rank.intervals(self.options.seed),
            forwards=mean_forwards(explainer, shards),
            milliseconds=statistics.median(1000 * shard.seconds / len(shard.found["raw"]) for shard in shards),
            slow=explainer.slow,
        )

    def no_row(self, name: str, slow: bool, why: str) -> MapRow:
        return MapRow(name, slow=slow, why=why)
