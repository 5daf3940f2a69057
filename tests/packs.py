"""Random packs of tokens for hypothesis, with lengths, places and masses of any kind."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from iared2.tokens.packed import Layout, PackedTokens

GRID = (3, 4)
PLACES = 12


def make_layout(kept: list[list[int]], prefix: int, grid: tuple[int, ...] = GRID, uniform: bool = False) -> Layout:
    """A layout whose images keep the given places."""
    lengths = [prefix + len(places) for places in kept]
    return Layout(
        cu_B1=torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)], dtype=torch.int32),
        image_T=torch.tensor([i for i, length in enumerate(lengths) for _ in range(length)], dtype=torch.int64),
        origin_T=torch.tensor([o for places in kept for o in [-1] * prefix + places], dtype=torch.int64),
        prefix=prefix,
        grid=grid,
        longest=max(lengths),
        uniform=lengths[0] if uniform else None,
    )


def make_pack(
    kept: list[list[int]], prefix: int = 1, width: int = 4, dtype: torch.dtype = torch.float64, seed: int = 0, uniform: bool = False
) -> PackedTokens:
    """A pack of random tokens at the given places; all other places are gone."""
    layout = make_layout(kept, prefix, uniform=uniform)
    x_TD = torch.randn(len(layout.image_T), width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return PackedTokens(x_TD, layout)


def lengths_layout(lengths: list[int]) -> Layout:
    """A layout of plain lengths, for attention, which knows no places."""
    return make_layout([list(range(n)) for n in lengths], 0, (1, max(lengths)))


def rows_of(layout: Layout) -> list[list[int]]:
    """Each image's rows."""
    cu = layout.cu_B1.tolist()
    return [list(range(a, b)) for a, b in zip(cu[:-1], cu[1:], strict=True)]


def keep_mask(layout: Layout, draw: torch.Generator, share: float = 0.5) -> Tensor:
    """A random keep mask over rows; prefix rows always stay."""
    return (torch.rand(len(layout.image_T), generator=draw) < share) | ~layout.is_patch_T


places = st.sets(st.integers(0, PLACES - 1)).map(sorted)
some_places = st.sets(st.integers(0, PLACES - 1), min_size=1).map(sorted)
images = st.lists(places, min_size=1, max_size=5)
seeds = st.integers(0, 2**20)
