"""Hand-over: what becomes of the tokens that are dropped.

`discard` is the paper's. `merge` averages each dropped token, by what `Merging` says, into the most similar kept patch token
of its image; from then on attention counts a token as often as it has patches. Where an image keeps no patch,
nothing is handed over. Similarity is the cosine between features: the last attention's keys, heads concatenated, or the tokens as
the next half of the block reads them. In the average each patch may also count by its score: what matters then changes little
when what does not matter is handed to it. Or the kept token alone counts: then what is dropped is gone as with `discard`, and only its
number is handed over, so that attention goes on as if its carrier stood in all its places.
`fuse` averages all dropped tokens of an image into one summary token, which goes on in the place of the best of them (EViT's
idea, weighted here as in merging: where the kept alone count, the best stands for all); the next reduction judges it like any other token.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from iared2.similarity import Cosines, nearest_among
from iared2.tokens.packed import PackedTokens, Selection, gone_rows, merge, take, with_best_of_gone

OnDrop = Literal["discard", "merge", "fuse"]
Similarity = Literal["keys", "tokens"]
Weights = Literal["mass", "score", "kept"]

_LEAST = 1e-4  # of a score as a weight, so that no average is divided by nothing
_NOTHING = 1e-30  # beside the weight of 1 of what goes on, and yet no average is divided by nothing


@dataclass(frozen=True)
class Judged:
    """Scored tokens: the scores, the chances that rules act on, and similarities where somebody needs them."""

    score_T: Float[Tensor, " T"]
    chance_T: Float[Tensor, " T"]
    cosines: Cosines | None = None

    def detach(self) -> "Judged":
        """Without gradients."""
        return Judged(self.score_T.detach(), self.chance_T.detach(), self.cosines)


@dataclass(frozen=True)
class Merging:
    """How dropped tokens are merged.

    Attributes:
        keep_length: merged tokens get the average length of their parts (`packed.merge`).
        similarity: what tokens are compared by.
        weights: what a part counts in the average: its patches ("mass"), each of them times the part's score ("score"), or nothing beside
            the token that goes on ("kept").
    """

    keep_length: bool = False
    similarity: Similarity = "keys"
    weights: Weights = "mass"

    def weights_of(self, score_T: Float[Tensor, " T"], chosen: Selection) -> Float[Tensor, " T"] | None:
        """What one patch of each row counts in averages, where the chosen rows go on; None: all alike."""
        if self.weights == "mass":
            return None
        if self.weights == "score":
            return score_T.clamp(min=_LEAST)
        return torch.full_like(score_T, _NOTHING).index_fill(0, chosen.index_S, 1.0)  # scores have 32 bits or more


PLAIN = Merging()


def hand_over(
    tokens: PackedTokens,
    chosen: Selection,
    how: OnDrop,
    judged: Judged | None = None,
    merging: Merging = PLAIN,
) -> PackedTokens:
    """Goes on with the chosen rows and disposes of the others.

    Args:
        judged: what is known of the tokens: "merge" needs similarities, "fuse" chances, which say what is the best of what an image drops.
        merging: how these two average.
    """
    rows = tokens.layout.image_T.shape[0]  # not len(): an exported graph would take it for a constant
    if how == "discard":
        return take(tokens, chosen)
    if judged is None:
        raise ValueError(f"hand-over: {how!r} needs to know how relevant tokens are")
    if how == "fuse":
        chosen, summary_B = with_best_of_gone(chosen, judged.chance_T, tokens.layout)
        gone_G = gone_rows(chosen, rows)
        carrier_G = summary_B[tokens.layout.image_T[gone_G]]
    elif judged.cosines is None:
        raise ValueError("hand-over: 'merge' needs to know how similar tokens are")
    else:
        gone_G = gone_rows(chosen, rows)
        carrier_G = carriers(judged.cosines, chosen, gone_G)
    return merge(tokens, chosen, gone_G, carrier_G, merging.keep_length, merging.weights_of(judged.score_T.detach(), chosen))


def carriers(cosines: Cosines, chosen: Selection, gone_G: Int[Tensor, " G"]) -> Int[Tensor, " G"]:
    """The row that carries each dropped row on: the most similar chosen patch of its image, or -1 if there is none."""
    kept_T = torch.zeros_like(cosines.layout.is_patch_T).index_fill(0, chosen.index_S, True) & cosines.layout.is_patch_T
    return nearest_among(cosines, gone_G, kept_T)


def comparing_macs(entering: int, features: int) -> int:
    """Multiply-adds of comparing the patches of one image with one another, and of the norms; matching then costs none."""
    return entering * (entering + 1) * features
