"""Hand-over: what becomes of the tokens that are dropped.

`discard` is the paper's. `merge` averages each dropped token, by mass, into the most similar kept patch token
of its image; from then on attention counts a token as often as it has patches. Where an image keeps no patch,
nothing is handed over. Similarity is the cosine between features (the previous block's keys, heads concatenated).
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from iared2.tokens.packed import GONE, PackedTokens, Selection, merge, take

OnDrop = Literal["discard", "merge"]


def hand_over(
    tokens: PackedTokens, chosen: Selection, how: OnDrop, features_TF: Float[Tensor, "T F"] | None, keep_length: bool = False
) -> PackedTokens:
    """Goes on with the chosen rows and disposes of the others.

    Args:
        features_TF: what similarity is measured on; None means the tokens themselves. Unused by "discard".
        keep_length: merged tokens get the average length of their parts (`packed.merge`).
    """
    if how == "discard":
        return take(tokens, chosen)
    features_TF = tokens.x_TD if features_TF is None else features_TF
    return merge(tokens, chosen, carriers(features_TF.detach(), tokens, chosen), keep_length)


def carriers(features_TF: Float[Tensor, "T F"], tokens: PackedTokens, chosen: Selection) -> Int[Tensor, " T"]:
    """The row that carries each row on: itself if chosen, the most similar chosen patch, or -1 if there is none."""
    layout = tokens.layout
    stays_T = torch.zeros_like(layout.is_patch_T).index_fill(0, chosen.index_S, True)
    if layout.uniform is not None and chosen.uniform is not None:
        return _match_uniform(F.normalize(features_TF, dim=-1), stays_T, layout.uniform, layout.prefix, chosen)
    if torch.compiler.is_compiling():
        return torch.ops.iared2.match(features_TF, stays_T, layout.is_patch_T, layout.cu_B1, layout.longest)
    offsets = layout.offsets if features_TF.device.type == "cpu" else None  # elsewhere the host would have to wait for them
    return _match(features_TF, stays_T, layout.is_patch_T, layout.cu_B1, layout.longest, offsets)


def _match_uniform(unit_TF: Tensor, stays_T: Tensor, length: int, prefix: int, chosen: Selection) -> Tensor:
    """Static shapes throughout: every row is compared with the kept patches of its image."""
    assert chosen.uniform is not None
    images = unit_TF.shape[0] // length
    kept_BK = chosen.index_S.view(images, chosen.uniform)[:, prefix:]
    itself_T = torch.arange(unit_TF.shape[0], device=unit_TF.device)
    if kept_BK.shape[1] == 0:
        return torch.where(stays_T, itself_T, GONE)
    similar_BSK = unit_TF.view(images, length, -1) @ unit_TF[kept_BK].transpose(1, 2)
    nearest_BS = kept_BK.gather(1, similar_BSK.argmax(-1))
    return torch.where(stays_T, itself_T, nearest_BS.reshape(-1))


def _match(
    features_TF: Tensor, stays_T: Tensor, is_patch_T: Tensor, cu_B1: Tensor, longest: int, offsets: list[int] | None = None
) -> Tensor:
    """Nearest kept patch within each image; a choice, so no gradient flows through it."""
    itself_T = torch.arange(features_TF.shape[0], device=features_TF.device)
    candidate_T = stays_T & is_patch_T
    if features_TF.device.type == "cpu":
        nearest_T = _match_by_image(features_TF, stays_T, candidate_T, cu_B1.tolist() if offsets is None else offsets)
    else:
        nearest_T = _match_padded(F.normalize(features_TF, dim=-1), candidate_T, cu_B1, longest)
    return torch.where(stays_T, itself_T, nearest_T)


@torch.library.custom_op("iared2::match", mutates_args=())
def _match_op(features_TF: Tensor, stays_T: Tensor, is_patch_T: Tensor, cu_B1: Tensor, longest: int) -> Tensor:
    """`_match` as one opaque operator, so that compiled graphs need not know the lengths."""
    return _match(features_TF, stays_T, is_patch_T, cu_B1, longest)


@_match_op.register_fake
def _match_shape(features_TF: Tensor, stays_T: Tensor, is_patch_T: Tensor, cu_B1: Tensor, longest: int) -> Tensor:
    return torch.empty_like(stays_T, dtype=torch.int64)


def _match_by_image(features_TF: Tensor, stays_T: Tensor, candidate_T: Tensor, offsets: list[int]) -> Tensor:
    """The length of a dropped row scales all its similarities alike, so kept rows alone are normalised."""
    nearest_T = torch.full((features_TF.shape[0],), GONE)
    for start, stop in zip(offsets[:-1], offsets[1:], strict=True):
        kept = candidate_T[start:stop].nonzero().squeeze(1) + start
        dropped = (~stays_T[start:stop]).nonzero().squeeze(1) + start
        if len(kept) and len(dropped):
            unit_KF = F.normalize(features_TF.index_select(0, kept), dim=-1)
            nearest_T[dropped] = kept[(features_TF.index_select(0, dropped) @ unit_KF.T).argmax(1)]
    return nearest_T


def _match_padded(unit_TF: Tensor, candidate_T: Tensor, cu_B1: Tensor, longest: int) -> Tensor:
    """One batched product on accelerators, where a loop over images would wait B times.

    Only this comparison is padded; the tokens that blocks compute on never are.
    """
    images, rows = len(cu_B1) - 1, unit_TF.shape[0]
    start_B = cu_B1[:-1].long()
    image_T = torch.bucketize(torch.arange(rows, device=unit_TF.device), cu_B1[1:].long(), right=True)
    within_T = torch.arange(rows, device=unit_TF.device) - start_B[image_T]
    flat_T = image_T * longest + within_T
    padded = unit_TF.new_zeros(images * longest, unit_TF.shape[1]).index_copy(0, flat_T, unit_TF)
    allowed = torch.zeros(images * longest, dtype=torch.bool, device=unit_TF.device).index_copy(0, flat_T, candidate_T)
    padded, allowed_BL = padded.view(images, longest, -1), allowed.view(images, longest)
    similar = (padded @ padded.transpose(1, 2)).masked_fill(~allowed_BL[:, None, :], float("-inf"))
    nearest_T = similar.argmax(-1).view(-1)[flat_T] + start_B[image_T]
    return torch.where(allowed_BL.any(1)[image_T], nearest_T, GONE)


def matching_macs(dropped: int, kept: int, features: int) -> int:
    """Multiply-adds of comparing every dropped with every kept patch of one image, and of the norms."""
    return dropped * kept * features + (dropped + kept) * features if dropped and kept else 0
