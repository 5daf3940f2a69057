"""Where and how a backbone is reduced, as data."""

import math
from operator import index
from typing import Any, Literal

from pydantic import Field, field_serializer, model_validator

from iared2.errors import ConfigError
from iared2.handover import Merging, OnDrop, Similarity, Weights
from iared2.interpreter import InterpreterConfig
from iared2.keep import BatchBudget, KeepRule, Threshold, TopK
from iared2.settings import Settings
from iared2.worth import WorthConfig


class ReductionConfig(Settings):
    """Where and how a backbone is reduced. Blocks are counted from 0."""

    first_blocks: tuple[int, ...] = Field(description="the block at which each group reduces, ascending")
    place: Literal["before", "between"] = Field("before", description="before that block, or between its attention and its FFN")
    interpreter: InterpreterConfig = InterpreterConfig()
    worth: WorthConfig | None = Field(None, description="weigh scores by mass and similarity before the rule; None is the paper's")
    rule: Literal["threshold", "top_k", "batch_budget"] = "threshold"
    thresholds: tuple[float, ...] = Field((), description="one per group; empty means 0.5 everywhere")
    ratios: tuple[float, ...] = Field((), description="share of the grid kept after each group (top_k, batch_budget)")
    on_drop: OnDrop = "discard"
    keep_length: bool = Field(False, description="merged tokens keep the average length of their parts, not that of the average")
    similarity: Similarity = Field("keys", description="tokens are compared by keys, or as the next half of the block reads them")
    weights: Weights = Field(
        "mass", description="parts of a merged token count by their patches, by those times their scores, or not at all"
    )

    skip_unread: bool = Field(
        False, description="where the head reads prefix tokens alone, the last block computes no others: the same answer for less"
    )

    second_look: float = Field(
        0.0,
        ge=0,
        le=1,
        description="pictures whose two likeliest classes lie no further apart, in probability, are passed again, nothing dropped; 0: none",
    )

    @model_validator(mode="after")
    def _one_value_per_group(self) -> "ReductionConfig":
        count = len(self.first_blocks)
        if not count or list(self.first_blocks) != sorted(set(self.first_blocks)) or self.first_blocks[0] < 0:
            raise ValueError(f"first_blocks: got {list(self.first_blocks)}, wanted ascending block numbers from 0")
        if any(math.isnan(value) for value in self.thresholds):
            raise ValueError(f"thresholds: got {list(self.thresholds)}, wanted numbers; -1 keeps all patches")
        if self.thresholds and len(self.thresholds) != count:
            raise ValueError(f"thresholds: got {len(self.thresholds)}, wanted one for each of {count} groups")
        if any(not 0 < value <= 1 for value in self.ratios):
            raise ValueError(f"ratios: got {list(self.ratios)}, wanted numbers above 0 and at most 1")
        if (self.ratios and len(self.ratios) != count) or (self.rule != "threshold" and not self.ratios):
            raise ValueError(f"ratios: got {len(self.ratios)}, wanted one for each of {count} groups")
        return self

    @field_serializer("thresholds", when_used="json")
    def _no_infinity_in_json(self, values: tuple[float, ...]) -> list[float | str]:
        return [value if math.isfinite(value) else str(value) for value in values]

    @property
    def merging(self) -> Merging:
        """How dropped tokens are merged."""
        return Merging(self.keep_length, self.similarity, self.weights)

    def keep_rule(self, group: int, spare_best: bool) -> KeepRule:
        """The keep rule of a group."""
        if self.rule == "top_k":
            return TopK(self.ratios[group])
        if self.rule == "batch_budget":
            return BatchBudget(self.ratios[group], spare_best)
        return Threshold(self.thresholds[group] if self.thresholds else 0.5, spare_best)


def group_starts(depth: int, groups: Any) -> tuple[int, ...]:
    """The first blocks of even groups, or those that were given.

    Raises:
        ConfigError: neither a number of groups nor block numbers, or a depth that the number does not divide.
    """
    several = isinstance(groups, (list, tuple, range))
    try:
        numbers = tuple(index(number) for number in (groups if several else [groups]))
    except TypeError:
        numbers = None
    if numbers is None or isinstance(groups, bool):
        raise ConfigError(f"groups: got {groups!r}, wanted how many groups, or the first block of each, e.g. (4, 8)")
    return numbers if several else even_groups(depth, numbers[0])


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
