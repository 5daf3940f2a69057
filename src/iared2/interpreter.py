"""Eq. 1: the multi-head interpreter, which scores patch tokens against a policy token.

    I_ij = 1/H sum_h sigmoid( F_q^h(X_i) . F_k^h(P_j) )

| paper | here |
|---|---|
| X_i | a patch token, normalised first if `norm` |
| P_j | `policy_token`, learned per group; or the group's own class token (`policy="class"`) |
| F_q^h, F_k^h | `query`, `key`: linear layers, split into H heads |
| I_ij | the score, in [0, 1] |
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from iared2.errors import ConfigError
from iared2.settings import Settings
from iared2.tokens.packed import Layout, PackedTokens, best_of_patches, sum_of_patches
from iared2.tokens.padded import times_own_matrix


class InterpreterConfig(Settings):
    """How patches are scored. `paper()` gives Eq. 1 to the letter; the defaults are steadier."""

    policy: Literal["learned", "class"] = Field("learned", description="policy side: a learned token, or the class token")
    heads: int | None = Field(None, gt=0, description="heads H; None takes the backbone's")
    norm: bool = Field(True, description="LayerNorm without parameters before the projections")
    scale: bool = Field(True, description="divide the dot product by sqrt(head width)")
    init_score: float = Field(0.9, gt=0, lt=1, description="mean score before training")
    context: bool = Field(False, description="the class token's attention, which the backbone computes anyway, as a further input")
    start: Literal["small", "attention"] = Field("small", description="random weights, or the class attention of the group's block")

    @classmethod
    def paper(cls) -> "InterpreterConfig":
        """Eq. 1 without norm and scale, starting at 0.5 as the authors' surviving tool does."""
        return cls(norm=False, scale=False, init_score=0.5)


@dataclass(frozen=True)
class QueryKey:
    """Query and key side of an attention layer, on tokens normalised without parameters."""

    query_weight_DD: Float[Tensor, "D D"]
    query_bias_D: Float[Tensor, " D"]
    key_weight_DD: Float[Tensor, "D D"]
    key_bias_D: Float[Tensor, " D"]
    heads: int
    scale: float


