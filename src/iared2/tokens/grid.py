"""From scores on the patch grid to maps of pixels."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

SIGMA = 0.25  # standard deviation of the centred Gaussian, as a share of the side


def to_map(score_BN: Float[Tensor, "B N"], grid: tuple[int, ...]) -> Float[Tensor, "B h w"]:
    """Patch scores in grid order -> one small map per image."""
    return score_BN.reshape(-1, *grid)


def to_pixels(map_Bhw: Float[Tensor, "B h w"], size: tuple[int, int]) -> Float[Tensor, "B height width"]:
    """Bilinear up-sampling to `size` = (height, width) in pixels (section 3.2, "Emergence of Interpretability")."""
    return F.interpolate(map_Bhw[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


def gaussian(height: int, width: int, sigma: float = SIGMA) -> Float[Tensor, "h w"]:
    """A centred Gaussian whose deviation is `sigma` of each side."""
    rows = (torch.arange(height) + 0.5) / height - 0.5
    columns = (torch.arange(width) + 0.5) / width - 0.5
    return torch.exp(-(rows[:, None] ** 2 + columns[None, :] ** 2) / (2 * sigma**2))
