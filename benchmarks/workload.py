"""What the speed benchmarks share: a reduced model whose kept lengths are drawn, and tuned to a share of the MACs.

The weights are random, so real scores would keep nonsense; instead each group's reducer replays a drawn mask. The
interpreter still scores every patch, and its cost, like that of matching, counts in the share.
"""

import math  # noqa: I001 - iared2 comes before timm
from dataclasses import dataclass

import iared2  # first: makes timm importable beside a CPU-only torch
import timm
import torch
from torch import Tensor

from iared2 import cost
from iared2.keep import Given

SHAPE = (170 / 197, 120 / 197, 80 / 197)  # mean share of tokens per group before tuning
SPREAD = 0.12  # standard deviation of one image's share of tokens around its group's mean


@dataclass(frozen=True)
class Workload:
    """A dense model and a reduced one of the same weights, with masks for one batch."""

    dense: torch.nn.Module
    reduced: iared2.ReducedTransformer
    images: Tensor
    kept: tuple[tuple[int, ...], ...]
    share: float

    def use(self, on_drop: str) -> "Workload":
        """The same lengths with another hand-over; its MACs differ by the matching."""
        self.use_only(on_drop)
        return Workload(self.dense, self.reduced, self.images, self.kept, share_of_dense(self.reduced, self.images, self.kept))

    def use_only(self, on_drop: str) -> None:
        """Sets the hand-over; cheap enough for a timed call."""
        for reducer in self.reduced.reducers:
            reducer.on_drop = on_drop


def share_of_dense(model: iared2.ReducedTransformer, images: Tensor, kept: tuple[tuple[int, ...], ...]) -> float:
    """Multiply-adds with these kept counts per image and group, as a share of the untouched model's."""
    size = tuple(images.shape[-2:])
    places = math.prod(model.adapter.grid(*size))
    reducers = dict(zip(model.config.first_blocks, model.reducers, strict=True))
    macs = [cost.reduced_macs(model.adapter, reducers, size, places, image) for image in kept]
    return sum(macs) / len(macs) / cost.dense_macs(model.adapter, *size)


def draw(model: iared2.ReducedTransformer, images: Tensor, target: float, seed: int) -> tuple[tuple[int, ...], ...]:
    """Kept patches per image and group, ragged, descending, and tuned by bisection until their share is the target."""
    places = math.prod(model.adapter.grid(*images.shape[-2:]))
    noise = torch.randn(len(images), len(SHAPE), generator=torch.Generator().manual_seed(seed)) * SPREAD

    def at(power: float) -> tuple[tuple[int, ...], ...]:
        shares = (torch.tensor(SHAPE) ** power + noise).clamp(0.02, 1.0).cummin(1).values
        return tuple(tuple(row) for row in (shares * places).round().int().tolist())

    low, high = 0.05, 8.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if share_of_dense(model, images, at(middle)) > target else (low, middle)
    return at(low)


def masks(kept: tuple[tuple[int, ...], ...], places: int, seed: int, device: torch.device) -> list[Given]:
    """Nested random masks with these counts, one keep rule per group."""
    generator = torch.Generator().manual_seed(seed)
    rank_BN = torch.rand(len(kept), places, generator=generator).argsort(1).argsort(1)
    counts_GB = torch.tensor(kept).T
    return [Given((rank_BN < counts_B[:, None]).to(device)) for counts_B in counts_GB]


def make(name: str, batch: int, target: float, seed: int = 0, image_size: int | None = None, on: torch.Tensor | None = None) -> Workload:
    """A workload of the given backbone, batch size and share of MACs.

    Args:
        image_size: pixels per side; None takes the backbone's own.
        on: a tensor whose device and precision to use; None means the CPU in fp32.
    """
    on = torch.empty(0) if on is None else on
    torch.manual_seed(seed)
    options = {} if image_size is None else {"img_size": image_size}
    dense = timm.create_model(name, **options).eval()
    model = iared2.reduce(dense, groups=3).eval()
    size = dense.patch_embed.img_size
    images = torch.randn(batch, 3, *size)
    kept = draw(model, images, target, seed)
    model.to(on.device, on.dtype)
    for reducer, rule in zip(model.reducers, masks(kept, math.prod(model.adapter.grid(*size)), seed, on.device), strict=True):
        reducer.rule = rule
    return Workload(dense, model, images.to(on), kept, share_of_dense(model, images, kept))


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    q = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    return tuple(q.tolist())
