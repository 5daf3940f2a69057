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
| norm | as it came | as a linear layer whose scale is a constant |
| activation | as it came | as it came (identity rule) |

Biases take nothing in deep Taylor, so relevance is conserved from layer to layer; in AttnLRP they take their share.

What the backward pass carries is relevance R in deep Taylor, and R / x, relevance per unit of value, in AttnLRP. The second makes
most of its rules those of plain gradients (R / x of a sum goes to its summands as it is), and never divides by sums that cancel: over
twelve blocks such quotients grow beyond all bounds.
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


def _share(relevance: Tensor, of: Tensor) -> Tensor:
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
            part = _share(relevance, agreeing)
            return up * (part @ more) + down * (part @ less), None, None, None
        gamma, opposing = ctx.rules.gamma, up @ less.T + down @ more.T
        above = torch.where(out >= 0, _share(relevance * out, out + gamma * agreeing), 0.0)
        below = torch.where(out < 0, _share(relevance * out, out + gamma * opposing), 0.0)
        found = (above + below) @ weight
        if gamma:
            found = found + gamma * torch.where(x >= 0, above @ more + below @ less, above @ less + below @ more)
        return found, None, None, None


class _Add(torch.autograd.Function):
    """The sum of two (deep Taylor; in AttnLRP it is a sum like any other)."""

    @staticmethod
    def forward(ctx: Any, one: Tensor, two: Tensor, images: int) -> Tensor:
        ctx.save_for_backward(one, two)
        ctx.images = images
        return one + two

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> tuple:
        one, two = ctx.saved_tensors
        part = _share(relevance, one + two)
        return (*_put_right((one * part, two * part), relevance, ctx.images), None)


def _put_right(parts: tuple[Tensor, Tensor], relevance: Tensor, images: int) -> tuple[Tensor, Tensor]:
    """Eq. 12: summands of opposite sign make parts of any size; each is scaled so that they add up to what came, in every image."""
    one_B, two_B, whole_B = (part.reshape(images, -1).sum(1, keepdim=True) for part in (*parts, relevance))
    weight_B = one_B.abs() + two_B.abs() + _LEAST

    def scaled(part: Tensor, total_B: Tensor) -> Tensor:
        return (part.reshape(images, -1) * _share(total_B.abs() / weight_B * whole_B, total_B)).view_as(part)

    return scaled(parts[0], one_B), scaled(parts[1], two_B)


class _Matmul(torch.autograd.Function):
    """The product of two matrices."""

    @staticmethod
    def forward(ctx: Any, one: Tensor, two: Tensor, rules: Rules) -> Tensor:
        out = one @ two
        ctx.save_for_backward(one, two, out)
        ctx.rules = rules
        return out

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> tuple:
        one, two, out = ctx.saved_tensors
        part = (relevance if ctx.rules.attn else _share(relevance, out)) / 2
        back = part @ two.transpose(-2, -1), one.transpose(-2, -1) @ part
        return (*(back if ctx.rules.attn else (one * back[0], two * back[1])), None)


def _norm(func: Callable, x: Tensor, args: tuple, kwargs: dict) -> Tensor:
    """The same norm, as a linear layer: its scale, one over the spread of these very values, is a constant."""
    (shape, weight, bias, eps), last = _norm_arguments(func, args, kwargs), len(x.shape)
    axes = list(range(last - len(shape), last))
    centred = x - x.mean(axes, keepdim=True) if func is F.layer_norm else x
    scale = (centred.detach().square().mean(axes, keepdim=True) + eps).rsqrt()
    out = centred * scale if weight is None else centred * scale * weight
    return out if bias is None else out + bias


def _norm_arguments(func: Callable, args: tuple, kwargs: dict) -> tuple[Any, Tensor | None, Tensor | None, float]:
    names = ("normalized_shape", "weight", "bias", "eps") if func is F.layer_norm else ("normalized_shape", "weight", "eps")
    given = dict(zip(names, args[1:], strict=False)) | kwargs
    eps = given.get("eps", 1e-5 if func is F.layer_norm else None)
    return given["normalized_shape"], given.get("weight"), given.get("bias"), torch.finfo(torch.float32).eps if eps is None else eps


def _activation(func: Callable, x: Tensor, args: tuple, kwargs: dict) -> Tensor:
    """The same activation, as a factor: with R as it came, R / x is that of the output times f(x) / x."""
    with torch.no_grad():
        value = func(*args, **kwargs)
    factor = torch.where(x.detach() == 0, 0.0, value / torch.where(x.detach() == 0, 1.0, x.detach()))
    return x * factor + (value - x.detach() * factor)  # what rounding leaves carries nothing


_LINEAR = {F.linear}
_ADD = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__}
_MATMUL = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm}
_SOFTMAX = {torch.softmax, Tensor.softmax, F.softmax}
_PRODUCT = {torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__}
_QUOTIENT = {torch.div, Tensor.div, Tensor.__truediv__}
_NORM = {F.layer_norm, F.rms_norm}
_ACTIVATION = {F.gelu, F.relu, F.silu, F.hardtanh, torch.tanh, Tensor.tanh, torch.relu, Tensor.relu}


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
        if self.rules.attn and func in _NORM:
            return _norm(func, first, args, kwargs)
        if self.rules.attn and func in _ACTIVATION:
            return _activation(func, first, args, kwargs)
        if not self.rules.attn and func in _NORM | _ACTIVATION | _SOFTMAX:
            return _same(first, func, args, kwargs)
        return self._of_two(func, args, kwargs)

    def _of_two(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """Operations whose rule depends on what the second operand is."""
        if len(args) < 2 or kwargs.get("alpha", 1) != 1:
            return func(*args, **kwargs)
        one, two = args[:2]
        active = [isinstance(x, Tensor) and x.requires_grad and not isinstance(x, nn.Parameter) for x in (one, two)]
        if func in _MATMUL and all(active):
            return _Matmul.apply(one, two, self.rules)
        if self.rules.attn:
            both = func in _PRODUCT and all(active)
            return (one * two.detach() + one.detach() * two) / 2 if both else func(*args, **kwargs)
        if func in _ADD and all(active) and one.shape == two.shape:
            return _Add.apply(one, two, self.rules.images)
        if func in _PRODUCT | _QUOTIENT and sum(active) == 1:  # by a number, a parameter, or a mask
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
