"""The trace: what a reduced model did to each image, group by group."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from iared2.errors import ConfigError
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
        again: per image, whether it was passed a second time with nothing dropped (`second_look`); then `macs` counts both passes. Empty:
            none was.
    """

    score_GBN: Float[Tensor, "G B N"]
    keep_GBN: Bool[Tensor, "G B N"]
    carrier_GBN: Int[Tensor, "G B N"]
    grid: tuple[int, ...]
    first_blocks: tuple[int, ...]
    macs: tuple[int, ...]
    dense_macs: int
    again: tuple[bool, ...] = ()

    @property
    def groups(self) -> int:
        return len(self.first_blocks)

    @cached_property
    def keep_ratio(self) -> Float[Tensor, "B G"]:
        """Kept patches / all patches of the image, after each group's reduction."""
        return self.keep_GBN.float().mean(-1).T

    def heatmap(self, group: int | None = None) -> Float[Tensor, "B h w"]:
        """The scores of a group on the patch grid, in [0, 1].

        By default the second group's, as in the paper, or the only one's; of more than three groups, the one in the middle.

        Raises:
            ConfigError: there is no such group.
        """
        usual = min(1, self.groups - 1) if self.groups <= 3 else (self.groups - 1) // 2
        chosen = usual if group is None else group
        if not -self.groups <= chosen < self.groups:
            raise ConfigError(f"group: got {group}, wanted one of 0 to {self.groups - 1}")
        return to_map(self.score_GBN[chosen], self.grid)

    def carried(self, group: int = -1) -> Bool[Tensor, "B N"]:
        """Places whose patch lives on after the group, in its own token or in another's."""
        return self.carrier_GBN[group] >= 0

    def share_of_dense(self) -> float:
        """Mean multiply-adds over images as a share of the untouched backbone's."""
        return sum(self.macs) / len(self.macs) / self.dense_macs

    def image(self, index: int) -> "Trace":
        """The trace of one image."""
        one = index % len(self.macs)
        return self._with(lambda tensor: tensor[:, one : one + 1], (self.macs[one],), self.again[one : one + 1])

    def cpu(self) -> "Trace":
        """The same on the host, detached."""
        return self._with(lambda tensor: tensor.detach().cpu(), self.macs, self.again)

    def _with(self, change: Callable[[Tensor], Tensor], macs: tuple[int, ...], again: tuple[bool, ...]) -> "Trace":
        return replace(
            self,
            score_GBN=change(self.score_GBN),
            keep_GBN=change(self.keep_GBN),
            carrier_GBN=change(self.carrier_GBN),
            macs=macs,
            again=again,
        )


def concatenate(traces: Sequence[Trace]) -> Trace:
    """Joins traces of batches of one model and input size."""
    return replace(
        traces[0],
        score_GBN=torch.cat([trace.score_GBN for trace in traces], dim=1),
        keep_GBN=torch.cat([trace.keep_GBN for trace in traces], dim=1),
        carrier_GBN=torch.cat([trace.carrier_GBN for trace in traces], dim=1),
        macs=tuple(macs for trace in traces for macs in trace.macs),
        again=tuple(again for trace in traces for again in trace.again or (False,) * len(trace.macs)),
    )
