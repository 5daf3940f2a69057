"""Where and how a backbone is reduced, as data."""

from typing import Literal

from pydantic import Field, model_validator

from iared2.errors import ConfigError
from iared2.handover import OnDrop
from iared2.interpreter import InterpreterConfig
from iared2.keep import BatchBudget, KeepRule, Threshold, TopK
from iared2.settings import Settings


class ReductionConfig(Settings):
    """Where and how a backbone is reduced. Blocks are counted from 0."""

    first_blocks: tuple[int, ...] = Field(description="the block before which each group reduces, ascending")
    interpreter: InterpreterConfig = InterpreterConfig()
    rule: Literal["threshold", "top_k", "batch_budget"] = "threshold"
    thresholds: tuple[float, ...] = Field((), description="one per group; empty means 0.5 everywhere")
    ratios: tuple[float, ...] = Field((), description="share of the grid kept after each group (top_k, batch_budget)")
    on_drop: OnDrop = "discard"

    @model_validator(mode="after")
    def _one_value_per_group(self) -> "ReductionConfig":
        count = len(self.first_blocks)
        if not count or list(self.first_blocks) != sorted(set(self.first_blocks)) or self.first_blocks[0] < 0:
            raise ValueError(f"first_blocks: got {list(self.first_blocks)}, wanted ascending block numbers from 0")
        if self.thresholds and len(self.thresholds) != count:
            raise ValueError(f"thresholds: got {len(self.thresholds)}, wanted one for each of {count} groups")
        if self.rule != "threshold" and len(self.ratios) != count:
            raise ValueError(f"ratios: got {len(self.ratios)}, wanted one for each of {count} groups")
        return self

    def keep_rule(self, group: int, spare_best: bool) -> KeepRule:
        """The keep rule of a group."""
        if self.rule == "top_k":
            return TopK(self.ratios[group])
        if self.rule == "batch_budget":
            return BatchBudget(self.ratios[group], spare_best)
        return Threshold(self.thresholds[group] if self.thresholds else 0.5, spare_best)


def even_groups(depth: int, groups: int) -> tuple[int, ...]:
    """The first blocks of `groups` equal groups.

    Raises:
        ConfigError: the depth is not divisible by the number of groups.
    """
    if groups < 1 or depth % groups:
        divisors = [d for d in range(1, depth + 1) if depth % d == 0]
        raise ConfigError(
            f"groups: got {groups}, which does not divide the backbone's {depth} blocks evenly; "
            f"choose one of {divisors}, or give the first block of each group, e.g. groups=({depth // 3}, {2 * depth // 3})"
        )
    return tuple(range(0, depth, depth // groups))
