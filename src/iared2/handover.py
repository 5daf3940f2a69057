"""Hand-over: what becomes of the tokens that are dropped.

`discard` is the paper's. `merge` averages each dropped token, by mass, into the most similar kept patch token
of its image; from then on attention counts a token as often as it has patches. Where an image keeps no patch,
nothing is handed over. Similarity is the cosine between features (the previous block's keys, heads concatenated).
"""

from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from iared2.similarity import Cosines, nearest_among
from iared2.tokens.packed import PackedTokens, Selection, gone_rows, merge, take

OnDrop = Literal["discard", "merge"]


def hand_over(
    tokens: PackedTokens, chosen: Selection, how: OnDrop, cosines: Cosines | None = None, keep_length: bool = False
) -> PackedTokens:
    """Goes on with the chosen rows and disposes of the others.

    Args:
        cosines: similarities between the tokens; needed by "merge", unused by "discard".
        keep_length: merged tokens get the average length of their parts (`packed.merge`).
    """
    if how == "discard":
        return take(tokens, chosen)
    if cosines is None:
        raise ValueError("hand-over: 'merge' needs to know how similar tokens are")
    gone_G = gone_rows(chosen, tokens.layout.image_T.shape[0])
    return merge(tokens, chosen, gone_G, carriers(cosines, chosen, gone_G), keep_length)


def carriers(cosines: Cosines, chosen: Selection, gone_G: Int[Tensor, " G"]) -> Int[Tensor, " G"]:
    """The row that carries each dropped row on: the most similar chosen patch of its image, or -1 if there is none."""
    kept_T = torch.zeros_like(cosines.layout.is_patch_T).index_fill(0, chosen.index_S, True) & cosines.layout.is_patch_T
    return nearest_among(cosines, gone_G, kept_T)


def comparing_macs(entering: int, features: int) -> int:
    """Multiply-adds of comparing the patches of one image with one another, and of the norms; matching then costs none."""
    return entering * (entering + 1) * features
