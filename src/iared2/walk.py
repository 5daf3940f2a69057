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
    """A forward pass paused before a block, or between its halves.

    Attributes:
        key_THK, class_TH: keys, and the class token's logits, of the last attention, where the next reducer wants them. In place of
            keys, the tokens as the next half of the block reads them, as one head, where it wants those.
        block: the block that comes next, or whose second half does.
        reductions: what was dropped so far.
        half: whether the block's attention has run.
    """

    tokens: PackedTokens
    key_THK: Float[Tensor, "T _H K"] | None
    block: int
    reductions: tuple[Reduction, ...] = ()
    class_TH: Float[Tensor, "T H"] | None = None
    half: bool = False


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
        tokens = self.adapter.embed(images)
        return State(tokens, self._read(tokens, 0, half=False), 0)

    def walk(self, state: State, stop: int, reduce: Sequence[int] | None = None) -> State:
        """Runs blocks up to (not including) `stop`, with the reducers of the given groups (all by default)."""
        for block in range(state.block, stop):
            state = self.run_block(state, block, self._due(state, block, reduce))
        return state

    def finish(self, state: State, reduce: Sequence[int] | None = None, skip_unread: bool | None = None) -> State:
        """Runs the blocks that are left, as far as the head will read them.

        With `skip_unread` (`config.skip_unread` by default), and a head that reads prefix tokens alone, the last block makes keys and
        values of patches, and everything else of prefix tokens only: the same answer for less. The state's tokens are those prefix
        tokens then.
        """
        last = self.adapter.depth - 1
        wanted = self.config.skip_unread if skip_unread is None else skip_unread
        if not (wanted and self._can_skip_unread) or (state.block, state.half) > (last, False):
            return self.walk(state, last + 1, reduce)
        state = self.walk(state, last, reduce)
        group = self._due(state, last, reduce)
        if group is not None:
            state = self.reduce_with(state, group)
        tokens = self.adapter.feed(last, self.adapter.attend_prefix(last, state.tokens))
        return replace(state, tokens=tokens, key_THK=None, class_TH=None, block=last + 1)

    def finish_dense(self, state: State) -> PackedTokens:
        """Runs the blocks that are left with nothing dropped, and asks no reducer; as `finish`, up to what the head will read."""
        tokens, last = state.tokens, self.adapter.depth - 1
        for block in range(state.block, self.adapter.depth):
            attended = block == state.block and state.half
            if not attended and block == last and self.skips_unread:
                tokens = self.adapter.attend_prefix(block, tokens)
            elif not attended:
                tokens = self.adapter.attend(block, tokens).tokens
            tokens = self.adapter.feed(block, tokens)
        return tokens

    @property
    def skips_unread(self) -> bool:
        """Whether the last block computes prefix tokens alone; not if patches are scored between its halves."""
        return self.config.skip_unread and self._can_skip_unread

    @property
    def _can_skip_unread(self) -> bool:
        scored = self.config.place == "between" and self.config.first_blocks[-1] == self.adapter.depth - 1
        return self.adapter.reads_prefix_alone and not scored

    def _due(self, state: State, block: int, reduce: Sequence[int] | None) -> int | None:
        """The group that reduces at this block, if it is among those asked for (all by default) and has not done so."""
        groups = self.config.first_blocks
        group = groups.index(block) if block in groups else None
        return None if group is None or group < len(state.reductions) or (reduce is not None and group not in reduce) else group

    def walk_to(self, state: State, group: int, reduce: Sequence[int]) -> State:
        """Runs up to the place where `group` reduces, with the reducers of the given groups."""
        block = self.config.first_blocks[group]
        state = self.walk(state, block, reduce)
        return self.attend_block(state, block) if self.config.place == "between" and not state.half else state

    def reduce_with(self, state: State, group: int) -> State:
        """Applies one group's reducer to a paused state."""
        reducer = self.reducers[group]
        # Reducers of other packages may not know of class logits.
        seen = (state.key_THK, state.class_TH) if reducer.wants_class else (state.key_THK,)
        return self.after_reduction(state, reducer(state.tokens, *seen))

    def after_reduction(self, state: State, reduction: Reduction) -> State:
        """The state that goes on after a reduction."""
        record = replace(reduction, tokens=reduction.tokens.without_x())  # places are remembered, values would only fill memory
        reductions = (*state.reductions, record)
        return replace(state, tokens=reduction.tokens, key_THK=None, class_TH=None, reductions=reductions)

    def run_block(self, state: State, block: int, group: int | None = None) -> State:
        """What is left of one block, with the reducer of `group` in its place."""
        between = self.config.place == "between"
        if group is not None and not between:
            state = self.reduce_with(state, group)
        if not state.half:
            state = self.attend_block(state, block)
        if group is not None and between:
            state = self.reduce_with(state, group)
        return self.feed_block(state, block)

    def attend_block(self, state: State, block: int) -> State:
        """The first half of a block. Its keys and class logits are kept only where the next reducer asks for them."""
        reducer = self._reducer_at(block if self.config.place == "between" else block + 1)
        keys, logits = (False, False) if reducer is None else (reducer.wants_keys, reducer.wants_class)
        # Adapters of other packages may not know of class logits.
        attended = self.adapter.attend(block, state.tokens, keys, **({"want_class": True} if logits else {}))
        seen = self._read(attended.tokens, block, half=True)
        key_THK = attended.key_THK if seen is None else seen
        return replace(state, tokens=attended.tokens, key_THK=key_THK, class_TH=attended.class_TH, block=block, half=True)

    def feed_block(self, state: State, block: int) -> State:
        """The second half of a block."""
        tokens = self.adapter.feed(block, state.tokens)
        seen = self._read(tokens, block + 1, half=False)
        return replace(state, tokens=tokens, key_THK=state.key_THK if seen is None else seen, block=block + 1, half=False)

    def _reducer_at(self, block: int) -> Any:
        """The reducer that acts at this block; None where there is none."""
        blocks = self.config.first_blocks
        return self.reducers[blocks.index(block)] if block in blocks else None

    def _read(self, tokens: PackedTokens, block: int, half: bool) -> Tensor | None:
        """The tokens as this half of the block reads them, as one head, if the reducer in front of it compares them so."""
        reducer = self._reducer_at(block) if half == (self.config.place == "between") else None
        # Reducers of other packages may not know of this.
        return self.adapter.read(block, tokens, half)[:, None] if getattr(reducer, "wants_tokens", False) else None
