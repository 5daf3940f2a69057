"""ROAD's noisy linear imputation: removed pixels become what their neighbours say, plus noise (Rong et al., ICML 2022).

Each removed pixel is the weighted mean of its eight neighbours, 1/6 for those that share a side and 1/12 for those that share a corner;
neighbours may have been removed too, so that all removed pixels of an image solve one sparse linear system. Where the picture ends, the
weights of the neighbours that exist are made to add up to 1. A mask can then not be read off the colours that it leaves, which is what
makes other ways of removing leak the answer.

The system is solved on pixels, not on patches. With each row times the weights of its neighbours it is symmetric and positive definite, so
conjugate gradients solve it for all images and channels at once, with nothing but a 3 x 3 convolution and no matrix. They start from the
solution on coarser grids, which changes how long it takes and not what comes out.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from iared2.seeds import generator

SIDE, CORNER = 1 / 6, 1 / 12
NOISE = 0.01  # standard deviation, for pixels in [0, 1]
TOLERANCE = 3e-5  # the residual of no pixel is above this
STEPS = 1000  # of conjugate gradients at most


def road(images: Float[Tensor, "B C H W"], gone_BHW: Bool[Tensor, "B H W"]) -> Float[Tensor, "B C H W"]:
    """Images with removed pixels imputed; the noise is the same in every call."""
    noise = torch.randn(images.shape[1:], generator=generator(0)).to(images) * NOISE
    return torch.where(gone_BHW[:, None], impute(images, gone_BHW) + noise, images)


def impute(
    images: Float[Tensor, "B C H W"], gone_BHW: Bool[Tensor, "B H W"], tolerance: float = TOLERANCE, steps: int = STEPS
) -> Float[Tensor, "B C H W"]:
    """Solves the system without noise; an image of which nothing is left becomes black.

    Args:
        tolerance: how far a pixel may be from the mean of its neighbours, on the images' scale.
        steps: of conjugate gradients at most.
    """
    free = gone_BHW[:, None].to(images)
    known = images * (1 - free)
    full_B1HW = _neighbours(torch.ones_like(free[:1, :1]))
    guess = _coarse_guess(known, 1 - free) * free
    # What is left to explain: (row sum) x - (sum over neighbours) = 0 on removed pixels, the known ones held.
    residual = free * (_neighbours(known + guess) - full_B1HW * guess)
    found, step, size_BC11 = guess, residual, _dot(residual, residual)
    for _ in range(steps):
        # Each image stops when it is done, so that what comes out does not depend on the images beside it.
        open_BC11 = residual.abs().amax((2, 3), keepdim=True) > tolerance
        if not open_BC11.any():
            break
        pushed = free * (full_B1HW * step - _neighbours(step))
        rate = open_BC11 * size_BC11 / _dot(step, pushed).clamp(min=torch.finfo(images.dtype).tiny)
        found, residual = found + rate * step, residual - rate * pushed
        before, size_BC11 = size_BC11, _dot(residual, residual)
        step = residual + size_BC11 / before.clamp(min=torch.finfo(images.dtype).tiny) * step
    return known + found


def _neighbours(x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
    """The weighted sum of the eight neighbours: a separable kernel [1 2 1] x [1 2 1] / 12 less its middle."""
    across = F.pad(x, (1, 1, 0, 0))
    row = across[..., :-2] + 2 * x + across[..., 2:]
    down = F.pad(row, (0, 0, 1, 1))
    return (down[..., :-2, :] + 2 * row + down[..., 2:, :] - 4 * x) * CORNER


def _dot(a: Float[Tensor, "B C H W"], b: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C 1 1"]:
    return (a * b).sum((2, 3), keepdim=True)


def _coarse_guess(known: Float[Tensor, "B C H W"], there: Float[Tensor, "B 1 H W"]) -> Float[Tensor, "B C H W"]:
    """What is known, and elsewhere the colours of ever larger neighbourhoods."""
    if bool((there > 0).all()) or min(known.shape[2:]) == 1:
        return known / torch.where(there > 0, there, 1.0)
    small_known, small_there = (F.avg_pool2d(x, 2, ceil_mode=True) for x in (known, there))
    small = F.interpolate(_coarse_guess(small_known, small_there), size=known.shape[2:], mode="bilinear")
    return torch.where(there > 0, known / torch.where(there > 0, there, 1.0), small)
