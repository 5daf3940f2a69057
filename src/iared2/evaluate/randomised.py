"""The model-randomisation check (Adebayo et al., NeurIPS 2018): a map that explains a model must change when its weights become random."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from iared2.evaluate.map_scores import rank_normalise
from iared2.model import ReducedTransformer
from iared2.seeds import generator


def steps_of(depth: int) -> tuple[int, ...]:
    """How many of the last blocks become random: 1, 2, 4, ... and all of them."""
    found = [1]
    while found[-1] * 2 < depth:
        found.append(found[-1] * 2)
    return (*found, depth) if depth > found[-1] else tuple(found)


@contextmanager
def randomised(model: ReducedTransformer, blocks: int, seed: int = 0) -> Iterator[ReducedTransformer]:
    """The model with random weights in its last `blocks` blocks and in the reducers that act there; as it was after the `with` block.

    Each tensor is drawn from a Gaussian of its own mean and deviation, so that activations stay on their scale. The embedding, the last
    norm and the head are left alone. Weights change in place, and no second model fills the memory.
    """
    first = model.adapter.depth - blocks
    parts: list[nn.Module] = [*model.backbone.blocks[first:]]
    parts += [reducer for block, reducer in zip(model.config.first_blocks, model.reducers, strict=True) if block >= first]
    own = [parameter for part in parts for parameter in part.parameters()]
    kept, draw = [parameter.detach().clone() for parameter in own], generator(seed, blocks)
    try:
        with torch.no_grad():
            for parameter in own:
                spread = float(parameter.float().std()) if parameter.numel() > 1 else 0.0
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * spread + float(parameter.float().mean()))
        yield model
    finally:
        with torch.no_grad():
            for parameter, value in zip(own, kept, strict=True):
                parameter.copy_(value)


def rank_correlation(one_Bhw: Float[Tensor, "B h w"], other_Bhw: Float[Tensor, "B h w"]) -> Float[Tensor, " B"]:
    """Spearman's rank correlation of two maps of an image, in [-1, 1]; NaN where one of them is the same everywhere."""
    one_BN, other_BN = (rank_normalise(maps.double()).flatten(1) for maps in (one_Bhw, other_Bhw))
    one_BN, other_BN = one_BN - one_BN.mean(1, keepdim=True), other_BN - other_BN.mean(1, keepdim=True)
    spread_B = one_BN.norm(dim=1) * other_BN.norm(dim=1)
    flat_B = (one_BN.abs().amax(1) < 1e-9) | (other_BN.abs().amax(1) < 1e-9)
    return ((one_BN * other_BN).sum(1) / spread_B).masked_fill(flat_B, float("nan"))
