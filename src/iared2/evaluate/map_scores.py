"""Weakly supervised segmentation: what maps are worth as masks, with nothing but maps and masks as input.

The protocol is that of Chefer, Gur and Wolf, "Transformer Interpretability Beyond Attention Visualization" (CVPR 2021), which section 4
of the IA-RED^2 paper follows: a map is brought to the input's pixels with bilinear filtering, stretched per image to [0, 1], and cut at its
mean; what is strictly above is object.

| figure | what it is |
|---|---|
| pixel_accuracy | right pixels / pixels, summed over the data set |
| macc | mean of background's and object's recall, from sums over the data set (the paper does not define it) |
| miou | mean of background's and object's intersection over union, from sums over the data set |
| map | average precision of [1 - R, R] against [background, object], per image, mean over images |
| pointing | is the map's highest pixel on the object? Of several highest ones, the share that is. Mean over images with an object |
| mass | share of the positive part of the map that lies on the object. Mean over images with an object |

Pixels to ignore count in none of them. They do count in the map's own lowest, highest and mean value: a map knows of no masks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torchmetrics.functional.classification import binary_stat_scores

from iared2.errors import ConfigError
from iared2.evaluate.bootstrap import DRAWS, interval, resamples
from iared2.tokens.grid import to_pixels

FIGURES = ("pixel_accuracy", "miou", "map", "macc", "pointing", "mass")
COLUMNS = ("true object", "false object", "false background", "true background", "map", "pointing", "mass")
_IGNORED = -1  # what torchmetrics is told not to count


@dataclass(frozen=True)
class MapScores:
    """What is known of n maps; figures and intervals follow from it.

    Attributes:
        value_N7: one row per image, columns as in `COLUMNS`: four counts of pixels and three scores in [0, 1], NaN where an image has none.
    """

    value_N7: Float[Tensor, "N 7"]

    def __len__(self) -> int:
        return len(self.value_N7)

    @classmethod
    def join(cls, parts: "Sequence[MapScores]") -> "MapScores":
        """The images of all parts, in order."""
        return cls(torch.cat([part.value_N7 for part in parts]))

    def figures(self) -> dict[str, float]:
        """`FIGURES` in percent; NaN where no image has one."""
        found = _figures(self.value_N7, torch.ones(1, len(self), dtype=torch.float64))
        return {name: float(value_D[0]) for name, value_D in found.items()}

    def intervals(self, seed: int = 0, draws: int = DRAWS) -> dict[str, tuple[float, float]]:
        """95 % intervals of the figures in percent: percentiles of the bootstrap over images.

        The same seed draws the same images for every method that saw as many, so intervals of several methods belong together.
        """
        found = _figures(self.value_N7, resamples(len(self), seed, draws))
        return {name: interval(value_D) for name, value_D in found.items()}


def _figures(value_N7: Float[Tensor, "N 7"], weight_DN: Float[Tensor, "D N"]) -> dict[str, Float[Tensor, " D"]]:
    """Figures in percent of D weighted sets of images."""
    hit_D, extra_D, missed_D, right_D = (weight_DN @ value_N7[:, :4]).unbind(1)
    union_D2 = torch.stack([hit_D + extra_D + missed_D, right_D + extra_D + missed_D], dim=1)
    truth_D2 = torch.stack([hit_D + missed_D, right_D + extra_D], dim=1)
    both_D2 = torch.stack([hit_D, right_D], dim=1)
    # 0 / 0 is NaN: a class that neither maps nor masks show takes no part in a mean, as in torchmetrics.
    found = {
        "pixel_accuracy": both_D2.sum(1) / truth_D2.sum(1),
        "miou": (both_D2 / union_D2).nanmean(1),
        "macc": (both_D2 / truth_D2).nanmean(1),
    }
    for column, name in enumerate(COLUMNS[4:], start=4):
        value_N = value_N7[:, column]
        found[name] = weight_DN @ value_N.nan_to_num() / (weight_DN @ (~value_N.isnan()).double())
    return {name: 100 * found[name] for name in FIGURES}


def score_maps(
    map_Bhw: Float[Tensor, "B h w"], mask_BHW: Bool[Tensor, "masks H W"], ignore_BHW: Bool[Tensor, "masks H W"] | None = None
) -> MapScores:
    """Scores maps against masks.

    Args:
        map_Bhw: any size, any scale; higher means that it matters more.
        mask_BHW: true on the object, at the size of the model's input.
        ignore_BHW: true where nothing counts.

    Raises:
        ConfigError: sizes that do not go together, or a map that is not finite.
    """
    if map_Bhw.ndim != 3 or mask_BHW.ndim != 3 or len(map_Bhw) != len(mask_BHW) or not len(map_Bhw):
        raise ConfigError(
            f"maps of shape {tuple(map_Bhw.shape)} for masks of shape {tuple(mask_BHW.shape)}; wanted one map per mask, and one at least"
        )
    if not map_Bhw.isfinite().all():
        raise ConfigError("the map is not finite; check the model's weights, or try --dtype float32")
    map_Bhw, mask_BHW = map_Bhw.detach().float().cpu(), mask_BHW.cpu()
    counts_BHW = torch.ones_like(mask_BHW) if ignore_BHW is None else ~ignore_BHW.cpu()
    size = (mask_BHW.shape[1], mask_BHW.shape[2])
    unit_BHW = stretch(map_Bhw, size)
    object_BHW = unit_BHW > unit_BHW.double().mean((1, 2), keepdim=True)
    unit_BP, mask_BP, counts_BP = unit_BHW.flatten(1), mask_BHW.flatten(1), counts_BHW.flatten(1)
    two_B2P = torch.cat([1 - unit_BP, unit_BP], dim=1), torch.cat([~mask_BP, mask_BP], dim=1), torch.cat([counts_BP, counts_BP], dim=1)
    columns = list(stat_scores(object_BHW.flatten(1), mask_BP, counts_BP).unbind(1))
    columns.append(average_precision(*two_B2P))
    columns.append(pointing(unit_BP, mask_BP, counts_BP))
    columns.append(mass_inside(to_pixels(map_Bhw.double(), size).flatten(1), mask_BP, counts_BP))
    return MapScores(torch.stack(columns, dim=1))


def stat_scores(object_BP: Bool[Tensor, "B P"], mask_BP: Bool[Tensor, "B P"], counts_BP: Bool[Tensor, "B P"]) -> Float[Tensor, "B 4"]:
    """How many elements of each row are truly and falsely on the object, falsely and truly off it; counted by torchmetrics."""
    if len(mask_BP) == 1:  # torchmetrics 1.9 loses the axis of a batch of one
        return stat_scores(*(rows.expand(2, -1) for rows in (object_BP, mask_BP, counts_BP)))[:1]
    target_BP = mask_BP.long().masked_fill(~counts_BP, _IGNORED)
    found_B5 = binary_stat_scores(
        object_BP.long(), target_BP, multidim_average="samplewise", ignore_index=_IGNORED, validate_args=False
    )  # true and false positives, true and false negatives, and their sum
    return found_B5[:, [0, 1, 3, 2]].double()


def stretch(map_Bhw: Float[Tensor, "B h w"], size: tuple[int, int]) -> Float[Tensor, "B H W"]:
    """Maps at `size` = (height, width), bilinear, stretched per image to [0, 1]; a map that is the same everywhere becomes 0.

    In float64, rounded to float32 at the end: pixels that are equal, such as those outside of the centres of border patches, come out equal
    to the bit. In float32 they would not, and thresholds would pass between them.
    """
    return _to_unit(to_pixels(_to_unit(map_Bhw.double()), size)).float()  # first on the grid: a constant map must become 0


def _to_unit(map_Bhw: Float[Tensor, "B h w"]) -> Float[Tensor, "B h w"]:
    low_B11, high_B11 = map_Bhw.amin((1, 2), keepdim=True), map_Bhw.amax((1, 2), keepdim=True)
    span_B11 = high_B11 - low_B11
    return (map_Bhw - low_B11) / torch.where(span_B11 > 0, span_B11, 1.0)


def rank_normalise(map_Bhw: Float[Tensor, "B h w"]) -> Float[Tensor, "B h w"]:
    """Values replaced by their ranks within the image, as a share of all: in (0, 1], equal values sharing the mean of their ranks.

    The mean as threshold is hard on maps with many zeros, such as those of models that drop patches; ranks know of no scale.
    """
    value_BN = map_Bhw.flatten(1).contiguous()
    sorted_BN = value_BN.sort(dim=1).values
    below_BN = torch.searchsorted(sorted_BN, value_BN, right=False)
    up_to_BN = torch.searchsorted(sorted_BN, value_BN, right=True)
    return ((below_BN + up_to_BN + 1) / 2 / value_BN.shape[1]).to(map_Bhw.dtype).reshape(map_Bhw.shape)


def average_precision(score_BP: Float[Tensor, "B P"], truth_BP: Bool[Tensor, "B P"], counts_BP: Bool[Tensor, "B P"]) -> Float[Tensor, " B"]:
    """Area under the precision-recall steps of each row, exactly as scikit-learn's `average_precision_score`; NaN without a true element.

    Sum over thresholds of (recall here - recall at the threshold above) x precision here. Equal scores share a threshold.

    Args:
        counts_BP: elements that take part.
    """
    score_BP, order_BP = score_BP.sort(dim=1, descending=True)
    counts_BP = counts_BP.gather(1, order_BP)
    hits_BP = (truth_BP.gather(1, order_BP) & counts_BP).double().cumsum(1)
    taken_BP = counts_BP.double().cumsum(1).clamp(min=1)
    last_BP = torch.ones_like(counts_BP)  # the last of equal scores: there a threshold lies
    last_BP[:, :-1] = score_BP[:, 1:] != score_BP[:, :-1]
    before_BP = torch.zeros_like(hits_BP)  # hits down to the threshold above
    before_BP[:, 1:] = torch.where(last_BP, hits_BP, 0.0).cummax(1).values[:, :-1]
    area_B = (last_BP * (hits_BP - before_BP) * hits_BP / taken_BP).sum(1)
    return area_B / hits_BP[:, -1]  # 0 / 0 is NaN


def pointing(score_BP: Float[Tensor, "B P"], mask_BP: Bool[Tensor, "B P"], counts_BP: Bool[Tensor, "B P"]) -> Float[Tensor, " B"]:
    """The pointing game (Zhang et al. 2016): the share of the highest elements that lie on the object; NaN without an object."""
    best_B1 = score_BP.masked_fill(~counts_BP, float("-inf")).amax(1, keepdim=True)
    best_BP = (score_BP == best_B1) & counts_BP
    share_B = (best_BP & mask_BP).sum(1).double() / best_BP.sum(1)
    return share_B.masked_fill(~(mask_BP & counts_BP).any(1), float("nan"))


def mass_inside(score_BP: Float[Tensor, "B P"], mask_BP: Bool[Tensor, "B P"], counts_BP: Bool[Tensor, "B P"]) -> Float[Tensor, " B"]:
    """The share of the positive scores that lies on the object; 0 where nothing is positive, NaN without an object."""
    positive_BP = score_BP.double().clamp(min=0) * counts_BP
    total_B = positive_BP.sum(1)
    share_B = (positive_BP * mask_BP).sum(1) / torch.where(total_B > 0, total_B, 1.0)
    return share_B.masked_fill(~(mask_BP & counts_BP).any(1), float("nan"))
