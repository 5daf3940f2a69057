"""Maps on the patch grid, and from there to pixels."""

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


def smoothed(map_BN: Float[Tensor, "B N"], grid: tuple[int, ...], deviation: float) -> Float[Tensor, "B N"]:
    """A Gaussian blur of maps on a grid of two axes, `deviation` in patches; zero lies outside. 0 changes nothing.

    In the maps' own precision, whatever autocast says.
    """
    if deviation <= 0:
        return map_BN
    radius = max(1, round(3 * deviation))
    kernel = torch.exp(-torch.arange(-radius, radius + 1, device=map_BN.device).square() / (2 * deviation**2)).to(map_BN.dtype)
    kernel = kernel / kernel.sum()
    map_B1hw = map_BN.view(-1, 1, *grid)
    with torch.autocast(map_BN.device.type, enabled=False):
        across = F.conv2d(map_B1hw, kernel.view(1, 1, 1, -1), padding=(0, radius))
        return F.conv2d(across, kernel.view(1, 1, -1, 1), padding=(radius, 0)).flatten(1)
