"""The dense model's own evidence: how much its answer leans on each patch, in each block. One backward pass for all.

In every block a token of mass m counts m times in attention, so d log p(c) / d m_i at m = 1 is, to first order, what the
predicted class c gains or loses if patch i leaves that block.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from iared2.model import ReducedTransformer
from iared2.tokens.packed import scatter_places


@dataclass(frozen=True)
class Evidence:
    """For every block, evidence for the predicted class and against it, both from zero up. F blocks, B images, N places."""

    for_FBN: Float[Tensor, "F B N"]
    against_FBN: Float[Tensor, "F B N"]

    def from_block(self, block: int, against: float) -> Float[Tensor, "B N"]:
        """What patches weigh in all blocks from `block` on; evidence against counts `against` times."""
        return (self.for_FBN[block:] + against * self.against_FBN[block:]).sum(0)


def dense_evidence(model: ReducedTransformer, images: Float[Tensor, "B C height width"]) -> tuple[Evidence, Tensor]:
    """Evidence, and the dense model's output. Nothing is dropped; no parameter receives a gradient.

    A model without a classifier is asked how its embedding holds its direction.
    """
    leaves = []
    state = model.start(images)
    with torch.enable_grad():
        for block in range(model.adapter.depth):
            leaves.append(torch.ones(len(state.tokens.x_TD), device=images.device, requires_grad=True))
            weighted = replace(state, tokens=replace(state.tokens, mass_T=leaves[-1]))
            state = model.run_block(weighted, block)
            state = replace(state, tokens=replace(state.tokens, mass_T=None))
        output = model.adapter.head(state.tokens).float()
        gain = gain_of(output, model.num_classes).sum()
        found = torch.stack(torch.autograd.grad(gain, leaves))
    grid_FBN = torch.stack([scatter_places(one, state.tokens.layout) for one in found])
    return Evidence(grid_FBN.clamp(min=0), (-grid_FBN).clamp(min=0)), output.detach()


def gain_of(output: Float[Tensor, "B C"], classes: int) -> Float[Tensor, " B"]:
    """log p of the predicted class, or the embedding's length along its own direction."""
    if classes:
        return output.log_softmax(1).amax(1)
    return (output * torch.nn.functional.normalize(output.detach(), dim=1)).sum(1)
