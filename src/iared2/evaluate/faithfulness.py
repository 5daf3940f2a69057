"""How faithful maps are to a model: what becomes of its answer when what they call important is removed.

Metrics take maps, raw images (pixels in [0, 1]) and a model that answers them, nothing else. Maps are on the patch grid or in pixels, on
any scale; larger means more important.

| figure | what it is | better |
|---|---|---|
| positive, negative | top-1, pixels set to zero, most or least relevant first (Chefer et al. 2021) | low, high |
| tokens_positive, tokens_negative | the same with patches dropped at the model's input, so that no colour stands in for them | low, high |
| road_positive, road_negative | the same with noisy linear imputation, on pixels (Rong et al. 2022) | low, high |
| deletion_zero, deletion_blur | probability, most relevant first, pixels black or blurred (Petsiuk et al. 2018) | low |
| insertion_zero, insertion_blur | probability, most relevant put into a black or blurred picture first | high |
| saco | agreement of salience with what removal costs, in [-1, 1] (Wu et al. 2024) | high |
| gini | how few patches hold the map's absolute values, in [0, 1) (Hurley and Rickard 2009) | - |
| randomised_1, randomised_all | rank correlation with the map when the last block, or all, are random (Adebayo et al. 2018) | low |

Areas lie under curves by the trapezoid rule, divided by the curve's width and in percent: a curve that is 1 everywhere has 100. Top-1
curves run from 10 to 90 %, as in the perturbation test, and ask whether the model still names the explained class; probability curves from
0 to 100 %. Insertion of the most relevant is deletion of the least relevant read from its end.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from iared2.errors import ConfigError
from iared2.evaluate.imputation import road
from iared2.evaluate.judge import Answers, DropsPatches
from iared2.evaluate.removal import Fill, blurred, gone, on_grid, rank_of, zero
from iared2.evaluate.saco import saco

STEPS = tuple(step / 10 for step in range(1, 10))
ALL = (0.0, *STEPS, 1.0)
FILLS: dict[str, Fill] = {"zero": zero, "blur": blurred, "road": road}
TESTS = {
    "zero": ("positive", "negative", "deletion_zero", "insertion_zero"),
    "tokens": ("tokens_positive", "tokens_negative"),
    "road": ("road_positive", "road_negative"),
    "blur": ("deletion_blur", "insertion_blur"),
    "saco": ("saco",),
    "gini": ("gini",),
    "randomised": ("randomised_1", "randomised_all"),
}
FIGURES = tuple(figure for figures in TESTS.values() for figure in figures)


@dataclass(frozen=True)
class Curve:
    """The model's answer while parts go.

    Attributes:
        share_S: removed at each step.
        hit_BS: whether the explained class is the first.
        chance_BS: its probability.
    """

    share_S: tuple[float, ...]
    hit_BS: Bool[Tensor, "B S"]
    chance_BS: Float[Tensor, "B S"]

    @property
    def top1(self) -> Float[Tensor, " B"]:
        """Area under the top-1 curve from 10 to 90 %, in percent."""
        inner = [step for step, share in enumerate(self.share_S) if 0 < share < 1]
        return 100 * area(self.hit_BS[:, inner].double(), [self.share_S[step] for step in inner])

    @property
    def chance(self) -> Float[Tensor, " B"]:
        """Area under the curve of probability, in percent."""
        return 100 * area(self.chance_BS, self.share_S)


def area(value_BS: Float[Tensor, "B S"], share_S: Sequence[float]) -> Float[Tensor, " B"]:
    """By the trapezoid rule, divided by the width."""
    share = torch.tensor(share_S, dtype=torch.float64)
    return torch.trapezoid(value_BS.double(), share, dim=1) / (share[-1] - share[0])


def removal_curve(
    map_Bhw: Float[Tensor, "B h w"],
    images: Float[Tensor, "B C H W"],
    model: Answers,
    fill: Fill = zero,
    least_first: bool = False,
    class_B: Int[Tensor, " B"] | None = None,
) -> Curve:
    """Answers while pixels are removed in steps of a tenth, the most relevant first.

    Args:
        images: raw, pixels in [0, 1].
        fill: what takes the place of removed pixels: `removal.zero`, `removal.blurred` or `imputation.road`. Of the last the curve ends
            at 90 %: a picture of which nothing is left has nothing to be imputed from.
        least_first: the other order.
        class_B: the explained class; None: the one that the model names.

    Raises:
        ConfigError: maps that are not finite, or not one for each image.
    """
    _check(map_Bhw, images)
    rank_BHW = rank_of(map_Bhw, (images.shape[2], images.shape[3])).to(images.device)
    shares = ALL[:-1] if fill is road else ALL
    logits = [model(fill(images, gone(rank_BHW, share, least_first)) if share else images) for share in shares]
    return _curve(shares, logits, class_B)


def token_curve(
    map_Bhw: Float[Tensor, "B h w"],
    images: Float[Tensor, "B C H W"],
    model: DropsPatches,
    least_first: bool = False,
    class_B: Int[Tensor, " B"] | None = None,
) -> Curve:
    """The same with patches that are dropped before the first block, really: up to 90 %, and never the last patch.

    Raises:
        ConfigError: as `removal_curve`.
    """
    _check(map_Bhw, images)
    grid = model.grid(images)
    rank_Bhw = rank_of(on_grid(map_Bhw, grid), grid)
    places = grid[0] * grid[1]
    logits = []
    for share in ALL[:-1]:
        gone_BN = gone(rank_Bhw, min(share, (places - 1) / places), least_first).flatten(1)
        logits.append(model.without(images, ~gone_BN))
    return _curve(ALL[:-1], logits, class_B)


def _check(map_Bhw: Tensor, images: Tensor) -> None:
    if map_Bhw.ndim != 3 or len(map_Bhw) != len(images):
        raise ConfigError(f"maps of shape {tuple(map_Bhw.shape)} for images of shape {tuple(images.shape)}; wanted one map per image")


def _curve(shares: tuple[float, ...], logits: Sequence[Float[Tensor, "B K"]], class_B: Int[Tensor, " B"] | None) -> Curve:
    logit_BSK = torch.stack([logit_BK.detach().double().cpu() for logit_BK in logits], dim=1)
    asked_B = logit_BSK[:, 0].argmax(1) if class_B is None else class_B.cpu()
    chance_BS = logit_BSK.softmax(2).gather(2, asked_B[:, None, None].expand(-1, len(shares), 1))[..., 0]
    return Curve(shares, logit_BSK.argmax(2) == asked_B[:, None], chance_BS)


def gini(map_Bhw: Float[Tensor, "B h w"]) -> Float[Tensor, " B"]:
    """The Gini index of the absolute values: 0 where all are equal (or zero), near 1 where one has all."""
    value_BN = map_Bhw.double().abs().flatten(1).sort(dim=1).values
    count, total_B = value_BN.shape[1], value_BN.sum(1)
    weight_N = 2 * torch.arange(1, count + 1, dtype=torch.float64, device=value_BN.device) - count - 1
    return (value_BN @ weight_N) / (count * torch.where(total_B > 0, total_B, 1.0))


class FaithfulJudge(Answers, DropsPatches, Protocol):
    """What `faithfulness` asks of a model: `iared2.evaluate.judge.Judge` is one."""


@dataclass(frozen=True)
class Faithfulness:
    """What is known of B maps.

    Attributes:
        value: by the names in `FIGURES`, those that need no second map; one per image.
        curve: by way of removing ("zero", "blur", "road", "tokens") and order ("positive", "negative"), such as zero_positive.
    """

    value: dict[str, Float[Tensor, " B"]]
    curve: dict[str, Curve]


def faithfulness(
    map_Bhw: Float[Tensor, "B h w"],
    images: Float[Tensor, "B C H W"],
    judge: FaithfulJudge,
    class_B: Int[Tensor, " B"] | None = None,
    tests: Sequence[str] = tuple(TESTS),
) -> Faithfulness:
    """All figures of maps but those of the randomisation check, which needs a second map.

    Args:
        images: raw, pixels in [0, 1].
        judge: answers raw images and can leave patches out, as `iared2.evaluate.judge.Judge`.
        class_B: the explained class; None: the one that the judge names.
        tests: which of `TESTS`.

    Raises:
        ConfigError: as `removal_curve`.
    """
    curve: dict[str, Curve] = {}
    value: dict[str, Tensor] = {}
    for name in ("zero", "tokens", "road", "blur"):
        if name not in tests:
            continue
        for least_first, order in ((False, "positive"), (True, "negative")):
            if name == "tokens":
                found = token_curve(map_Bhw, images, judge, least_first, class_B)
            else:
                found = removal_curve(map_Bhw, images, judge, FILLS[name], least_first, class_B)
            curve[f"{name}_{order}"] = found
            if name != "blur":
                value[order if name == "zero" else f"{name}_{order}"] = found.top1
            if name in ("zero", "blur"):
                value[f"{'insertion' if least_first else 'deletion'}_{name}"] = found.chance
    if "saco" in tests:
        value["saco"] = saco(map_Bhw, images, judge, class_B)
    if "gini" in tests:
        value["gini"] = gini(on_grid(map_Bhw, judge.grid(images))).cpu()
    return Faithfulness(value, curve)
