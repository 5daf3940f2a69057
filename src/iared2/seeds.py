"""Seeds as a pure function of where we are, so that a resumed run draws what the undisturbed one drew."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

_BATCH = 0xBA7C4  # keeps the draws of a batch apart from those that `seed_all` seeds


def derive_seed(*parts: int) -> int:
    """A well-mixed 63-bit seed from non-negative integers (run seed, stage, step, rank, ...)."""
    low, high = np.random.SeedSequence(parts).generate_state(2)
    return int(low) | (int(high) & 0x7FFFFFFF) << 32


def generator(*parts: int) -> torch.Generator:
    """A CPU generator seeded from `parts`."""
    return torch.Generator().manual_seed(derive_seed(*parts))


def seed_all(*parts: int) -> None:
    """Seeds Python, NumPy and torch (every device) from `parts`."""
    seed = derive_seed(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@dataclass(frozen=True)
class _Part:
    """A rank's part of a batch: every `world`-th picture, from number `rank` on."""

    draw: torch.Generator
    rank: int
    world: int


_part: _Part | None = None  # not a context variable: compiled code reads it


@contextmanager
def draws_of_batch(*parts: int, rank: int, world: int, device: torch.device) -> Iterator[None]:
    """Has `uniform_per_image` draw for the batch of all ranks inside a `with` block, so that the number of ranks changes nothing.

    Args:
        parts: what the draws depend on: seed, stage, step.
        rank, world: this process holds every `world`-th picture of the batch, from number `rank` on.
        device: where the numbers are drawn. The CPU and GPUs draw different ones.
    """
    global _part  # noqa: PLW0603 - like torch's own generators
    before, _part = _part, _Part(torch.Generator(device).manual_seed(derive_seed(_BATCH, *parts)), rank, world)
    try:
        yield
    finally:
        _part = before


def uniform_per_image(images: int, columns: int, device: torch.device) -> Float[Tensor, "B columns"] | None:
    """Uniform numbers in [0, 1) for this rank's pictures; None outside of `draws_of_batch`, where one draws as usual.

    `images` may be a multiple of the pictures, where each occurs several times: copies of the whole part behind one another.
    """
    if _part is None:
        return None
    return torch.rand(images * _part.world, columns, generator=_part.draw, device=device)[_part.rank :: _part.world]
