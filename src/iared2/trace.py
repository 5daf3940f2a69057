"""The trace: what a reduced model did to each image, group by group."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from iared2.tokens.grid import to_map


@dataclass(frozen=True)
class Trace:
    """Scores, kept places, carriers and cost of one forward pass. Groups are counted from 0.

    Attributes:
        score_GBN: Eq. 1 for every group, image and place; zero where the patch was gone before.
        keep_GBN: places that still have a token of their own after the group's reduction.
        carrier_GBN: the place of the token that carries each patch, -1 where it is gone.
        grid: patches per axis.
        first_blocks: the block before which each group reduces.
        macs: multiply-adds per image, reduction included.
        dense_macs: multiply-adds per image of the untouched backbone.
    """

    score_GBN: Float[Tensor, "G B N"]
    keep_GBN: Bool[Tensor, "G B N"]
    carrier_GBN: Int[Tensor, "G B N"]
    grid: tuple[int, ...]
    first_blocks: tuple[int, ...]
    macs: tuple[int, ...]
    dense_macs: int

    @property
    def groups(self) -> int:
        return len(self.first_blocks)

    @cached_property
    def keep_ratio(self) -> Float[Tensor, "B G"]:
        """Kept patches / all patches of the image, after each group's reduction."""
        return self.keep_GBN.float().mean(-1).T

    def heatmap(self, group: int = 1) -> Float[Tensor, "B h w"]:
        """The scores of a group on the patch grid, in [0, 1]; the paper shows the second group (1)."""
        return to_map(self.score_GBN[group], self.grid)

    def carried(self, group: int = -1) -> Bool[Tensor, "B N"]:
        """Places whose patch lives on after the group, in its own token or in another's."""
        return self.carrier_GBN[group] >= 0

    def share_of_dense(self) -> float:
        """Mean multiply-adds over images as a share of the untouched backbone's."""
        return sum(self.macs) / len(self.macs) / self.dense_macs

    def image(self, index: int) -> "Trace":
        """The trace of one image."""
        rows = slice(index, index + 1) if index != -1 else slice(-1, None)
        return Trace(
            self.score_GBN[:, rows], self.keep_GBN[:, rows], self.carrier_GBN[:, rows],
            self.grid, self.first_blocks, self.macs[rows], self.dense_macs,
        )

    def cpu(self) -> "Trace":
        """The same on the host, detached."""
        parts = [t.detach().cpu() for t in (self.score_GBN, self.keep_GBN, self.carrier_GBN)]
        return Trace(*parts, self.grid, self.first_blocks, self.macs, self.dense_macs)


def concatenate(traces: list[Trace]) -> Trace:
    """Joins traces of batches of one model and input size."""
    first = traces[0]
    joined = [torch.cat([getattr(t, name) for t in traces], dim=1) for name in ("score_GBN", "keep_GBN", "carrier_GBN")]
    macs = tuple(m for t in traces for m in t.macs)
    return Trace(*joined, first.grid, first.first_blocks, macs, first.dense_macs)
