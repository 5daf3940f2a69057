"""Our own maps: what the interpreters of all groups say together, alone or with one gradient.

A patch that was merged is scored by its carrier, so every place of the grid has a score in every group.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from iared2.explain.attention import generic_attribution
from iared2.explain.dense import dense_pass
from iared2.model import ReducedTransformer
from iared2.similarity import compare
from iared2.tokens.grid import to_map
from iared2.tokens.packed import Layout
from iared2.trace import Trace

TEMPERATURE = 0.1  # of cosines between keys
# Maps are raised to these powers, because sharing spreads them: a mean as threshold should cut close to the object.
SHARPNESS, GRADIENT_SHARPNESS = 1.5, 2.0
_LEAST = 1e-6


def scores_on_grid(trace: Trace) -> Float[Tensor, "G B N"]:
    """Each group's score of every place: its own token's, or that of the token that carried it into the group; 0 where it is gone."""
    found = []
    for group in range(trace.groups):
        score_BN = trace.score_GBN[group]
        if group:
            carrier_BN = trace.carrier_GBN[group - 1]
            score_BN = torch.where(carrier_BN >= 0, score_BN.gather(1, carrier_BN.clamp(min=0)), 0.0)
        found.append(score_BN)
    return torch.stack(found)


@torch.no_grad()
def combined_map(model: ReducedTransformer, images: Float[Tensor, "B C height width"]) -> tuple[Float[Tensor, "B h w"], float]:
    """Our map without a gradient: later groups' scores relative to the image's mean, shared among patches of like keys.

    Keys are those that the first reduction sees, where every patch still has a token. That the later half of the groups speaks,
    how sharply keys are compared, and twice, was chosen on the boxes of Tiny-ImageNet's training pictures; the power on ellipses in
    such boxes, because objects do not fill them.

    Returns:
        Maps, and the mean cost of one in dense forward passes.
    """
    state = model.walk_to(model.start(images), 0, reduce=())
    alike_BNN = alike(state.tokens.x_TD if state.key_THK is None else state.key_THK.flatten(1), state.tokens.layout)
    trace = model.make_trace(model.finish(state).reductions, (images.shape[-2], images.shape[-1]))
    map_Bhw = to_map(shared(relative_scores(trace), alike_BNN, times=2) ** SHARPNESS, trace.grid)
    return map_Bhw, trace.share_of_dense() + _sharing_macs(model, trace, ways=1, times=2) / trace.dense_macs


def gradient_map(
    model: ReducedTransformer, images: Float[Tensor, "B C height width"], target_B: Int[Tensor, " B"] | None = None
) -> tuple[Float[Tensor, "B h w"], float]:
    """Our map with one backward pass: those scores times the root of generic attribution, which knows the class.

    They are shared among patches three times: by what patches pay to one another in the first third of the blocks, by keys two
    thirds of the way, and by keys a sixth of the way; chosen as for `combined_map`. (Later blocks do not pay to their like in every
    model: in the embedded one their attention turns maps inside out.)

    Returns:
        Maps, and the mean cost of one in dense forward passes, but for the backward pass.
    """
    with torch.enable_grad():
        passed = dense_pass(model, images)
        evidence_BN = generic_attribution(passed, target_B, model.num_classes).flatten(1)
    with torch.no_grad():
        _, trace = model.trace(images, second_look=False)
        value_BN = relative_scores(trace) * relative(evidence_BN.clamp(min=0)).sqrt()
        third, prefix = model.adapter.depth // 3, passed.layout.prefix
        early = passed.attention_BHSS[: max(1, third)]
        paid_BNN = torch.stack([weight.mean(1)[:, prefix:, prefix:] for weight in early]).mean(0)
        value_BN = shared(value_BN, paid_BNN / paid_BNN.sum(-1, keepdim=True).clamp(min=_LEAST))
        for block in (2 * third, third // 2):
            keys_THK = model.adapter.attend(block, passed.packed(block), want_keys=True).key_THK
            value_BN = value_BN if keys_THK is None else shared(value_BN, alike(keys_THK.flatten(1), passed.layout))
        macs = _sharing_macs(model, trace, ways=2, times=3)
        macs += sum(model.adapter.block_cost(block).macs(passed.layout.longest, 0) for block in (2 * third, third // 2))
        return to_map(value_BN**GRADIENT_SHARPNESS, trace.grid), 1 + trace.share_of_dense() + macs / trace.dense_macs


def _sharing_macs(model: ReducedTransformer, trace: Trace, ways: int, times: int) -> int:
    """Multiply-adds of comparing all patches in `ways` ways, and of taking `times` weighted means."""
    return trace.keep_GBN.shape[-1] ** 2 * (ways * model.adapter.width + times)


def alike(features_TF: Float[Tensor, "T F"], layout: Layout) -> Float[Tensor, "B N N"]:
    """How much each patch takes from each: the softmax of cosines, sharpened."""
    (cosine_BSS,) = compare(features_TF, layout).cosine_bLL
    return (cosine_BSS[:, layout.prefix :, layout.prefix :].float() / TEMPERATURE).softmax(-1)


def relative_scores(trace: Trace) -> Float[Tensor, "B N"]:
    """Scores of the later half of the groups, each relative to its mean over the image."""
    return relative(scores_on_grid(trace)[trace.groups // 2 :]).mean(0)


def relative(value: Float[Tensor, "*B N"]) -> Float[Tensor, "*B N"]:
    """Values divided by their mean."""
    return value / value.mean(-1, keepdim=True).clamp(min=_LEAST)


def shared(value_BN: Float[Tensor, "B N"], weight_BNN: Float[Tensor, "B N N"], times: int = 1) -> Float[Tensor, "B N"]:
    """Each patch takes the weighted mean of all patches' values, `times` times; rows of weights sum to one."""
    weight_BNN = weight_BNN.to(value_BN)
    for _ in range(times):
        value_BN = (weight_BNN @ value_BN[..., None]).squeeze(-1)
    return value_BN
