"""Layer-wise relevance propagation through any backbone: the backward pass carries relevance instead of gradients.

While `propagating(rules)` is on, every linear layer, sum, product, softmax, norm and activation that the backbone calls is
replaced by one with the same output and another backward pass. No layer has to be known by name.

Deep Taylor is Chefer et al. 2021, "Transformer Interpretability Beyond Attention Visualization"; AttnLRP Achtibat et al. 2024.

| operation | deep Taylor | AttnLRP |
|---|---|---|
| linear | among the products x_j w_ij of one sign (Eq. 4) | generalised gamma rule; gamma = 0 is the epsilon rule |
| sum of two | in proportion to the summands, then put right in total (Eq. 7 and 12) | in proportion to the summands |
| product of two | half of it to each, in proportion (Eq. 7, normalised) | the same (uniform rule) |
| softmax | as it came | x (R - s sum R) (Eq. 14) |
| norm, activation, scaling by constants | as it came | as it came (identity rule) |

Biases take nothing in deep Taylor, so relevance is conserved from layer to layer; in AttnLRP they take their share.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_LEAST = 1e-9


@dataclass(frozen=True)
class Rules:
    """How relevance goes back.

    Attributes:
        attn: the rules of AttnLRP instead of deep Taylor.
        gamma: of AttnLRP's linear layers.
        images: how many images the batch holds; what is put right is put right image by image.
    """

    images: int
    attn: bool = False
    gamma: float = 0.0


def share(relevance: Tensor, of: Tensor) -> Tensor:
    """R / z, with z kept away from zero."""
    return relevance / (of + torch.where(of < 0, -_LEAST, _LEAST))


class _Same(torch.autograd.Function):
    """A changed value whose relevance goes back as it came."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> tuple:
        return relevance, None


class _Linear(torch.autograd.Function):
    """x W + b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, rules: Rules) -> Tensor:
        out = F.linear(x, weight, bias)
        ctx.save_for_backward(x, weight, out)
        ctx.rules = rules
        return out

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> tuple:
        x, weight, out = ctx.saved_tensors
        up, down, more, less = x.clamp(min=0), x.clamp(max=0), weight.clamp(min=0), weight.clamp(max=0)
        agreeing = up @ more.T + down @ less.T
        if not ctx.rules.attn:
            part = share(relevance, agreeing)
            return up * (part @ more) + down * (part @ less), None, None, None
        gamma, opposing = ctx.rules.gamma, up @ less.T + down @ more.T
        above = torch.where(out >= 0, share(relevance, out + gamma * agreeing), 0.0)
        below = torch.where(out < 0, share(relevance, out + gamma * opposing), 0.0)
        found = x * ((above + below) @ weight)
        if gamma:
            found = found + gamma * (up * (above @ more + below @ less) + down * (above @ less + below @ more))
        return found, None, None, None


class _Add(torch.autograd.Function):
    """The sum of two."""

    @staticmethod
    def forward(ctx: Any, one: Tensor, two: Tensor, rules: Rules) -> Tensor:
        ctx.save_for_backward(one, two)
        ctx.rules = rules
        return one + two

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> tuple:
        one, two = ctx.saved_tensors
        part = share(relevance, one + two)
        parts = one * part, two * part
        return (*(parts if ctx.rules.attn else _put_right(parts, relevance, ctx.rules.images)), None)


def _put_right(parts: tuple[Tensor, Tensor], relevance: Tensor, images: int) -> tuple[Tensor, Tensor]:
    """Eq. 12: summands of opposite sign make parts of any size; each is scaled so that they add up to what came, in every image."""
    one_B, two_B, whole_B = (part.reshape(images, -1).sum(1, keepdim=True) for part in (*parts, relevance))
    weight_B = one_B.abs() + two_B.abs() + _LEAST

    def scaled(part: Tensor, total_B: Tensor) -> Tensor:
        return (part.reshape(images, -1) * share(total_B.abs() / weight_B * whole_B, total_B)).view_as(part)

    return scaled(parts[0], one_B), scaled(parts[1], two_B)


class _Matmul(torch.autograd.Function):
    """The product of two matrices."""

    @staticmethod
    def forward(ctx: Any, one: Tensor, two: Tensor) -> Tensor:
        out = one @ two
        ctx.save_for_backward(one, two, out)
        return out

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> tuple:
        one, two, out = ctx.saved_tensors
        part = share(relevance, out) / 2
        return one * (part @ two.transpose(-2, -1)), two * (one.transpose(-2, -1) @ part)


class _Softmax(torch.autograd.Function):
    """AttnLRP's rule: the first term of a Taylor expansion at the scores themselves."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> Tensor:
        out = x.softmax(dim)
        ctx.save_for_backward(x, out)
        ctx.dim = dim
        return out

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> tuple:
        x, out = ctx.saved_tensors
        return x * (relevance - out * relevance.sum(ctx.dim, keepdim=True)), None


_LINEAR = {F.linear}
_ADD = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__}
_MATMUL = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm}
_SOFTMAX = {torch.softmax, Tensor.softmax, F.softmax}
_SCALE = {torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.div, Tensor.div, Tensor.__truediv__}
_PASS = {F.layer_norm, F.rms_norm, F.gelu, F.relu, F.silu, F.hardtanh, torch.tanh, Tensor.tanh, torch.relu, Tensor.relu}


class _Propagation(TorchFunctionMode):
    def __init__(self, rules: Rules) -> None:
        super().__init__()
        self.rules = rules

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else kwargs.get("input")
        if not isinstance(first, Tensor) or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if func in _LINEAR:
            weight, bias = (*args, None, None)[1:3]
            return _Linear.apply(first, kwargs.get("weight", weight), kwargs.get("bias", bias), self.rules)
        if func in _PASS:
            return _same(first, func, args, kwargs)
        if func in _SOFTMAX:
            dim = kwargs.get("dim", args[1] if len(args) > 1 else -1)
            return _Softmax.apply(first, dim) if self.rules.attn else _same(first, func, args, kwargs)
        return self._of_two(func, args, kwargs)

    def _of_two(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """Operations whose rule depends on what the second operand is."""
        if len(args) < 2 or kwargs.get("alpha", 1) != 1:
            return func(*args, **kwargs)
        one, two = args[:2]
        active = [isinstance(x, Tensor) and x.requires_grad and not isinstance(x, nn.Parameter) for x in (one, two)]
        if func in _ADD and all(active) and one.shape == two.shape:
            return _Add.apply(one, two, self.rules)
        if func in _MATMUL and all(active):
            return _Matmul.apply(one, two)
        if func in _SCALE and sum(active) == 1:  # by a number, a parameter, or a mask
            return _same(one if active[0] else two, func, args, kwargs)
        return func(*args, **kwargs)


def _same(x: Tensor, func: Callable, args: tuple, kwargs: dict) -> Tensor:
    with torch.no_grad():
        value = func(*args, **kwargs)
    return _Same.apply(x, value) if x.shape == value.shape else func(*args, **kwargs)


@contextmanager
def propagating(rules: Rules) -> Iterator[None]:
    """Within, what is computed goes back as relevance. Backward passes may be taken outside."""
    with _Propagation(rules):
        yield