class Interpreter(nn.Module):
    """Scores every row of a pack (prefix rows too; keep rules ignore those).

    Query and key fold into one (D, H) matrix, because (F_q x) . k = x . (F_q^T k): the same scores for D x H
    instead of D x D multiply-adds per token, in training and inference alike. With a learned policy token there
    is one such matrix; with the class token as policy, one for each image, at 2 D^2.
    """

    def __init__(self, width: int, heads: int, config: InterpreterConfig) -> None:
        super().__init__()
        if width % heads:
            raise ConfigError(f"interpreter: width {width} is not divisible by {heads} heads; choose heads that divide it")
        self.config, self.width, self.heads = config, width, heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.policy_token = nn.Parameter(torch.randn(width) * 0.02) if config.policy == "learned" else None
        self.context_H = nn.Parameter(torch.ones(heads)) if config.context else None
        self._start_at(config.init_score)
        self._kept: tuple[tuple[tuple[int, int], ...], tuple[Tensor, Tensor]] | None = None

    @property
    def _scale(self) -> float:
        return (self.width // self.heads) ** -0.5 if self.config.scale else 1.0

    def _start_at(self, score: float) -> None:
        """Small weights, and biases whose dot product alone gives the starting score."""
        logit = math.log(score / (1 - score)) / self._scale
        each = math.sqrt(abs(logit) / (self.width // self.heads))
        for linear, sign in ((self.query, 1.0), (self.key, math.copysign(1.0, logit))):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.constant_(linear.bias, sign * each)

    @torch.no_grad()
    def start_from(self, attention: QueryKey) -> None:
        """Starts as the class attention of a block, before its softmax: query and key of Eq. 1 are the block's own.

        Raises:
            ConfigError: the interpreter has a learned policy token, or other heads than the attention.
        """
        if self.policy_token is not None or not self.config.norm or attention.heads != self.heads:
            raise ConfigError(
                f"interpreter: start='attention' needs policy='class', norm=true and the {attention.heads} heads of the backbone; "
                f"got policy={self.config.policy!r}, norm={self.config.norm}, {self.heads} heads"
            )
        factor = attention.scale / self._scale
        # Patches are the keys of attention and the queries of Eq. 1, the class token the other way round.
        self.query.weight.copy_(attention.key_weight_DD * factor)
        self.query.bias.copy_(attention.key_bias_D * factor)
        self.key.weight.copy_(attention.query_weight_DD)
        self.key.bias.copy_(attention.query_bias_D)

    @torch.no_grad()
    def sharpen(self, factor: float) -> None:
        """Makes every dot product `factor` times as large."""
        self.query.weight.mul_(factor)
        self.query.bias.mul_(factor)

    @torch.no_grad()
    def shift_to(self, ratio: float, tokens: PackedTokens) -> None:
        """Moves dot products by constants, one per head, so that `ratio` of the grid scores above one half on these tokens."""
        layout = tokens.layout
        logit_PH = self.logits(tokens)[layout.is_patch_T]
        last = min(len(logit_PH) - 1, max(1, round(ratio * layout.places * layout.images)))

        def boundary(value: Tensor) -> Tensor:
            ranked = value.sort(dim=0, descending=True).values
            return (ranked[last - 1] + ranked[last]) / 2

        centred_PH = logit_PH - boundary(logit_PH)  # heads on one scale, so that each has a say
        low, high = -20.0, 20.0
        for _ in range(40):
            middle = (low + high) / 2
            enough = boundary((centred_PH + middle).sigmoid().mean(-1)) > 0.5
            low, high = (low, middle) if enough else (middle, high)
        offset_H = (high - boundary(logit_PH)) / self._scale
        x_TD = F.layer_norm(tokens.x_TD, (self.width,)) if self.config.norm else tokens.x_TD
        policy = self.policy_token if self.policy_token is not None else x_TD[layout.cu_B1[:-1].long()]
        mean_HK = self.key(policy).view(-1, self.heads, self.width // self.heads).mean(0)
        # A bias on the query side adds bias . key: along the mean key it is the wanted constant, on average.
        step_HK = offset_H.to(mean_HK.dtype)[:, None] * mean_HK / mean_HK.square().sum(-1, keepdim=True)
        self.query.bias.add_(step_HK.reshape(-1))

    def folded(self) -> tuple[Float[Tensor, "H D"], Float[Tensor, " H"]]:
        """Query and key as one linear map per head (learned policy token only)."""
        key_HK = self.key(self.policy_token).view(self.heads, -1) * self._scale
        weight_HD = torch.einsum("hkd,hk->hd", self.query.weight.view(self.heads, -1, self.width), key_HK)
        return weight_HD, (self.query.bias.view(self.heads, -1) * key_HK).sum(-1)

    def _folded_once(self) -> tuple[Float[Tensor, "H D"], Float[Tensor, " H"]]:
        """`folded`, kept from call to call in plain inference: for one picture, folding would take longer than scoring.

        Weights changed through `.data`, which autograd does not count, are seen after `train()` or `eval()` only.
        """
        parameters = list(self.parameters())
        plain = not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling())
        if not plain or torch.is_autocast_enabled(parameters[0].device.type) or any(p.is_inference() for p in parameters):
            return self.folded()
        versions = tuple((p.data_ptr(), p._version) for p in parameters)  # noqa: SLF001 - counts changes in place
        if self._kept is None or self._kept[0] != versions:
            self._kept = (versions, self.folded())
        return self._kept[1]

    def train(self, mode: bool = True) -> "Interpreter":
        """As any module's; forgets what was folded before."""
        self._kept = None
        return super().train(mode)

    def forward(self, tokens: PackedTokens, class_TH: Float[Tensor, "T H"] | None = None) -> Float[Tensor, " T"]:
        """Scores I of Eq. 1 for every row.

        Args:
            class_TH: the class token's attention logits, for interpreters with `context`.
        """
        return self.logits(tokens, class_TH).sigmoid().mean(-1)

    def logits(self, tokens: PackedTokens, class_TH: Float[Tensor, "T H"] | None = None) -> Float[Tensor, "T H"]:
        """The dot products of Eq. 1, one per head. With `context`, to each is added w_h log(n a_h).

        a_h is what the class token pays to this patch of all it pays to the n patches of the image, so that the term is 0 for a
        patch of average interest.
        """
        product_TH = self._products(tokens)
        if self.context_H is None:
            return product_TH
        if class_TH is None:
            raise ConfigError("interpreter: context=true needs the class token's attention, which this call did not give")
        return product_TH + self.context_H * relative_log(class_TH, tokens.layout)

    def _products(self, tokens: PackedTokens) -> Float[Tensor, "T H"]:
        x_TD = F.layer_norm(tokens.x_TD, (self.width,)) if self.config.norm else tokens.x_TD
        if self.policy_token is not None:
            weight_HD, bias_H = self._folded_once()
            return _at_least_fp32(F.linear(x_TD, weight_HD.to(x_TD.dtype), bias_H.to(x_TD.dtype)))
        layout = tokens.layout
        key_BHK = self.key(x_TD[layout.cu_B1[:-1].long()]).view(-1, self.heads, self.width // self.heads)
        query_HKD = self.query.weight.to(x_TD.dtype).view(self.heads, -1, self.width)
        weight_BHD = torch.einsum("bhk,hkd->bhd", key_BHK, query_HKD)
        bias_BH = (key_BHK * self.query.bias.to(x_TD.dtype).view(self.heads, -1)).sum(-1)
        product_TH = times_own_matrix(x_TD, weight_BHD.transpose(1, 2), layout.padding)
        return (product_TH + bias_BH[layout.image_T]) * self._scale

    def macs(self, patches: int) -> int:
        """Multiply-adds for scoring `patches` patch tokens of one image at inference."""
        each = patches * self.width * self.heads + (patches * self.width if self.context_H is not None else 0)
        return each if self.policy_token is not None else each + 2 * self.width * self.width


def relative_log(class_TH: Float[Tensor, "T H"], layout: Layout) -> Float[Tensor, "T H"]:
    """log(n a) for attention logits: a is the softmax over the image's n patches."""
    top_BH = best_of_patches(class_TH, layout).nan_to_num(neginf=0.0)
    above_TH = class_TH - top_BH[layout.image_T]
    patches_B = (layout.length_B - layout.prefix).clamp(min=1)
    mean_BH = torch.stack([sum_of_patches(above.exp(), layout) for above in above_TH.unbind(1)], dim=1) / patches_B[:, None]
    return above_TH - mean_BH.clamp(min=1e-30).log()[layout.image_T]


def _at_least_fp32(x: Tensor) -> Tensor:
    """Half precision has too few digits between 0.5 and 1 for scores."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
