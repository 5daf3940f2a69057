"""The walk: a backbone run block by block on packed tokens, with reducers in between. It can pause before any block."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from iared2.backbones.base import BackboneAdapter
from iared2.reducers.base import Reduction
from iared2.reduction import ReductionConfig
from iared2.tokens.packed import PackedTokens


@dataclass(frozen=True)
class State:
    """A forward pass paused before a block: tokens, the keys of the block before, reductions so far."""

    tokens: PackedTokens
    key_THK: Float[Tensor, "T H K"] | None
    block: int
    reductions: tuple[Reduction, ...] = ()


class Walker(nn.Module):
    """A backbone behind its adapter, and one reducer per group.

    Attributes:
        backbone: the untouched module.
        reducers: one per entry of `config.first_blocks`.
    """

    adapter: BackboneAdapter
    backbone: Any  # timm's attributes are not typed
    reducers: Any  # an nn.ModuleList of reducers
    config: ReductionConfig

    def start(self, images: Float[Tensor, "B C height width"]) -> State:
        """Pixels -> the state before block 0."""
        return State(self.adapter.embed(images), None, 0)

    def walk(self, state: State, stop: int, reduce: Sequence[int] | None = None) -> State:
        """Runs blocks up to (not including) `stop`, with the reducers of the given groups (all by default)."""
        groups = {b: g for g, b in enumerate(self.config.first_blocks) if reduce is None or g in reduce}
        done = len(state.reductions)
        for block in range(state.block, stop):
            group = groups.get(block)
            if group is not None and group >= done:
                state = self.reduce_with(state, group)
            state = self.run_block(state, block)
        return state

    def reduce_with(self, state: State, group: int) -> State:
        """Applies one group's reducer to a paused state."""
        return self.after_reduction(state, self.reducers[group](state.tokens, state.key_THK))

    def after_reduction(self, state: State, reduction: Reduction) -> State:
        """The state that goes on after a reduction."""
        record = replace(reduction, tokens=reduction.tokens.without_x())  # places are remembered, values would only fill memory
        return replace(state, tokens=reduction.tokens, key_THK=None, reductions=(*state.reductions, record))

    def run_block(self, state: State, block: int) -> State:
        """One block. Its keys are kept only where the next block's reducer asks for them."""
        following = block + 1
        wanted = following in self.config.first_blocks and self.reducers[self.config.first_blocks.index(following)].wants_keys
        attended = self.adapter.attend(block, state.tokens, wanted)
        return replace(state, tokens=self.adapter.feed(block, attended.tokens), key_THK=attended.key_THK, block=following)
