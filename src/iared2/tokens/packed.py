"""Packed tokens. Beside them, `padded` alone computes indices.

Shape legend, used for names and annotations everywhere:
    T packed tokens (all images one after the other)   B images   N patch places of the grid   L prefix tokens
    D width   H heads   K head width   F features   `x_TD` is a tensor of shape (T, D), `cu_B1` one of shape (B + 1,)

Every image's tokens are its prefix tokens followed by its remaining patch tokens, in the order of the grid.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from iared2.tokens.padded import Padding, buckets_by_length, one_bucket, uniform_padding

GONE = -1


@dataclass(frozen=True)
class Layout:
    """Where packed tokens lie and where they came from. Shared by all tensors of one pack.

    Attributes:
        cu_B1: int32 offsets; image b owns rows cu[b] to cu[b + 1].
        image_T: the image of each row.
        origin_T: the grid place of each patch token; -1 for prefix tokens.
        prefix: prefix tokens per image.
        grid: patches per axis, rows first.
        longest: an upper bound of the lengths that is known without asking the device.
        uniform: the common length, where every image has the same number of tokens by construction.
    """

    cu_B1: Int[Tensor, " B1"]
    image_T: Int[Tensor, " T"]
    origin_T: Int[Tensor, " T"]
    prefix: int
    grid: tuple[int, ...]
    longest: int
    uniform: int | None = None

    @property
    def images(self) -> int:
        return self.cu_B1.shape[0] - 1

    @property
    def places(self) -> int:
        total = 1
        for axis in self.grid:
            total *= axis
        return total

    @property
    def is_patch_T(self) -> Bool[Tensor, " T"]:
        return self.origin_T >= 0

    @property
    def prefix_row_BL(self) -> Int[Tensor, "B L"]:
        """The rows of each image's prefix tokens."""
        return self.cu_B1[:-1, None].long() + torch.arange(self.prefix, device=self.cu_B1.device)

    @property
    def length_B(self) -> Int[Tensor, " B"]:
        return self.cu_B1.diff()

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens per image on the host. Asks the device once per layout, unless the layout is uniform."""
        if self.uniform is not None:
            return [self.uniform] * self.images
        return self.length_B.tolist()

    @cached_property
    def offsets(self) -> list[int]:
        """`cu_B1` on the host, from `lengths`."""
        total, offsets = 0, [0]
        for length in self.lengths:
            total += length
            offsets.append(total)
        return offsets

    @property
    def padding(self) -> Padding:
        """How these rows lie when images stand side by side. Made once per layout; does not ask an accelerator."""
        return self._make_padding() if torch.compiler.is_compiling() else self._padding

    @cached_property
    def _padding(self) -> Padding:
        return self._make_padding()

    def _make_padding(self) -> Padding:
        if self.uniform is not None:
            return uniform_padding(self.images, self.uniform, self.image_T.device)
        if torch.compiler.is_compiling() or self.image_T.device.type != "cpu":
            return one_bucket(self.cu_B1, self.image_T, self.longest)
        return buckets_by_length(self.offsets)


@dataclass(frozen=True)
class Selection:
    """The rows of a pack that go on: their indices in ascending order, and the offsets they will have."""

    index_S: Int[Tensor, " S"]
    cu_B1: Int[Tensor, " B1"]
    uniform: int | None = None


@dataclass(frozen=True)
class PackedTokens:
    """Tokens of B images one after the other.

    Attributes:
        x_TD: the tokens.
        layout: lengths and origins.
        mass_T: how many patches each token stands for; None means that all stand for themselves alone.
        merged_BN: the carriers where patches have been merged; None means that nobody carries another.
    """

    x_TD: Float[Tensor, "T D"]
    layout: Layout
    mass_T: Float[Tensor, " T"] | None = None
    merged_BN: Int[Tensor, "B N"] | None = None

    @property
    def carrier_BN(self) -> Int[Tensor, "B N"]:
        """For each image and place, the place of the token that carries it, or -1 if it is gone."""
        if self.merged_BN is not None:
            return self.merged_BN
        return scatter_places(self.layout.origin_T + 1, self.layout) - 1

    def with_x(self, x_TD: Float[Tensor, "T D"]) -> "PackedTokens":
        """The same places with other values."""
        return replace(self, x_TD=x_TD)

    def without_x(self) -> "PackedTokens":
        """The same places with values of width 0, for records."""
        return replace(self, x_TD=self.x_TD.new_empty(self.x_TD.shape[0], 0))


def pack(x_BSD: Float[Tensor, "B S D"], prefix: int, grid: tuple[int, ...], origin_BP: Int[Tensor, "B P"] | None = None) -> PackedTokens:
    """Packs equally long sequences of prefix tokens and patch tokens.

    Args:
        x_BSD: S = prefix + patches tokens per image.
        prefix: prefix tokens in front of each image's patches.
        grid: patches per axis.
        origin_BP: grid places of the patches where some are missing already (patch dropout), else None.
    """
    images, length = x_BSD.shape[:2]
    device = x_BSD.device
    places = 1
    for axis in grid:
        places *= axis
    if origin_BP is None:
        origin_BP = torch.arange(places, device=device).expand(images, places)
    origin_BS = torch.cat([origin_BP.new_full((images, prefix), -1), origin_BP], dim=1)
    layout = Layout(
        cu_B1=torch.arange(images + 1, device=device, dtype=torch.int32) * length,
        image_T=torch.arange(images, device=device).repeat_interleave(length, output_size=images * length),
        origin_T=origin_BS.reshape(-1),
        prefix=prefix,
        grid=grid,
        longest=length,
        uniform=length,
    )
    return PackedTokens(x_BSD.flatten(0, 1), layout)


def split(tokens: PackedTokens) -> list[PackedTokens]:
    """One pack per image."""
    layout, packs = tokens.layout, []
    for image, (start, stop) in enumerate(zip(layout.offsets[:-1], layout.offsets[1:], strict=True)):
        rows = slice(start, stop)
        alone = Layout(
            cu_B1=layout.cu_B1.new_tensor([0, stop - start]),
            image_T=torch.zeros_like(layout.image_T[rows]),
            origin_T=layout.origin_T[rows],
            prefix=layout.prefix,
            grid=layout.grid,
            longest=stop - start,
            uniform=layout.uniform,
        )
        mass_T = None if tokens.mass_T is None else tokens.mass_T[rows]
        merged_BN = None if tokens.merged_BN is None else tokens.merged_BN[image : image + 1]
        packs.append(PackedTokens(tokens.x_TD[rows], alone, mass_T, merged_BN))
    return packs


def join(packs: Sequence[PackedTokens]) -> PackedTokens:
    """Packs of one model behind each other, in order; the reverse of `split`."""
    layouts = [pack.layout for pack in packs]
    lengths = [length for layout in layouts for length in layout.lengths]
    device = packs[0].x_TD.device
    length_B = torch.tensor(lengths, device=device)
    uniform = layouts[0].uniform if all(layout.uniform == layouts[0].uniform for layout in layouts) else None
    joined = Layout(
        cu_B1=torch.nn.functional.pad(length_B.cumsum(0), (1, 0)).to(torch.int32),
        image_T=torch.arange(len(lengths), device=device).repeat_interleave(length_B),
        origin_T=torch.cat([layout.origin_T for layout in layouts]),
        prefix=layouts[0].prefix,
        grid=layouts[0].grid,
        longest=max(layout.longest for layout in layouts),
        uniform=uniform,
    )
    mass_T = None
    if any(pack.mass_T is not None for pack in packs):
        mass_T = torch.cat([pack.mass_T if pack.mass_T is not None else torch.ones_like(pack.x_TD[:, 0]) for pack in packs])
    merged_BN = None
    if any(pack.merged_BN is not None for pack in packs):
        merged_BN = torch.cat([pack.carrier_BN for pack in packs])
    return PackedTokens(torch.cat([pack.x_TD for pack in packs]), joined, mass_T, merged_BN)


def pick_images(tokens: PackedTokens, index_I: Int[Tensor, " I"]) -> PackedTokens:
    """The images at `index_I`, which ascend, as a pack of their own."""
    layout = tokens.layout
    picked_B = torch.zeros_like(layout.length_B, dtype=torch.bool).index_fill(0, index_I, True)
    row_S = picked_B[layout.image_T].nonzero().squeeze(1)
    number_B = picked_B.cumsum(0) - 1
    alone = Layout(
        cu_B1=torch.nn.functional.pad(layout.length_B[index_I].cumsum(0, dtype=torch.int32), (1, 0)),
        image_T=number_B[layout.image_T[row_S]],
        origin_T=layout.origin_T[row_S],
        prefix=layout.prefix,
        grid=layout.grid,
        longest=layout.longest,
        uniform=layout.uniform,
    )
    mass_S = None if tokens.mass_T is None else tokens.mass_T[row_S]
    merged_IN = None if tokens.merged_BN is None else tokens.merged_BN[index_I]
    return PackedTokens(tokens.x_TD.index_select(0, row_S), alone, mass_S, merged_IN)


def select(keep_T: Bool[Tensor, " T"], layout: Layout) -> Selection:
    """The rows where `keep_T` holds; one synchronisation on devices that run asynchronously."""
    index_S = keep_T.nonzero().squeeze(1)
    running_T1 = torch.nn.functional.pad(keep_T.cumsum(0, dtype=torch.int32), (1, 0))
    return Selection(index_S, running_T1[layout.cu_B1.long()])


def select_places(row_BK: Int[Tensor, "B K"], layout: Layout) -> Selection:
    """Prefix tokens and the given patch rows (counted within each image), the same number in every image.

    Shapes depend on K alone, so a model that selects this way exports with static token counts.
    """
    images, kept = row_BK.shape
    length = layout.uniform
    assert length is not None  # callers check
    ahead = torch.arange(layout.prefix, device=row_BK.device).expand(images, layout.prefix)
    rows = torch.cat([ahead, row_BK.sort(dim=1).values], dim=1)
    start = torch.arange(images, device=row_BK.device)[:, None] * length
    total = layout.prefix + kept
    cu_B1 = torch.arange(images + 1, device=row_BK.device, dtype=torch.int32) * total
    return Selection((rows + start).reshape(-1), cu_B1, uniform=total)


def with_best_of_gone(chosen: Selection, relevance_T: Float[Tensor, " T"], layout: Layout) -> tuple[Selection, Int[Tensor, " B"]]:
    """The chosen rows, and of every image the most relevant patch that was not chosen (of equals the earlier one).

    Returns:
        The selection, and that row of each image; -1 where all patches were chosen.
    """
    row_T = torch.arange(relevance_T.shape[0], device=relevance_T.device)
    gone_T = layout.is_patch_T.index_fill(0, chosen.index_S, False)
    gone_BN = scatter_places(gone_T.long(), layout) > 0
    # Relevance is not negative, and NaN is what topk and argmax call the largest: damage shows.
    ranked_BN = scatter_places(relevance_T.detach().float(), layout).masked_fill(~gone_BN, float("-inf"))
    best_BN = scatter_places(row_T, layout).gather(1, ranked_BN.argmax(1, keepdim=True))
    best_B = torch.where(gone_BN.any(1), best_BN.squeeze(1), GONE)
    if chosen.uniform is None or layout.uniform is None:
        keep_T = torch.zeros_like(gone_T).index_fill(0, chosen.index_S, True) | (row_T == best_B[layout.image_T])
        return select(keep_T, layout), best_B
    if chosen.uniform == layout.uniform:
        return chosen, best_B
    first_B1 = torch.arange(layout.images, device=row_T.device)[:, None] * layout.uniform
    patch_BK = chosen.index_S.view(layout.images, chosen.uniform)[:, layout.prefix :] - first_B1
    return select_places(torch.cat([patch_BK, best_B[:, None] - first_B1], dim=1), layout), best_B


def take(tokens: PackedTokens, chosen: Selection) -> PackedTokens:
    """Keeps the chosen rows; patches that were carried by the others are gone."""
    kept = _shortened(tokens.layout, chosen)
    mass_S = None if tokens.mass_T is None else tokens.mass_T[chosen.index_S]
    merged_BN = tokens.merged_BN
    if merged_BN is not None:
        alive_BN = scatter_places(torch.ones_like(kept.origin_T), kept) > 0
        reached_BN = alive_BN.gather(1, merged_BN.clamp(min=0)) & (merged_BN >= 0)
        merged_BN = torch.where(reached_BN, merged_BN, GONE)
    return PackedTokens(tokens.x_TD.index_select(0, chosen.index_S), kept, mass_S, merged_BN)


def prefix_alone(tokens: PackedTokens) -> PackedTokens:
    """The prefix tokens of every image; all patches are gone."""
    layout = tokens.layout
    cu_B1 = torch.arange(layout.images + 1, device=layout.cu_B1.device, dtype=torch.int32) * layout.prefix
    return take(tokens, Selection(layout.prefix_row_BL.flatten(), cu_B1, uniform=layout.prefix))


def _shortened(layout: Layout, chosen: Selection) -> Layout:
    return Layout(
        cu_B1=chosen.cu_B1,
        image_T=layout.image_T[chosen.index_S],
        origin_T=layout.origin_T[chosen.index_S],
        prefix=layout.prefix,
        grid=layout.grid,
        longest=chosen.uniform if chosen.uniform is not None else layout.longest,
        uniform=chosen.uniform,
    )


def gone_rows(chosen: Selection, rows: int) -> Int[Tensor, " G"]:
    """The rows of a pack of `rows` that were not chosen, ascending. Their number is known, so nobody waits for it."""
    row_T = torch.arange(rows, device=chosen.index_S.device)
    last_T = row_T.index_add(0, chosen.index_S, torch.full_like(chosen.index_S, rows))  # chosen rows count as later than all others
    return last_T.topk(rows - chosen.index_S.shape[0], largest=False).values


def merge(
    tokens: PackedTokens,
    chosen: Selection,
    gone_G: Int[Tensor, " G"],
    carrier_G: Int[Tensor, " G"],
    keep_length: bool = False,
    weight_T: Float[Tensor, " T"] | None = None,
) -> PackedTokens:
    """Keeps the chosen rows; every other row is averaged, by mass times weight, into its carrier.

    Args:
        gone_G: the rows that were not chosen.
        carrier_G: for each of them the chosen row that carries it on; -1 if it is lost.
        keep_length: the average is stretched to the average length of what went into it. The average of vectors that differ is
            shorter than they are, and a pre-norm block takes a short token for a faint one.
        weight_T: above zero, what one patch of each row counts in averages; by default all count alike. Masses know no weights.
    """
    layout, rows = tokens.layout, chosen.index_S.shape[0]
    own_T = torch.ones_like(layout.image_T, dtype=torch.promote_types(tokens.x_TD.dtype, torch.float32))  # bf16 counts to 256 only
    own_T = own_T if tokens.mass_T is None else tokens.mass_T
    if not torch.compiler.is_compiling() and not layout.image_T.shape[0]:  # no token at all; a graph must not ask
        return replace(take(tokens, chosen), mass_T=own_T)
    slot_T = carrier_G.new_full((layout.image_T.shape[0],), rows).index_copy(0, chosen.index_S, torch.arange(rows, device=gone_G.device))
    # Lost rows are added to one spare row at the end, which is cut off.
    slot_G = torch.where(carrier_G < 0, rows, slot_T[carrier_G.clamp(min=0)])
    spare_S = torch.nn.functional.pad(chosen.index_S, (0, 1))
    total_S = own_T[spare_S].index_add(0, slot_G, own_T[gone_G])[:rows]
    counts_T = own_T if weight_T is None else own_T * weight_T
    x_SD = _averaged(tokens.x_TD, counts_T, spare_S, gone_G, slot_G, keep_length)[:rows]
    # Every place's own row has gone to `place_T`; what was carried before follows its carrier.
    place_T = layout.origin_T.index_copy(0, gone_G, torch.where(carrier_G < 0, GONE, layout.origin_T[carrier_G.clamp(min=0)]))
    moved_BN = table_BN = scatter_places(place_T + 1, layout) - 1  # places without a row of their own stay at -1
    if tokens.merged_BN is not None:
        moved_BN = torch.where(tokens.merged_BN >= 0, table_BN.gather(1, tokens.merged_BN.clamp(min=0)), GONE)
    return PackedTokens(x_SD, _shortened(layout, chosen), total_S, moved_BN)


def _averaged(x_TD: Tensor, counts_T: Tensor, index_S: Tensor, gone_G: Tensor, slot_G: Tensor, keep_length: bool) -> Float[Tensor, "S D"]:
    """The rows at `index_S` (the last one spare), with the dropped rows averaged in by what each row counts.

    Few kept rows receive any: the others are only copied. A heap is a kept row that receives, and the dropped rows that it receives. Heaps
    are numbered in the order of their receivers; there are at most as many as dropped rows, and numbers beyond the last heap belong to the
    spare row, so that no shape depends on how many receive.
    """
    spare = index_S.shape[0] - 1
    receives_S = torch.zeros_like(index_S).index_fill(0, slot_G, 1)
    heap_G = (receives_S.cumsum(0) - 1)[slot_G]  # of each dropped row
    receiver_G = torch.full_like(gone_G, spare).scatter(0, heap_G, slot_G)  # of each heap
    # All that lies in heaps: first one receiver per heap, then the dropped rows.
    heap_G2 = torch.cat([torch.arange(gone_G.shape[0], device=gone_G.device), heap_G])
    row_G2 = torch.cat([index_S[receiver_G], gone_G])
    part_G2D, count_G2 = x_TD.index_select(0, row_G2).to(counts_T.dtype), counts_T[row_G2]
    zeros_GD = part_G2D.new_zeros(gone_G.shape[0], part_G2D.shape[1])
    total_G = zeros_GD[:, 0].index_add(0, heap_G2, count_G2)
    mean_GD = zeros_GD.index_add(0, heap_G2, part_G2D * count_G2[:, None]) / total_G[:, None]
    if keep_length:
        length_G = zeros_GD[:, 0].index_add(0, heap_G2, part_G2D.norm(dim=1) * count_G2) / total_G
        mean_GD = torch.nn.functional.normalize(mean_GD, dim=1) * length_G[:, None]
    return x_TD.index_select(0, index_S).index_copy_(0, receiver_G, mean_GD.to(x_TD.dtype))


def scatter_places(value_T: Tensor, layout: Layout) -> Tensor:
    """(T,) or (T, F) values of patch tokens on the grid: (B, N) or (B, N, F), zero where no token stands."""
    images, places = layout.images, layout.places
    tail = value_T.shape[1:]
    spare = images * places  # prefix rows land on one extra row that is cut off: no boolean indexing, no waiting
    flat_T = torch.where(layout.is_patch_T, layout.image_T * places + layout.origin_T, spare)
    grid = value_T.new_zeros((spare + 1, *tail)).index_put((flat_T,), value_T)
    return grid[:spare].reshape(images, places, *tail)


def to_grid(tokens: PackedTokens) -> tuple[Float[Tensor, "B L D"], Float[Tensor, "B N D"]]:
    """Prefix tokens, and every place filled by the token that carries it (zero where the patch is gone)."""
    layout = tokens.layout
    own_BND = scatter_places(tokens.x_TD, layout)
    index = tokens.carrier_BN.clamp(min=0)[..., None].expand_as(own_BND)
    filled = own_BND.gather(1, index)
    return tokens.x_TD[layout.prefix_row_BL], torch.where((tokens.carrier_BN >= 0)[..., None], filled, 0.0)


def sum_of_patches(value_T: Float[Tensor, " T"], layout: Layout) -> Float[Tensor, " B"]:
    """The sum over each image's patch rows."""
    patch_T = torch.where(layout.is_patch_T, value_T, 0.0)
    return patch_T.new_zeros(layout.images).index_add(0, layout.image_T, patch_T)


