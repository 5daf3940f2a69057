"""Padding: images of similar length side by side, for products within each image.

Blocks compute on packed tokens and never on padding. What compares an image's tokens with one another (attention,
similarity) or multiplies them by the image's own matrix is a batched product, because one call per image would cost more
than the products themselves; but on the host, where images are long, a matrix of a few columns is multiplied image by image,
because moving rows would cost more. Where the host knows the lengths, images are sorted into a few buckets by length, so that
little is padded; elsewhere (accelerators, compiled graphs) there is one bucket, and nobody waits for the device.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

MOST_BUCKETS = 4
STEP = 16  # long buckets are padded to multiples of it, where attention on CPUs is fastest
LONG = 32  # tokens from which on a bucket, or images on average, are long


@dataclass(frozen=True)
class Bucket:
    """b images, padded to L places.

    Attributes:
        row_bL: the packed row at each place; what stands at padded places is some row of the pack.
        image_b: which images; None means all, in order.
        filled_bL: which places are rows of the image; None means all.
    """

    row_bL: Int[Tensor, "b L"]
    image_b: Int[Tensor, " b"] | None = None
    filled_bL: Bool[Tensor, "b L"] | None = None


@dataclass(frozen=True)
class Padding:
    """How packed rows lie in buckets.

    Attributes:
        buckets: the buckets.
        place_T: where each packed row lies among all places, one bucket after the other; None means in order.
        lengths: rows per image, where the host knows them and images are so long that one call for each pays.
    """

    buckets: tuple[Bucket, ...]
    place_T: Int[Tensor, " T"] | None = None
    lengths: tuple[int, ...] | None = None

    def spread(self, value_T: Tensor) -> list[Tensor]:
        """(T, ...) values of packed rows, bucket by bucket: (b, L, ...)."""
        if self.place_T is None:
            (bucket,) = self.buckets
            return [value_T.view(*bucket.row_bL.shape, *value_T.shape[1:])]
        shapes = [(*bucket.row_bL.shape, *value_T.shape[1:]) for bucket in self.buckets]
        if not torch.compiler.is_compiling() and not value_T.shape[0]:  # no row to stand at padded places
            return [value_T.new_zeros(shape) for shape in shapes]
        parts = zip(self.buckets, shapes, strict=True)
        return [value_T.index_select(0, bucket.row_bL.flatten()).view(shape) for bucket, shape in parts]

    def collect(self, values: Sequence[Tensor]) -> Tensor:
        """(b, L, ...) values of the buckets back in packed order: (T, ...)."""
        flat = torch.cat([value.flatten(0, 1) for value in values]) if len(values) != 1 else values[0].flatten(0, 1)
        return flat if self.place_T is None else flat.index_select(0, self.place_T)


def uniform_padding(images: int, length: int, device: torch.device) -> Padding:
    """Images of one length: nothing is padded, and nothing is moved."""
    row_BL = torch.arange(images * length, device=device).view(images, length)
    return Padding((Bucket(row_BL),))


def one_bucket(cu_B1: Int[Tensor, " B1"], image_T: Int[Tensor, " T"], longest: int) -> Padding:
    """All images padded to `longest`, an upper bound of the lengths; their lengths stay unknown to the host."""
    start_B, length_B = cu_B1[:-1].long(), cu_B1.diff()
    step_L = torch.arange(longest, device=cu_B1.device)
    filled_BL = step_L < length_B[:, None]
    row_BL = torch.where(filled_BL, start_B[:, None] + step_L, 0)
    row_T = torch.arange(image_T.shape[0], device=cu_B1.device)
    return Padding((Bucket(row_BL, None, filled_BL),), image_T * longest + row_T - start_B[image_T])


def buckets_by_length(offsets: Sequence[int]) -> Padding:
    """Images sorted by length into a few buckets (at most sqrt(B)), each padded to its longest image, or a little more (`STEP`)."""
    offset_B1 = torch.tensor(offsets)
    length_B = offset_B1.diff()
    order_B = length_B.argsort(stable=True)
    count = max(1, min(MOST_BUCKETS, math.isqrt(len(order_B))))
    place_T, first, buckets = torch.empty(offsets[-1], dtype=torch.int64), 0, []
    for image_b in order_B.chunk(count):
        length_b, start_b = length_B[image_b, None], offset_B1[image_b, None]
        longest = max([1, *length_b[-1:].flatten().tolist()])  # one place at least: reductions over none are errors
        step_L = torch.arange(longest if longest < LONG else -(-longest // STEP) * STEP)
        filled_bL = step_L < length_b
        row_bL = torch.where(filled_bL, start_b + step_L, start_b.clamp(max=max(0, offsets[-1] - 1)))
        place_T[row_bL[filled_bL]] = first + filled_bL.flatten().nonzero().squeeze(1)
        first += row_bL.numel()
        buckets.append(Bucket(row_bL, image_b, None if bool(filled_bL.all()) else filled_bL))
    long = offsets[-1] >= LONG * len(order_B) > 0
    return Padding(tuple(buckets), place_T, tuple(length_B.tolist()) if long else None)


def times_own_matrix(x_TD: Float[Tensor, "T D"], weight_BDH: Float[Tensor, "B D H"], padding: Padding) -> Float[Tensor, "T H"]:
    """Each row times the matrix of its image, in fp32 at least."""
    exact, out = torch.promote_types(x_TD.dtype, torch.float32), []
    with torch.autocast(x_TD.device.type, enabled=False):
        if padding.lengths is not None:  # one small product per image: moving rows would take longer
            parts = zip(x_TD.to(exact).split(padding.lengths), weight_BDH.to(exact), strict=True)
            return torch.cat([x_LD @ weight_DH for x_LD, weight_DH in parts])
        for x_bLD, bucket in zip(padding.spread(x_TD), padding.buckets, strict=True):
            weight_bDH = weight_BDH if bucket.image_b is None else weight_BDH[bucket.image_b]
            out.append(x_bLD.to(exact) @ weight_bDH.to(exact))
    return padding.collect(out)
