"""A dense pass that can be looked into: attention of every block, tokens between blocks, and gradients of one answer.

Explainers other than ours explain the backbone itself: nothing is dropped. They see it through its adapter, so they work
on every backbone that can be reduced, with fused attention, register tokens or half precision.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from iared2.backbones import BackboneAdapter
from iared2.errors import ConfigError
from iared2.model import ReducedTransformer
from iared2.tokens.attention import recording
from iared2.tokens.packed import Layout, PackedTokens


@dataclass(frozen=True)
class DensePass:
    """What happened in a dense pass. B images, S tokens (prefix tokens first), H heads, T = B S.

    Attributes:
        token_TD: the tokens that enter each block, and behind them those that leave the last.
        weight_BHSS: softmax weights of each block, one tensor for each attention that it has.
        output_BC: logits, or embeddings of a model without a classifier.
        layout: of every block's tokens.
    """

    adapter: BackboneAdapter
    token_TD: list[Float[Tensor, "T D"]]
    weight_BHSS: list[list[Float[Tensor, "B _H S S"]]]
    output_BC: Float[Tensor, "B *C"]
    layout: Layout

    @property
    def attention_BHSS(self) -> list[Float[Tensor, "B _H S S"]]:
        """Softmax weights of each block; the heads of several attentions behind one another."""
        return [torch.cat(parts, dim=1) for parts in self.weight_BHSS]

    def patches(self, value_BS: Float[Tensor, "B S"]) -> Float[Tensor, "B h w"]:
        """Values of all tokens -> a map of the patches."""
        return value_BS[:, self.layout.prefix :].reshape(-1, *self.layout.grid)

    def packed(self, place: int) -> PackedTokens:
        """The tokens that enter block `place`, or that left the one before."""
        return PackedTokens(self.token_TD[place], self.layout)

    def answer_row(self, value_BSS: Float[Tensor, "B S S"]) -> Float[Tensor, "B h w"]:
        """What the tokens that answer take from each patch.

        That is the class token's row (with a distillation token, the mean of both), or the mean row where patches are pooled.
        """
        rows = slice(self.layout.prefix, None) if self.adapter.needs_patch else slice(0, self.adapter.answering)
        return self.patches(value_BSS[:, rows].mean(1))


def dense_pass(model: ReducedTransformer, images: Float[Tensor, "B C height width"]) -> DensePass:
    """Runs the backbone densely. Gradients can be asked of it where they are enabled; parameters receive none."""
    adapter = model.adapter
    tokens = adapter.embed(images)
    # The graph begins here: explainers of tokens need nothing before.
    tokens = tokens.with_x(tokens.x_TD.detach().requires_grad_(torch.is_grad_enabled()))
    return pass_from(adapter, tokens)


def pass_from(adapter: BackboneAdapter, tokens: PackedTokens) -> DensePass:
    """The same from embedded tokens on."""
    layout, seen = tokens.layout, []
    attention: list[list[Tensor]] = []
    for block in range(adapter.depth):
        seen.append(tokens.x_TD)
        with recording() as records:
            tokens = adapter.attend(block, tokens).tokens
        tokens = adapter.feed(block, tokens)
        attention.append([record.weight_BHSS for record in records])
    seen.append(tokens.x_TD)
    output = adapter.head(tokens).float()
    return DensePass(adapter, seen, attention, output, layout)


def gain(output_BC: Float[Tensor, "B *C"], target_B: Int[Tensor, " B"] | None, classes: int) -> Float[Tensor, " B"]:
    """What is explained: the logit of the target (of the predicted class without one), or how an embedding holds its direction.

    Raises:
        ConfigError: as `explained_class`.
    """
    chosen_B = explained_class(output_BC, target_B, classes)
    if chosen_B is None:
        return (output_BC * F.normalize(output_BC.detach(), dim=1)).sum(1)
    return output_BC.gather(1, chosen_B[:, None]).squeeze(1)


def explained_class(output_BC: Float[Tensor, "B *C"], target_B: Int[Tensor, " B"] | None, classes: int) -> Int[Tensor, " B"] | None:
    """The target, or the predicted class without one; None for a model without a classifier.

    Raises:
        ConfigError: a class outside of the head, or a model that answers for every token.
    """
    if output_BC.ndim != 2:
        raise ConfigError("this model answers for every token (global_pool=''), so there is no one answer to explain; give it a pooling")
    if not classes:
        return None
    return output_BC.argmax(1) if target_B is None else check_target(target_B, classes).to(output_BC.device)


def check_target(target_B: Int[Tensor, " B"], classes: int) -> Int[Tensor, " B"]:
    """The target itself.

    Raises:
        ConfigError: a class outside of the head.
    """
    wrong = [int(c) for c in target_B.tolist() if not 0 <= c < classes]
    if wrong:
        raise ConfigError(f"target: got class {wrong[0]}, but the head knows classes 0 to {classes - 1}")
    return target_B.long()


def gradients(passed: DensePass, wanted: Sequence[Tensor], target_B: Int[Tensor, " B"] | None, classes: int) -> list[Tensor]:
    """Gradients of what is explained with respect to parts of the pass; zero for parts that it does not depend on."""
    total = gain(passed.output_BC, target_B, classes).sum()
    found = torch.autograd.grad(total, list(wanted), allow_unused=True)
    return [torch.zeros_like(part) if grad is None else grad for part, grad in zip(wanted, found, strict=True)]


def attention_gradients(passed: DensePass, first: int, target_B: Int[Tensor, " B"] | None, classes: int) -> list[Float[Tensor, "B _H S S"]]:
    """Gradients of what is explained with respect to the attention of blocks from `first` on, shaped as `attention_BHSS`."""
    parts = passed.weight_BHSS[first:]
    found = iter(gradients(passed, [weight for block in parts for weight in block], target_B, classes))
    return [torch.cat([next(found) for _ in block], dim=1) for block in parts]
