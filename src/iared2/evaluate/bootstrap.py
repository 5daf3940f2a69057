"""The bootstrap over images: which images each resample holds, and 95 % intervals of what is computed from them."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from iared2.seeds import generator

DRAWS = 1000  # resamples


def drawn(count: int, seed: int = 0, draws: int = DRAWS) -> Int[Tensor, "D N"]:
    """Which of `count` images each resample holds, with repetitions; the same seed draws the same images."""
    return torch.randint(count, (draws, count), generator=generator(seed))


def resamples(count: int, seed: int = 0, draws: int = DRAWS) -> Float[Tensor, "D N"]:
    """How often each of `count` images is in each resample; float64, rows add up to `count`.

    The same seed draws the same images for every method that saw as many, so intervals of several methods belong together.
    """
    chosen_DN = drawn(count, seed, draws)
    return torch.zeros(draws, count, dtype=torch.float64).scatter_add_(1, chosen_DN, torch.ones(draws, count, dtype=torch.float64))


def interval(figure_D: Float[Tensor, " D"]) -> tuple[float, float]:
    """The 2.5 and the 97.5 percentile of a figure over resamples; resamples without one (NaN) do not count."""
    low, high = figure_D.nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def means(value_NK: Float[Tensor, "N K"], weight_DN: Float[Tensor, "D N"]) -> Float[Tensor, "D K"]:
    """Mean of each column over each resample; NaN marks images that have no value and take no part."""
    return weight_DN @ value_NK.double().nan_to_num() / (weight_DN @ (~value_NK.isnan()).double())