def best_of_patches(value_TF: Float[Tensor, "T F"], layout: Layout) -> Float[Tensor, "B F"]:
    """The largest value among each image's patch rows, feature by feature; -inf where there is no patch."""
    patch_TF = value_TF.masked_fill(~layout.is_patch_T[:, None], float("-inf"))
    index_TF = layout.image_T[:, None].expand_as(patch_TF)
    return patch_TF.new_full((layout.images, patch_TF.shape[1]), float("-inf")).scatter_reduce(0, index_TF, patch_TF, "amax")


def mean_per_image(tokens: PackedTokens, include_prefix: bool = False) -> Float[Tensor, "B D"]:
    """The mean over each image's patches (and prefix tokens, if asked for); a merged token counts once for each patch."""
    layout, x_TD = tokens.layout, tokens.x_TD
    precise = torch.promote_types(x_TD.dtype, torch.float32)
    weight_T = torch.ones_like(layout.origin_T, dtype=precise) if tokens.mass_T is None else tokens.mass_T.to(precise)
    if not include_prefix:
        weight_T = torch.where(layout.is_patch_T, weight_T, 0.0)
    total_B = weight_T.new_zeros(layout.images).index_add(0, layout.image_T, weight_T)
    summed_BD = weight_T.new_zeros(layout.images, x_TD.shape[1]).index_add(0, layout.image_T, x_TD.to(precise) * weight_T[:, None])
    return (summed_BD / total_B[:, None]).to(x_TD.dtype)
