"""Maps as policies (the paper's Table 5): a map says which patches are dropped right behind the position embedding, nothing is retrained.

A policy is named MAP@COUNT, such as attention:1@137: the `COUNT` patches highest in that map enter block 0. What the map costs is counted:
the raw attention of block b asks for b whole blocks on all patches, and for the keys and the class token's query of the next.
"""

import math
import statistics
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from iared2 import cost
from iared2.backbones.base import BackboneAdapter
from iared2.data.labels import check_labels
from iared2.data.raw import RawBatch, RawImages
from iared2.errors import ConfigError
from iared2.evaluate.judge import Judge
from iared2.evaluate.removal import on_grid
from iared2.evaluate.segment import SegmentOptions
from iared2.evaluate.shards import Explainer, Find, Shard, ShardedMethods, timed
from iared2.keep import share_of
from iared2.model import ReducedTransformer


@dataclass(frozen=True)
class PolicyRow:
    """One policy's figures, or why there are none.

    Attributes:
        figures: top1, top5, dense_top1, dense_top5 in percent; difference to the dense model in points, paired, and its standard error.
        kept: share of the patches that enters block 0.
        macs_share: multiply-adds, the map's included, as a share of the dense model's.
    """

    method: str
    images: int = 0
    figures: dict[str, float] = field(default_factory=dict)
    kept: float = 1.0
    macs_share: float = 1.0
    why: str | None = None


def paper_count(places: int) -> int:
    """Patches left where the paper's baselines drop 30 %."""
    return share_of(0.7, places)


def count_for(adapter: BackboneAdapter, size: tuple[int, int], stem: str, budget: float) -> int | None:
    """How many patches may enter block 0 so that map and rest cost at most `budget` of the dense model; None if not even one may."""
    rows, columns = adapter.grid(*size)
    fitting = [count for count in range(1, rows * columns + 1) if policy_share(adapter, size, stem, count) <= budget]
    return max(fitting, default=None)


def policy_share(adapter: BackboneAdapter, size: tuple[int, int], stem: str, count: int) -> float:
    """Multiply-adds of a map and of a pass with `count` patches, as a share of the dense model's."""
    rest = cost.reduced_macs(adapter, {}, size, count, [])
    return (asking_macs(adapter, size, stem) + rest) / cost.dense_macs(adapter, *size)


def asking_macs(adapter: BackboneAdapter, size: tuple[int, int], stem: str) -> int:
    """Multiply-adds of a map beyond the embedding, which the pass that follows shares.

    Raises:
        ConfigError: a map whose cost is not known here.
    """
    name, _, block = stem.partition(":")
    if name == "random":
        return 0
    if name != "attention" or not block.isdecimal():
        raise ConfigError(f"policy: got {stem!r}, wanted random or attention:BLOCK")
    tokens, width = adapter.prefix + math.prod(adapter.grid(*size)), adapter.width
    before = sum(adapter.block_cost(one).macs(tokens) for one in range(int(block)))
    return before + (tokens + 1) * width * width + tokens * width  # keys and one query, and their products


class Policies(ShardedMethods[RawImages, RawBatch, PolicyRow]):
    """Policies on one model's backbone and one set of labelled pictures.

    Args:
        find: gives an explainer by the part of a policy's name before the @.
        records: folder for finished shards; None keeps them for as long as this object lives.

    Raises:
        ConfigError: a model without a classifier.
        DataError: labels that its head does not have.
    """

    def __init__(
        self, model: ReducedTransformer, data: RawImages, find: Find, options: SegmentOptions | None = None, records: Path | None = None
    ) -> None:
        self.options = options or SegmentOptions()
        super().__init__(model, data, partial(_map_of, find), self.options, records)
        self.judge = Judge(model, self.how.mean, self.how.std)
        check_labels(data.data.labels, model.num_classes, "data")

    def deciding(self) -> tuple[Any, ...]:
        return ("policies",)

    def read(self, data: RawImages, rows: range) -> RawBatch | None:
        return data.batch(rows, self.how, self.options.workers)

    def score(self, name: str, batch: RawBatch, seed: int) -> tuple[dict[str, list[Any]], float]:
        images = batch.image_BCHW.to(next(self.model.parameters()).device)
        map_Bhw, seconds = timed(self.find(name, self.model, seed), self.judge.normalised(images), None)
        value_BN = on_grid(map_Bhw, self.judge.grid(images)).flatten(1)
        chosen_BK = value_BN.topk(_count_of(name), dim=1).indices
        keep_BN = torch.zeros_like(value_BN, dtype=torch.bool).scatter_(1, chosen_BK, True)
        found = dict[str, list[Any]]()
        for which, logits in (("", self.judge.without(images, keep_BN)), ("dense_", self.judge(images))):
            hit_BK = _hits(logits.cpu(), batch.label_B)
            found |= {f"{which}top1": hit_BK[:, 0].tolist(), f"{which}top5": hit_BK.any(1).double().tolist()}
        return found, seconds

    def row(self, explainer: Explainer, name: str, shards: list[Shard]) -> PolicyRow:
        del explainer
        each = {key: [one for shard in shards for one in shard.found[key]] for key in shards[0].found}
        figures = {key: 100 * statistics.mean(values) for key, values in each.items()}
        lost = [100 * (mine - dense) for mine, dense in zip(each["top1"], each["dense_top1"], strict=True)]
        figures["difference"] = statistics.mean(lost)
        figures["standard_error"] = statistics.stdev(lost) / math.sqrt(len(lost)) if len(lost) > 1 else math.nan
        size, count = self.how.size, _count_of(name)
        share = policy_share(self.model.adapter, size, name.partition("@")[0], count)
        return PolicyRow(name, len(lost), figures, count / math.prod(self.model.adapter.grid(*size)), share)

    def no_row(self, name: str, slow: bool, why: str) -> PolicyRow:
        del slow
        return PolicyRow(name, why=why)


def _hits(logits: Float[Tensor, "B classes"], label_B: Tensor) -> Float[Tensor, "B K"]:
    """For each of the five likeliest classes, best first, whether it is the label."""
    return (logits.topk(min(5, logits.shape[1]), dim=1).indices == label_B[:, None]).double()


def _map_of(find: Find, name: str, model: ReducedTransformer, seed: int) -> Explainer:
    return find(name.partition("@")[0], model, seed)


def _count_of(name: str) -> int:
    return int(name.partition("@")[2])
