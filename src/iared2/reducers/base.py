"""What a reducer is: scorer + keep rule + hand-over, acting before a block or between its two halves."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from iared2.tokens.packed import Layout, PackedTokens, Selection, scatter_places


@dataclass(frozen=True)
class Reduction:
    """One reduction as it happened: what came in, the scores, what goes on.

    `chance_T` is what the rule acted on, where that is not the score itself.
    """

    before: Layout
    score_T: Float[Tensor, " T"]
    chosen: Selection
    tokens: PackedTokens
    chance_T: Float[Tensor, " T"] | None = None

    @property
    def score_BN(self) -> Float[Tensor, "B N"]:
        """Scores on the grid; patches that were gone before count as zero (section 3.2)."""
        return scatter_places(self.score_T, self.before)

    @property
    def keep_BN(self) -> Bool[Tensor, "B N"]:
        """Places that still have a token of their own."""
        layout = self.tokens.layout
        return scatter_places(layout.is_patch_T.long(), layout) > 0

    @property
    def entering_B(self) -> Int[Tensor, " B"]:
        """Patch tokens per image before the reduction."""
        return self.before.length_B - self.before.prefix

    @property
    def kept_B(self) -> Int[Tensor, " B"]:
        """Patch tokens per image after it: |u|_0 of Eq. 2."""
        return self.tokens.layout.length_B - self.before.prefix


class Reducer(nn.Module, ABC):
    """Shortens a pack before a block.

    Attributes:
        wants_keys: whether `forward` needs the keys of the attention before it.
        wants_tokens: whether it takes, in place of keys, the tokens as the next half of the block reads them.
        wants_class: whether `forward` needs the class token's logits in that attention.
        merges: whether dropped patches live on in kept ones.
    """

    wants_keys: bool = False
    wants_tokens: bool = False
    wants_class: bool = False
    merges: bool = False

    @abstractmethod
    def forward(
        self, tokens: PackedTokens, key_THK: Float[Tensor, "T _H K"] | None, class_TH: Float[Tensor, "T H"] | None = None
    ) -> Reduction:
        """Reduces one pack.

        Args:
            key_THK: keys of the attention before it, for the same rows (or what `wants_tokens` asks for, as one head); None where
                there are none, as before block 0, or where nobody wants them.
            class_TH: the class token's logits in that attention, likewise.
        """

    @abstractmethod
    def macs(self, entering: int, kept: int) -> int:
        """Multiply-adds of the reduction itself for one image."""
