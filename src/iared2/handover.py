"""Hand-over: what becomes of the tokens that are dropped.

`discard` is the paper's. `merge` averages each dropped token, by what `Merging` says, into the most similar kept patch token
of its image; from then on attention counts a token as often as it has patches. Where an image keeps no patch,
nothing is handed over. Similarity is the cosine between features: the last attention's keys, heads concatenated, or the tokens as
the next half of the block reads them. In the average each patch may also count by its score: what matters then changes little
when what does not matter is handed to it. Or the kept token alone counts: then what is dropped is gone as with `discard`, and only its
number is handed over, so that attention goes on as if its carrier stood in all its places.
`fuse` averages all dropped tokens of an image into one summary token, which goes on in the place of the best of them (EViT's
idea, weighted here as in merging); the next reduction judges it like any other token.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from iared2.similarity import Cosines, nearest_among
from iared2.tokens.packed import PackedTokens, Selection, gone_rows, merge, take, with_best_of_gone

OnDrop = Literal["discard", "merge", "fuse"]
Similarity = Literal["keys", "tokens"]
Weights = Literal["mass", "score", "kept"]


@dataclass(frozen=True)
class Merging:
    """How dropped tokens are merged.

    Attributes:
        keep_length: merged tokens get the average length of their parts (`packed.merge`).
        similarity: what tokens are compared by.
        weights: what a part counts in the average: its patches ("mass"), each of them times the part's score ("score"), or nothing beside
            the kept token ("kept").
    """

    keep_length: bool = False
    similarity: Similarity = "keys"
    weights: Weights = "mass"


def hand_over(
    tokens: PackedTokens,
    chosen: Selection,
    how: OnDrop,
    cosines: Cosines | None = None,
    relevance_T: Float[Tensor, " T"] | None = None,
    **average: Any,
) -> PackedTokens:
    """Goes on with the chosen rows and disposes of the others.

    Args:
        cosines: similarities between the tokens; needed by "merge" alone.
        relevance_T: says which dropped token is the best of its image; needed by "fuse" alone.
        average: how merged tokens are averaged: `keep_length` and `weight_T` of `packed.merge`.
    """
    rows = tokens.layout.image_T.shape[0]
    if how == "discard":
        return take(tokens, chosen)
    if how == "fuse":
        if relevance_T is None:
            raise ValueError("hand-over: 'fuse' needs to know how relevant tokens are")
        chosen, summary_B = with_best_of_gone(chosen, relevance_T, tokens.layout)
        gone_G = gone_rows(chosen, rows)
        return merge(tokens, chosen, gone_G, summary_B[tokens.layout.image_T[gone_G]], **average)
    if cosines is None:
        raise ValueError("hand-over: 'merge' needs to know how similar tokens are")
    gone_G = gone_rows(chosen, rows)
    return merge(tokens, chosen, gone_G, carriers(cosines, chosen, gone_G), **average)


def carriers(cosines: Cosines, chosen: Selection, gone_G: Int[Tensor, " G"]) -> Int[Tensor, " G"]:
    """The row that carries each dropped row on: the most similar chosen patch of its image, or -1 if there is none."""
    kept_T = torch.zeros_like(cosines.layout.is_patch_T).index_fill(0, chosen.index_S, True) & cosines.layout.is_patch_T
    return nearest_among(cosines, gone_G, kept_T)


def comparing_macs(entering: int, features: int) -> int:
    """Multiply-adds of comparing the patches of one image with one another, and of the norms; matching then costs none."""
    return entering * (entering + 1) * features
