"""What goes first when parts of an image are removed in the order of a map, and what takes the place of removed pixels."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from iared2.errors import ConfigError
from iared2.evaluate.map_scores import stretch
from iared2.seeds import generator
from iared2.tokens.grid import to_pixels

Fill = Callable[[Float[Tensor, "B C H W"], Bool[Tensor, "B H W"]], Float[Tensor, "B C H W"]]  # images, removed pixels -> images

BLUR_SIGMA, BLUR_WIDTH, BLUR_SIDE = 5.0, 11, 224  # Petsiuk et al. 2018: pixels of deviation and of the kernel's width, at 224


def rank_of(map_Bhw: Float[Tensor, "B h w"], size: tuple[int, int], seed: int = 0) -> Int[Tensor, "B H W"]:
    """The place of each pixel in the order of removal: 0 for the most important, H W - 1 for the least.

    The map is brought to `size` = (height, width) with bilinear filtering, as in the perturbation test of Chefer et al. (CVPR 2021).
    Equal values go in a random order that depends on `seed` and the map's size alone, and that is drawn on the map's own grid: cells of
    equal value then go cell by cell, not from the top down. So nothing is gained by where a picture has its object.

    Raises:
        ConfigError: a map that is not finite.
    """
    if not map_Bhw.isfinite().all():
        raise ConfigError("the map is not finite; check the model's weights, or try --dtype float32")
    unit_BP = stretch(map_Bhw, size).flatten(1)
    height, width = map_Bhw.shape[1:]
    draw_1hw = torch.randperm(height * width, generator=generator(seed)).view(1, height, width).double()
    by_draw_P = to_pixels(draw_1hw, size).flatten().argsort(stable=True).to(unit_BP.device)
    order_BP = by_draw_P[unit_BP[:, by_draw_P].argsort(dim=1, descending=True, stable=True)]
    rank_BP = torch.empty_like(order_BP)
    rank_BP.scatter_(1, order_BP, torch.arange(order_BP.shape[1], device=order_BP.device).expand_as(order_BP).contiguous())
    return rank_BP.view(-1, *size)


def on_grid(map_Bhw: Float[Tensor, "B h w"], grid: tuple[int, int]) -> Float[Tensor, "B rows columns"]:
    """A map of any size on the patch grid: the mean over each patch."""
    return F.adaptive_avg_pool2d(map_Bhw.double()[:, None], grid)[:, 0]


def gone(rank_BHW: Int[Tensor, "B H W"], share: float, least_first: bool = False) -> Bool[Tensor, "B H W"]:
    """True on the share of places that goes first, or, with `least_first`, on that which would go last."""
    places = rank_BHW.shape[1] * rank_BHW.shape[2]
    count = round(share * places)
    return rank_BHW >= places - count if least_first else rank_BHW < count


def zero(images: Float[Tensor, "B C H W"], gone_BHW: Bool[Tensor, "B H W"]) -> Float[Tensor, "B C H W"]:
    """Removed pixels are black: zero in raw data, before normalisation."""
    return images.masked_fill(gone_BHW[:, None], 0.0)


def blurred(images: Float[Tensor, "B C H W"], gone_BHW: Bool[Tensor, "B H W"]) -> Float[Tensor, "B C H W"]:
    """Removed pixels are those of the blurred picture (Petsiuk et al. 2018)."""
    return torch.where(gone_BHW[:, None], blur(images), images)


def blur(images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
    """Images under a Gaussian of deviation 5 cut to 11 x 11 pixels, for inputs of 224 pixels; for others in proportion."""
    for axis in (-2, -1):
        side = images.shape[axis]
        reach = min(max(1, round(BLUR_WIDTH // 2 * side / BLUR_SIDE)), side - 1)
        away = torch.arange(-reach, reach + 1, device=images.device, dtype=images.dtype)
        kernel = torch.exp(-away.square() / (2 * max(1.0, BLUR_SIGMA * side / BLUR_SIDE) ** 2))
        shape = (1, 1, -1, 1) if axis == -2 else (1, 1, 1, -1)
        padding = (0, 0, reach, reach) if axis == -2 else (reach, reach, 0, 0)
        weight = (kernel / kernel.sum()).view(shape).repeat(images.shape[1], 1, 1, 1)
        images = F.conv2d(F.pad(images, padding, mode="reflect"), weight, groups=images.shape[1])
    return images
