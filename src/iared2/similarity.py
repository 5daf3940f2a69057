"""Similarity: cosines between the tokens of each image, computed once for whoever asks.

Whether a token is redundant and who carries it on are answered by the same products. A choice, so no gradient flows through.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from iared2.tokens.packed import GONE, Layout
from iared2.tokens.padded import Bucket, Padding


@dataclass(frozen=True)
class Cosines:
    """Cosines between all tokens of each image.

    Attributes:
        layout: of the pack.
        padding: how its rows lie in buckets; ordered by relevance or as they came.
        cosine_bLL: one tensor for each bucket. Those of padded places mean nothing.
    """

    layout: Layout
    padding: Padding
    cosine_bLL: list[Float[Tensor, "_b _L _L"]]


@torch.no_grad()
def compare(
    features_TF: Float[Tensor, "T F"], layout: Layout, relevance_T: Float[Tensor, " T"] | None = None, exact: bool = False
) -> Cosines:
    """Compares all tokens of each image.

    Args:
        relevance_T: if given, every image's patches are ordered by it, the most relevant first and of equals the earlier one;
            prefix tokens and padding come last.
        exact: in 32 bits at least, whatever the features and autocast have.
    """
    padding, device = layout.padding, features_TF.device.type
    if relevance_T is not None:
        padding = _by_relevance(padding, relevance_T.masked_fill(~layout.is_patch_T, float("-inf")))
    if exact:
        features_TF = features_TF.to(torch.promote_types(features_TF.dtype, torch.float32))
    unit_TF = F.normalize(features_TF, dim=-1)
    if (
        not exact and unit_TF.dtype == torch.float32 and torch.is_autocast_enabled(device)
    ):  # the products would make two copies of what is padded
        unit_TF = unit_TF.to(torch.get_autocast_dtype(device))
    unit_bLF = padding.spread(unit_TF)
    with torch.autocast(device, enabled=False) if exact else nullcontext():
        return Cosines(layout, padding, [unit @ unit.transpose(1, 2) for unit in unit_bLF])


def nearest_better(cosines: Cosines, pairs: bool = False) -> Float[Tensor, " T"]:
    """Each patch's largest cosine to a patch of more relevance in its image; -1 where there is none, and for prefix rows.

    Args:
        cosines: ordered by relevance.
        pairs: a patch and its nearest better one are tied; -1 also where another tie at either end is as close. A patch is in one pair at
            most, so of patches that are all alike no more than half have a partner.
    """
    layout, padding, near = cosines.layout, cosines.padding, []
    for cosine_bLL in cosines.cosine_bLL:
        length = cosine_bLL.shape[-1]
        # Those that are better stand before; the others are moved out of reach.
        near.append(cosine_bLL + cosine_bLL.new_full((length, length), -4.0).triu())
    if pairs:
        places = zip(padding.spread(layout.is_patch_T), padding.buckets, strict=True)
        patches = [patch_bL if bucket.filled_bL is None else patch_bL & bucket.filled_bL for patch_bL, bucket in places]
        found = [_near_partner(near_bLL, patch_bL) for near_bLL, patch_bL in zip(near, patches, strict=True)]
    else:
        found = [near_bLL.amax(-1) for near_bLL in near]
    return padding.collect([near_bL.clamp(-1.0, 1.0) for near_bL in found]).masked_fill(~layout.is_patch_T, -1.0)


def _near_partner(near_bLL: Float[Tensor, "_b _L _L"], patch_bL: Bool[Tensor, "_b _L"]) -> Float[Tensor, "_b _L"]:
    """Of every patch's tie to its nearest better one, how close it is if no other tie at either end is as close; else -1.

    Of equal ties that end at the same patch, that of the most relevant counts as closer.
    """
    near_bL, better_bL = near_bLL.max(-1)
    near_bL = near_bL.masked_fill(~patch_bL, -4.0)  # prefix tokens and padding tie nobody
    nobody = near_bL.shape[1]
    place_bL = torch.arange(nobody, device=near_bL.device).expand_as(better_bL)
    closest_bL = torch.full_like(near_bL, -4.0).scatter_reduce(1, better_bL, near_bL, "amax")  # of the ties that end here
    level_bL = near_bL == closest_bL.gather(1, better_bL)
    first_bL = torch.full_like(better_bL, nobody).scatter_reduce(1, better_bL, torch.where(level_bL, place_bL, nobody), "amin")
    pair_bL = (first_bL.gather(1, better_bL) == place_bL) & (near_bL > closest_bL) & (near_bL > near_bL.gather(1, better_bL))
    return torch.where(pair_bL | near_bL.isnan(), near_bL, -1.0)  # damage shows


def nearest_among(cosines: Cosines, row_G: Int[Tensor, " G"], candidate_T: Bool[Tensor, " T"]) -> Int[Tensor, " G"]:
    """For each of the given rows the most similar candidate row of its image; -1 where there is none."""
    padding, first = cosines.padding, 0
    place_G = row_G if padding.place_T is None else padding.place_T[row_G]
    nearest_G = torch.full_like(row_G, GONE)
    parts = zip(cosines.cosine_bLL, padding.buckets, padding.spread(candidate_T), strict=True)
    for cosine_bLL, bucket, candidate_bL in parts:
        images, length = bucket.row_bL.shape
        last = first + images * length
        # With one bucket all rows are in it: no question, so no waiting for an accelerator.
        asked = slice(None) if len(padding.buckets) == 1 else ((place_G >= first) & (place_G < last)).nonzero().squeeze(1)
        place_g = place_G[asked] - first
        image_g = place_g.div(length, rounding_mode="floor")
        here_bL = candidate_bL if bucket.filled_bL is None else candidate_bL & bucket.filled_bL
        here_gL = here_bL.index_select(0, image_g)
        best_g = cosine_bLL.flatten(0, 1).index_select(0, place_g).masked_fill(~here_gL, float("-inf")).argmax(-1, keepdim=True)
        found_g = torch.where(here_gL.any(1), bucket.row_bL[image_g].gather(1, best_g).squeeze(1), GONE)
        nearest_G[asked] = found_g
        first = last
    return nearest_G


def _by_relevance(padding: Padding, relevance_T: Float[Tensor, " T"]) -> Padding:
    """The same buckets, with the places of every image in order of relevance."""
    buckets, place_bL, first = [], [], 0
    for bucket, relevance_bL in zip(padding.buckets, padding.spread(relevance_T), strict=True):
        known_bL = relevance_bL if bucket.filled_bL is None else relevance_bL.masked_fill(~bucket.filled_bL, float("-inf"))
        # ONNX has no stable sort, but its TopK is one.
        exporting = torch.compiler.is_exporting()
        order_bL = known_bL.topk(known_bL.shape[1], dim=1).indices if exporting else known_bL.argsort(dim=1, descending=True, stable=True)
        filled_bL = None if bucket.filled_bL is None else bucket.filled_bL.gather(1, order_bL)
        buckets.append(Bucket(bucket.row_bL.gather(1, order_bL), bucket.image_b, filled_bL))
        # Where each place has gone to: the inverse of the order, among all places of all buckets.
        goal_bL = first + torch.arange(order_bL.numel(), device=order_bL.device).view_as(order_bL)
        place_bL.append(torch.empty_like(goal_bL).scatter_(1, order_bL, goal_bL))
        first += order_bL.numel()
    return Padding(tuple(buckets), padding.collect(place_bL))
