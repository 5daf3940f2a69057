"""Explainers that read attention, with and without gradients. All take a dense pass to maps on the patch grid.

| here | source |
|---|---|
| `raw_attention` | the class token's row of one block |
| `rollout` | Abnar and Zuidema 2020, "Quantifying Attention Flow in Transformers" |
| `gradient_rollout` | the same, attention weighted by its positive gradient |
| `gradcam` | Selvaraju et al. 2017, on the tokens that enter the last block |
| `gradcam_attention` | the same on the last attention, as Chefer et al. 2021 compare with it |
| `generic_attribution` | Chefer et al. 2021, "Generic Attention-model Explainability", Eq. 5 and 6 |
| `legrad` | Bousselham et al. 2024, "LeGrad" |
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from iared2.explain.dense import DensePass, attention_gradients, explained_class, gain, gradients

Maps = Float[Tensor, "B h w"]
Target = Int[Tensor, " B"] | None


def raw_attention(passed: DensePass, block: int, head: int | None = None, over: Literal["mean", "max"] = "mean") -> Maps:
    """One block's attention to the patches: of one head, or the mean or maximum over heads."""
    weight_BHSS = passed.attention_BHSS[block]
    if head is not None:
        return passed.answer_row(weight_BHSS[:, head])
    return passed.answer_row(weight_BHSS.mean(1) if over == "mean" else weight_BHSS.amax(1))


def rolled(layers: Sequence[Float[Tensor, "B S S"]]) -> Float[Tensor, "B S S"]:
    """The product over layers of 0.5 A + 0.5 I, rows summing to one."""
    eye_SS = torch.eye(layers[0].shape[-1]).to(layers[0])
    total_BSS = eye_SS.expand_as(layers[0])
    for layer_BSS in layers:
        mixed_BSS = layer_BSS + eye_SS
        total_BSS = mixed_BSS / mixed_BSS.sum(-1, keepdim=True) @ total_BSS
    return total_BSS


def first_layer(depth: int) -> int:
    """Rollouts begin at the second block, as in the segmentation protocol of Chefer et al. 2021."""
    return min(1, depth - 1)


def rollout(passed: DensePass) -> Maps:
    """Attention rollout."""
    start = first_layer(passed.adapter.depth)
    return passed.answer_row(rolled([weight.mean(1) for weight in passed.attention_BHSS[start:]]))


def gradient_rollout(passed: DensePass, target_B: Target, classes: int) -> Maps:
    """Rollout of the positive part of gradient times attention."""
    start = first_layer(passed.adapter.depth)
    grads = attention_gradients(passed, start, target_B, classes)
    pairs = zip(passed.attention_BHSS[start:], grads, strict=True)
    return passed.answer_row(rolled([(w * g).clamp(min=0).mean(1) for w, g in pairs]))


def gradcam(passed: DensePass, target_B: Target, classes: int) -> Maps:
    """Channels of the last block's tokens, weighted by their mean gradient over patches; the positive part."""
    token_TD = passed.token_TD[-2]  # behind the last block, patches of a model with a class token have no gradient
    (grad_TD,) = gradients(passed, [token_TD], target_B, classes)
    images, prefix = passed.layout.images, passed.layout.prefix
    weight_BD = grad_TD.view(images, -1, grad_TD.shape[-1])[:, prefix:].mean(1)
    value_BSD = token_TD.detach().view(images, -1, token_TD.shape[-1])
    return passed.patches((value_BSD * weight_BD[:, None]).sum(-1).clamp(min=0))


def gradcam_attention(passed: DensePass, target_B: Target, classes: int) -> Maps:
    """Heads of the last attention, weighted by their mean gradient over patches; the positive part."""
    weight_BHSS = passed.attention_BHSS[-1]
    (grad_BHSS,) = attention_gradients(passed, passed.adapter.depth - 1, target_B, classes)
    heads = range(weight_BHSS.shape[1])
    row_HBhw = torch.stack([passed.answer_row(weight_BHSS[:, h]) for h in heads])
    grad_HBhw = torch.stack([passed.answer_row(grad_BHSS[:, h]) for h in heads])
    return (row_HBhw * grad_HBhw.mean((-2, -1), keepdim=True)).mean(0).clamp(min=0).detach()


def generic_attribution(passed: DensePass, target_B: Target, classes: int) -> Maps:
    """R = R + mean over heads of (gradient x attention)+ R, block by block from the identity."""
    grads = attention_gradients(passed, 0, target_B, classes)
    return passed.answer_row(relevance_rollout([w * g for w, g in zip(passed.attention_BHSS, grads, strict=True)]))


def relevance_rollout(parts: Sequence[Float[Tensor, "B H S S"]]) -> Float[Tensor, "B S S"]:
    """The product over layers of I + mean over heads of the positive part."""
    first = parts[0]
    total = torch.eye(first.shape[-1]).to(first).expand(len(first), -1, -1)
    for part_BHSS in parts:
        total = total + part_BHSS.clamp(min=0).mean(1) @ total
    return total.detach()


def legrad(passed: DensePass, target_B: Target, classes: int, layers: int = 2) -> Maps:
    """Positive gradients of attention, mean over heads and queries, of the answer as it stands after each of the last blocks."""
    chosen_B = explained_class(passed.output_BC, target_B, classes)
    found = []
    for block in range(max(0, passed.adapter.depth - layers), passed.adapter.depth):
        output = passed.adapter.head(passed.packed(block + 1)).float()
        grads = torch.autograd.grad(gain(output, chosen_B, classes).sum(), passed.weight_BHSS[block], retain_graph=True)
        found.append(passed.patches(torch.cat(grads, dim=1).clamp(min=0).mean((1, 2))))
    return torch.stack(found).mean(0)
