"""Explainers by relevance propagation: full and partial LRP, transformer attribution, AttnLRP."""

import copy
from collections.abc import Callable, Sequence
from functools import wraps

import torch
from jaxtyping import Float
from torch import Tensor, nn

from iared2.explain.attention import Maps, Target, first_layer, relevance_rollout
from iared2.explain.dense import DensePass, attention_gradients, dense_pass, explained_class, gain
from iared2.explain.relevance import Rules, propagating
from iared2.model import ReducedTransformer


def _in_full(read: Callable[..., Maps]) -> Callable[[ReducedTransformer, Tensor, Target], Maps]:
    """Has relevance propagated with at least 24 bits: half precision has too few digits for its quotients."""

    @wraps(read)
    def run(model: ReducedTransformer, images: Tensor, target_B: Target) -> Maps:
        dtype = next(model.parameters()).dtype
        if dtype in (torch.bfloat16, torch.float16):
            model, dtype = copy.deepcopy(model).float(), torch.float32
        with torch.autocast(images.device.type, enabled=False), torch.enable_grad():
            return read(model, images.to(dtype), target_B).detach()

    return run


def relevance_pass(model: ReducedTransformer, images: Tensor, rules: Rules) -> DensePass:
    """A dense pass whose backward passes carry relevance."""
    with torch.enable_grad(), propagating(rules):
        return dense_pass(model, images)


def relevance_of(passed: DensePass, wanted: Sequence[Tensor], target_B: Target, classes: int) -> list[Tensor]:
    """What arrives at parts of the pass, of one at the target's logit: relevance, or in AttnLRP relevance per unit of value."""
    return list(torch.autograd.grad(gain(passed.output_BC, target_B, classes).sum(), list(wanted)))


@_in_full
def lrp(model: ReducedTransformer, images: Tensor, target_B: Target) -> Maps:
    """Full LRP: what reaches the embedded patches, positions included, channels added up.

    Totals are conserved, but over many blocks the quotients of Eq. 12 magnify the last digits: maps of deep models hardly repeat.
    """
    passed = relevance_pass(model, images, Rules(len(images)))
    (found_TD,) = relevance_of(passed, passed.token_TD[:1], target_B, model.num_classes)
    return passed.patches(found_TD.sum(-1).view(len(images), -1))


@_in_full
def partial_lrp(model: ReducedTransformer, images: Tensor, target_B: Target) -> Maps:
    """Relevance that reaches the last attention, mean over heads."""
    passed = relevance_pass(model, images, Rules(len(images)))
    found = relevance_of(passed, passed.weight_BHSS[-1], target_B, model.num_classes)
    return passed.answer_row(torch.cat(found, dim=1).mean(1))


@_in_full
def attnlrp(model: ReducedTransformer, images: Tensor, target_B: Target, gamma: float = 0.25) -> Maps:
    """AttnLRP to the pixels' part of the embedded patches, channels added up; gamma as its authors take for vision transformers."""
    passed = relevance_pass(model, images, Rules(len(images), attn=True, gamma=gamma))
    (per_value_TD,) = relevance_of(passed, passed.token_TD[:1], target_B, model.num_classes)
    value_TD = passed.token_TD[0].detach()
    if isinstance(getattr(model.backbone, "norm_pre", None), nn.Identity):  # else the embedding is no sum of which pixels have a share
        with torch.no_grad():  # positions and biases are in every picture: they take their share, and it shows nothing
            value_TD = value_TD - model.adapter.embed(torch.zeros_like(images)).x_TD
    return passed.patches((per_value_TD * value_TD).sum(-1).view(len(images), -1))


@_in_full
def transformer_attribution(model: ReducedTransformer, images: Tensor, target_B: Target) -> Maps:
    """The product over blocks of I + mean over heads of (gradient x relevance)+ (Chefer et al. 2021, Eq. 13 and 14)."""
    propagated = relevance_pass(model, images, Rules(len(images)))
    chosen_B = explained_class(propagated.output_BC, target_B, model.num_classes)
    start = first_layer(model.adapter.depth)
    blocks = propagated.weight_BHSS[start:]
    found = iter(relevance_of(propagated, [weight for block in blocks for weight in block], chosen_B, model.num_classes))
    relevance = [torch.cat([next(found) for _ in block], dim=1) for block in blocks]
    with torch.enable_grad():
        plain = dense_pass(model, images)
    slopes = attention_gradients(plain, start, chosen_B, model.num_classes)
    parts: list[Float[Tensor, "B _H S S"]] = [g * r for g, r in zip(slopes, relevance, strict=True)]
    return plain.answer_row(relevance_rollout(parts))
