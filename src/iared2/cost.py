"""Multiply-adds (MACs) per image: closed form per block, plus everything else that runs.

Per block of n tokens: 12 n D^2 + 2 n^2 D for a plain block (section 3.1; the paper counts the same and says
FLOPs). To this come the patch embedding, interpreters, matching and the head. The paper's table figures for
DeiT-B (16.8 G, 49.4 G) leave out the two n^2 products; `products=False` gives that count.
"""

from collections.abc import Mapping, Sequence

from iared2.backbones.base import BackboneAdapter
from iared2.reducers.base import Reducer


def dense_macs(adapter: BackboneAdapter, height: int, width: int, products: bool = True) -> int:
    """Multiply-adds of the untouched backbone for one image of this size in pixels."""
    rows, columns = adapter.grid(height, width)
    return reduced_macs(adapter, {}, (height, width), rows * columns, [], products)


def second_look_macs(  # noqa: PLR0913, PLR0917 - what was done, and how it is counted
    adapter: BackboneAdapter,
    first_block: int,
    size: tuple[int, int],
    patches: int,
    products: bool = True,
    between: bool = False,
    prefix_alone: bool = False,
) -> int:
    """Multiply-adds of passing one image again with nothing dropped, from in front of the first reduction on.

    Args:
        first_block: the block of the first reduction.
        size, patches, products, between, prefix_alone: as in `reduced_macs`.
    """
    whole = reduced_macs(adapter, {}, size, patches, [], products, prefix_alone=prefix_alone)
    shared = reduced_macs(adapter, {}, size, patches, [], products, until=first_block)
    if between:
        cost, tokens = adapter.block_cost(first_block), adapter.prefix + patches
        shared += cost.macs(tokens, 0) if products else cost.linear(tokens, 0)
    return whole - shared


def reduced_macs(  # noqa: PLR0913, PLR0917 - what was done, and how it is counted
    adapter: BackboneAdapter,
    reducers: Mapping[int, Reducer],
    size: tuple[int, int],
    patches: int,
    kept: Sequence[int],
    products: bool = True,
    between: bool = False,
    until: int | None = None,
    prefix_alone: bool = False,
) -> int:
    """Multiply-adds of one image.

    Args:
        reducers: the reducer of each block that has one.
        size: input height and width in pixels.
        patches: patch tokens that enter block 0.
        kept: patch tokens after each reducer, in the order of blocks.
        products: whether to count q k^T and weights v.
        between: reducers act between a block's halves instead of before it.
        until: counts what runs before that block; None counts all blocks and the head.
        prefix_alone: the last block computes prefix tokens alone.
    """
    total = adapter.embed_macs(*size)
    rows, columns = adapter.grid(*size)
    pooled = patches  # merged patches are un-merged before the head, so that each counts once there
    after = iter(kept)
    for block in range(adapter.depth if until is None else until):
        attended = patches
        if block in reducers:
            left = next(after)
            total += reducers[block].macs(patches, left)
            patches = left
            pooled = pooled if reducers[block].merges and left else left
        tokens, fed = adapter.prefix + (attended if between else patches), adapter.prefix + patches
        cost = adapter.block_cost(block)
        if prefix_alone and block == adapter.depth - 1:
            total += cost.prefix_alone(tokens, adapter.prefix, products)
            continue
        total += cost.macs(tokens, fed) if products else cost.linear(tokens, fed)
    return total + (adapter.head_macs(adapter.prefix + pooled, rows * columns) if until is None else 0)
