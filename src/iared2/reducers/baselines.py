"""What ours is measured against: ToMe off the shelf, class attention without training, chance. Nothing here is learned.

| reducer | who scores | what becomes of the rest |
|---|---|---|
| `ToMeReducer` | similarity of keys alone (Bolya et al. 2023): r tokens per block, between attention and FFN | merged |
| `AttentionReducer` | class attention of the nearest attention | discarded, or merged |
| `RandomReducer` | chance (the paper's Table 2) | discarded |
"""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from iared2.handover import Judged, OnDrop, comparing_macs, hand_over
from iared2.interpreter import relative_log
from iared2.keep import KeepRule, TopK
from iared2.reducers.base import Reducer, Reduction
from iared2.seeds import uniform_per_image
from iared2.similarity import compare
from iared2.tokens.packed import PackedTokens, merge, select_places


class ToMeReducer(Reducer):
    """Token merging: patches in even places look for the most similar one in odd places; the r best pairs become one token.

    Keys are averaged over heads. Prefix tokens take no part. Images must have equal lengths, which ToMe keeps.

    Args:
        pairs: r; at most half of the patches are merged.
        key_width: K, for the count of multiply-adds.
    """

    wants_keys = True
    merges = True

    def __init__(self, pairs: int, key_width: int) -> None:
        super().__init__()
        self.pairs, self.key_width = pairs, key_width

    def forward(
        self, tokens: PackedTokens, key_THK: Float[Tensor, "T H K"] | None, class_TH: Float[Tensor, "T H"] | None = None
    ) -> Reduction:
        del class_TH
        layout = tokens.layout
        if layout.uniform is None or key_THK is None:
            raise ValueError("ToMe: images of one length and the block's keys are needed")
        images, length, prefix = layout.images, layout.uniform, layout.prefix
        unit_BPK = F.normalize(key_THK.mean(1), dim=-1).view(images, length, -1)[:, prefix:]
        source, goal = unit_BPK[:, ::2], unit_BPK[:, 1::2]
        best, which = (source @ goal.transpose(1, 2)).max(-1)
        pairs = min(self.pairs, goal.shape[1])
        gone = best.topk(pairs, dim=1).indices
        score_BP = unit_BPK.new_zeros(images, length - prefix)
        score_BP[:, ::2] = -best
        score_BP[:, 1::2] = 1.0  # never merged away
        keep = torch.ones(images, length - prefix, dtype=torch.bool, device=gone.device)
        keep.scatter_(1, 2 * gone, False)
        rows_BK = keep.nonzero()[:, 1].view(images, -1) + prefix
        chosen = select_places(rows_BK, layout)
        start_B1 = torch.arange(images, device=gone.device)[:, None] * length + prefix
        gone_G, carrier_G = (start_B1 + 2 * gone).flatten(), (start_B1 + 2 * which.gather(1, gone) + 1).flatten()
        score_T = F.pad(score_BP, (prefix, 0)).flatten()
        return Reduction(layout, score_T.float(), chosen, merge(tokens, chosen, gone_G, carrier_G))

    def macs(self, entering: int, kept: int) -> int:
        del kept
        odd = entering // 2
        return ((entering - odd) * odd + entering) * self.key_width


class _Untrained(Reducer):
    """What the two baselines below share: scores by `scores`, a keep rule, and one of the hand-overs.

    Args:
        width: D, for the count of multiply-adds.
    """

    def __init__(self, rule: KeepRule, on_drop: OnDrop, width: int) -> None:
        super().__init__()
        self.rule, self.on_drop, self.width = rule, on_drop, width
        self.merges, self.wants_keys = on_drop != "discard", on_drop == "merge"

    @abstractmethod
    def scores(self, tokens: PackedTokens, class_TH: Float[Tensor, "T H"] | None) -> Float[Tensor, " T"]:
        """One score per row; those of prefix rows mean nothing."""

    def forward(
        self, tokens: PackedTokens, key_THK: Float[Tensor, "T H K"] | None, class_TH: Float[Tensor, "T H"] | None = None
    ) -> Reduction:
        score_T = self.scores(tokens, class_TH)
        chosen = self.rule(score_T, tokens.layout)
        features_TF = tokens.x_TD if key_THK is None else key_THK.flatten(1)
        cosines = compare(features_TF, tokens.layout) if self.wants_keys else None
        return Reduction(tokens.layout, score_T, chosen, hand_over(tokens, chosen, self.on_drop, Judged(score_T, score_T, cosines)))

    def macs(self, entering: int, kept: int) -> int:
        del kept
        return comparing_macs(entering, self.width) if self.wants_keys else 0


class AttentionReducer(_Untrained):
    """Keeps the patches that the class token attends to most, mean over heads."""

    wants_class = True

    def scores(self, tokens: PackedTokens, class_TH: Float[Tensor, "T H"] | None) -> Float[Tensor, " T"]:
        if class_TH is None:
            raise ValueError("class attention: the class token's logits are needed; reduce behind an attention layer")
        logit_TH = relative_log(class_TH, tokens.layout)
        if tokens.mass_T is not None:
            logit_TH = logit_TH + tokens.mass_T.log()[:, None]
        share_T = logit_TH.exp().mean(1)
        return share_T / (1 + share_T)

    def macs(self, entering: int, kept: int) -> int:
        return entering * self.width + super().macs(entering, kept)


class RandomReducer(_Untrained):
    """Keeps a random share of the patches, and discards the others.

    In training the draws are the batch's own, so that a resumed run repeats them; elsewhere they come from a generator of `seed`.
    """

    def __init__(self, ratio: float, seed: int = 0) -> None:
        super().__init__(TopK(ratio), "discard", width=0)  # nothing is matched
        self._draw = torch.Generator().manual_seed(seed)

    def scores(self, tokens: PackedTokens, class_TH: Float[Tensor, "T H"] | None) -> Float[Tensor, " T"]:
        del class_TH
        layout = tokens.layout
        drawn_BN = uniform_per_image(layout.images, layout.places, tokens.x_TD.device)
        if drawn_BN is None:
            drawn_BN = torch.rand(layout.images, layout.places, generator=self._draw).to(tokens.x_TD.device)
        return drawn_BN[layout.image_T, layout.origin_T.clamp(min=0)]


def with_reducers(model: torch.nn.Module, reducers: Sequence[Reducer]) -> None:
    """Puts other reducers, one per group, in place of a model's own."""
    model.reducers = torch.nn.ModuleList(reducers)
