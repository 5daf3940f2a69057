"""Keep rules: from scores to the rows that go on. Prefix tokens always go on."""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from iared2.errors import ConfigError
from iared2.seeds import uniform_per_image
from iared2.tokens.packed import Layout, Selection, select, select_places


@runtime_checkable
class KeepRule(Protocol):
    """Scores (T,) and a layout -> the selection. Scores of prefix rows carry no meaning."""

    def __call__(self, score_T: Float[Tensor, " T"], layout: Layout) -> Selection: ...


@dataclass(frozen=True)
class Threshold:
    """Keep a patch when its score is above `threshold` (section 3.2; 0.5 in the paper). Below 0 keeps all.

    A score that is not a number is kept too: damage then shows in the answer instead of being dropped.

    Attributes:
        spare_best: an image that would keep nothing keeps its best patch (for models without prefix tokens).
    """

    threshold: float = 0.5
    spare_best: bool = False

    def __call__(self, score_T: Float[Tensor, " T"], layout: Layout) -> Selection:
        return select(_with_prefix(~(score_T <= self.threshold), score_T, layout, self.spare_best), layout)


@dataclass(frozen=True)
class TopK:
    """Keep the `ratio` of the image's patches (of the whole grid, rounded up) that score highest, in each image.

    Images of equal length stay equal, so shapes are static: this rule exports to ONNX.
    """

    ratio: float

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ConfigError(f"top-k: got a ratio of {self.ratio}, wanted a number above 0 and at most 1")

    def __call__(self, score_T: Float[Tensor, " T"], layout: Layout) -> Selection:
        k = share_of(self.ratio, layout.places)
        if layout.uniform is not None:
            rows_BS = score_T.view(-1, layout.uniform)
            k = min(k, layout.uniform - layout.prefix)
            return select_places(rows_BS[:, layout.prefix :].topk(k, dim=1).indices + layout.prefix, layout)
        rank_T = _rank_within_image(score_T, layout)
        return select((rank_T < k) | ~layout.is_patch_T, layout)


@dataclass(frozen=True)
class BatchBudget:
    """Keep the `ratio` of all patches of the batch that score highest, whichever images they are in.

    The total per batch is constant and lengths are ragged within it. An image's answer then depends on the
    images beside it: use it for throughput with fixed shapes, never where answers must be reproducible one by one.
    """

    ratio: float
    spare_best: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ConfigError(f"batch budget: got a ratio of {self.ratio}, wanted a number above 0 and at most 1")

    def __call__(self, score_T: Float[Tensor, " T"], layout: Layout) -> Selection:
        k = share_of(self.ratio, layout.places * layout.images)
        ranked_T = score_T.masked_fill(~layout.is_patch_T, float("-inf"))
        if self.spare_best:  # each image's best comes first, so that it is within any budget of one per image
            ranked_T = ranked_T.masked_fill(_best_of_image(score_T, layout), float("inf"))
        k = min(max(k, layout.images if self.spare_best else 0), score_T.shape[0] - layout.prefix * layout.images)
        keep_T = torch.zeros_like(layout.is_patch_T).index_fill(0, ranked_T.topk(k).indices, True)
        return select(keep_T | ~layout.is_patch_T, layout)


@dataclass(frozen=True)
class Sampled:
    """Keep each patch with the probability of its score (training): u ~ Bernoulli(I)."""

    spare_best: bool = False

    def __call__(self, score_T: Float[Tensor, " T"], layout: Layout) -> Selection:
        return select(_with_prefix(_drawn(score_T.detach(), layout), score_T, layout, self.spare_best), layout)


@dataclass(frozen=True)
class Given:
    """Keep the patches whose place is set in a given mask (tests, oracles, replays of a trace)."""

    keep_BN: Bool[Tensor, "B N"]

    def __call__(self, score_T: Float[Tensor, " T"], layout: Layout) -> Selection:
        asked_T = self.keep_BN[layout.image_T, layout.origin_T.clamp(min=0)]
        return select(asked_T | ~layout.is_patch_T, layout)


def share_of(ratio: float, count: int) -> int:
    """`ratio` of `count`, rounded up; 0.1 of 30 is 3, whatever floating point says."""
    return math.ceil(ratio * count - 1e-9)


def _drawn(chance_T: Float[Tensor, " T"], layout: Layout) -> Bool[Tensor, " T"]:
    """True with the given chances; what a patch draws depends on its picture and place, not on which rank holds it."""
    uniform_BN = uniform_per_image(layout.images, layout.places, chance_T.device)
    if uniform_BN is None:
        return torch.bernoulli(chance_T) > 0
    return uniform_BN[layout.image_T, layout.origin_T.clamp(min=0)] < chance_T


def _with_prefix(keep_T: Bool[Tensor, " T"], score_T: Tensor, layout: Layout, spare_best: bool) -> Bool[Tensor, " T"]:
    keep_T = keep_T & layout.is_patch_T
    if spare_best:
        kept_B = torch.zeros(layout.images, dtype=torch.int64, device=keep_T.device).index_add(0, layout.image_T, keep_T.long())
        keep_T = keep_T | (_best_of_image(score_T, layout) & (kept_B == 0)[layout.image_T])
    return keep_T | ~layout.is_patch_T


def _best_of_image(score_T: Float[Tensor, " T"], layout: Layout) -> Bool[Tensor, " T"]:
    return (_rank_within_image(score_T, layout) == 0) & layout.is_patch_T


def _rank_within_image(score_T: Float[Tensor, " T"], layout: Layout) -> Tensor:
    """0 for an image's best patch, 1 for the next, ...; ties go to the earlier place. Prefix rows rank last."""
    masked_T = score_T.detach().float().masked_fill(~layout.is_patch_T, float("-inf"))
    by_score_T = masked_T.argsort(descending=True, stable=True)
    order_T = by_score_T[layout.image_T[by_score_T].argsort(stable=True)]  # images in order, best first
    rank_T = torch.empty_like(order_T)
    position_T = torch.arange(order_T.shape[0], device=order_T.device)
    rank_T[order_T] = position_T - layout.cu_B1[:-1].long()[layout.image_T[order_T]]
    return rank_T
