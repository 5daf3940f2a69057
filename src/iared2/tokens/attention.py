"""Attention among the tokens of each image of a pack: one facade, several implementations.

| implementation | when |
|---|---|
| `uniform`  | all images have the same length by construction: one call of PyTorch's fused attention |
| `varlen`   | CUDA in half precision: one call of the variable-length flash kernel |
| `buckets`  | elsewhere: one fused call per bucket of images of similar length, padded to one length (`padded`) |
| `masked`   | the readable reference: a block-diagonal mask over the whole pack, O(T^2) |

Mass enters as log(mass) added to the scores of a key (ToMe, "proportional attention"). The variable-length
kernel takes no bias, so there the bias rides in one extra channel of q (one) and k (log(mass) / scale).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from iared2.errors import ConfigError
from iared2.tokens.packed import Layout
from iared2.tokens.padded import Bucket, Padding, buckets_by_length

IMPLEMENTATIONS = ("auto", "uniform", "varlen", "buckets", "masked")


def attend(  # noqa: PLR0913, PLR0917 - q, k and v are one thing in three parts
    q_THK: Float[Tensor, "T H K"],
    k_THK: Float[Tensor, "T H K"],
    v_THV: Float[Tensor, "T H V"],
    layout: Layout,
    mass_T: Float[Tensor, " T"] | None = None,
    dropout: float = 0.0,
    impl: str = "auto",
) -> Float[Tensor, "T H V"]:
    """softmax(q k^T / sqrt(K) + log mass) v within each image.

    Args:
        dropout: probability of dropping an attention weight (training only; 0 in evaluation).
        impl: one of `IMPLEMENTATIONS`; "auto" picks by device, precision and lengths.

    Raises:
        ConfigError: an unknown implementation, or one that cannot serve these tensors.
    """
    records = None if torch.compiler.is_compiling() else _RECORDS.get()  # graphs know no context variables
    if records is not None:
        return _recorded(q_THK, k_THK, v_THV, layout, mass_T, records)
    chosen = _choose(q_THK, layout, dropout) if impl == "auto" else impl
    bias_T = None if mass_T is None else mass_T.log().to(q_THK.dtype)
    if chosen == "uniform":
        if layout.uniform is None:
            raise ConfigError("attention 'uniform': the images have different lengths; use 'buckets' or 'auto'")
        return _padded(q_THK, k_THK, v_THV, bias_T, layout.padding, dropout)
    if chosen == "varlen":
        return _varlen(q_THK, k_THK, v_THV, bias_T, layout)
    if chosen == "buckets":
        if torch.compiler.is_compiling() and dropout == 0:
            return torch.ops.iared2.segments(q_THK, k_THK, v_THV, bias_T, layout.cu_B1)
        return _padded(q_THK, k_THK, v_THV, bias_T, layout.padding, dropout)
    if chosen == "masked":
        return _masked(q_THK, k_THK, v_THV, bias_T, layout.image_T, dropout)
    raise ConfigError(f"attention: got impl={impl!r}, wanted one of {', '.join(IMPLEMENTATIONS)}")


def attend_prefix(
    q_BLHK: Float[Tensor, "B L H K"],
    k_THK: Float[Tensor, "T H K"],
    v_THV: Float[Tensor, "T H V"],
    layout: Layout,
    mass_T: Float[Tensor, " T"] | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "B L H V"]:
    """As `attend`, for L queries per image alone, which look at all tokens of their image.

    Raises:
        ConfigError: attention is being recorded, which takes queries of all tokens.
    """
    if not torch.compiler.is_compiling() and _RECORDS.get() is not None:
        raise ConfigError("attention of prefix tokens alone cannot be recorded; run the last block in full (configure(skip_unread=False))")
    bias_T = None if mass_T is None else mass_T.log().to(q_BLHK.dtype)
    found = []
    for k1, v1, bias, bucket in _by_bucket(k_THK, v_THV, bias_T, layout.padding):
        q1 = q_BLHK if bucket.image_b is None else q_BLHK[bucket.image_b]
        found.append(_fused(q1.transpose(1, 2), k1, v1, bias, dropout).transpose(1, 2))
    if len(found) == 1 and layout.padding.buckets[0].image_b is None:
        return found[0]
    image_B = torch.cat([bucket.image_b for bucket in layout.padding.buckets if bucket.image_b is not None])
    return torch.cat(found)[image_B.argsort()]


@dataclass
class Recorded:
    """One call of attention as it happened, for images of equal length. B images, H heads, S tokens each.

    Attributes:
        weight_BHSS: softmax weights; rows are queries. Part of the graph, so that gradients can be asked for.
    """

    weight_BHSS: Float[Tensor, "B H S S"]


_RECORDS: ContextVar[list[Recorded] | None] = ContextVar("records", default=None)


@contextmanager
def recording() -> Iterator[list[Recorded]]:
    """Within, attention is computed step by step, and every call leaves its weights in the list.

    This is how explainers see attention: no hooks, whichever module asks and whatever kernel it would have used.
    """
    records: list[Recorded] = []
    token = _RECORDS.set(records)
    try:
        yield records
    finally:
        _RECORDS.reset(token)


def class_logits(q_THK: Float[Tensor, "T H K"], k_THK: Float[Tensor, "T H K"], layout: Layout) -> Float[Tensor, "T H"]:
    """What each image's first token attends to: q k^T / sqrt(K) of every row, mass left out, in fp32 at least."""
    exact = torch.promote_types(q_THK.dtype, torch.float32)
    first_BHK = q_THK[layout.cu_B1[:-1].long()].to(exact) * q_THK.shape[-1] ** -0.5
    if layout.padding.lengths is not None:  # image by image: moving keys would take longer
        return torch.cat(
            [(k_LHK * first_HK).sum(-1) for k_LHK, first_HK in zip(k_THK.split(layout.padding.lengths), first_BHK, strict=True)]
        )
    with torch.autocast(q_THK.device.type, enabled=False):
        out = []
        for k_bLHK, bucket in zip(layout.padding.spread(k_THK), layout.padding.buckets, strict=True):
            first_bHK = first_BHK if bucket.image_b is None else first_BHK[bucket.image_b]
            logit_bHL1 = k_bLHK.transpose(1, 2).to(exact) @ first_bHK[..., None]
            out.append(logit_bHL1.squeeze(-1).transpose(1, 2))
    return layout.padding.collect(out)


def _recorded(q: Tensor, k: Tensor, v: Tensor, layout: Layout, mass_T: Tensor | None, records: list[Recorded]) -> Tensor:
    if layout.uniform is None:
        raise ConfigError("attention can be recorded where all images have the same number of tokens; nothing may be dropped there")
    exact = torch.promote_types(q.dtype, torch.float32)  # as fused kernels do inside
    with torch.autocast(q.device.type, enabled=False):
        q1, k1, v1 = (x.to(exact).view(-1, layout.uniform, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        scores = q1 * q.shape[-1] ** -0.5 @ k1.transpose(-2, -1)
        if mass_T is not None:
            scores = scores + mass_T.log().view(-1, 1, 1, layout.uniform)
        weights = scores.softmax(-1)
        records.append(Recorded(weights))
        return (weights @ v1).transpose(1, 2).reshape(v.shape).to(v.dtype)


def _choose(q_THK: Tensor, layout: Layout, dropout: float) -> str:
    if layout.uniform is not None:
        return "uniform"
    if q_THK.is_cuda and q_THK.dtype in (torch.float16, torch.bfloat16) and dropout == 0:
        return "varlen"
    return "buckets"


def _differentiable(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
    """(..., H, n, K) attention by the fastest kernel for the case."""
    if q.device.type == "cpu" and _differentiable(q, k, v, bias):
        # The fused CPU kernel's backward takes about twice as long as the whole of these four operations.
        exact = torch.promote_types(q.dtype, torch.float32)  # as fused kernels do inside: scores in bf16 cost two digits
        with torch.autocast("cpu", enabled=False):
            scores = (q.to(exact) * q.shape[-1] ** -0.5) @ k.to(exact).transpose(-2, -1)
            weights = (scores if bias is None else scores + bias).softmax(-1)
            return F.dropout(weights, dropout).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)


def _padded(q: Tensor, k: Tensor, v: Tensor, bias_T: Tensor | None, padding: Padding, dropout: float) -> Tensor:
    """One fused call per bucket of images of similar length. Padded keys weigh nothing, padded queries go nowhere."""
    if not q.shape[0]:  # no token
        return v
    each = zip(padding.spread(q), _by_bucket(k, v, bias_T, padding), strict=True)
    return padding.collect([_fused(q1.transpose(1, 2), k1, v1, bias, dropout).transpose(1, 2) for q1, (k1, v1, bias, _) in each])


def _by_bucket(k: Tensor, v: Tensor, bias_T: Tensor | None, padding: Padding) -> Iterator[tuple[Tensor, Tensor, Tensor | None, Bucket]]:
    """Keys and values (b, H, L, ...) of each bucket, and what is added to scores: padded keys weigh nothing."""
    biases = [None] * len(padding.buckets) if bias_T is None else padding.spread(bias_T)
    for k1, v1, bias_bL, bucket in zip(padding.spread(k), padding.spread(v), biases, padding.buckets, strict=True):
        bias = bias_bL
        if bucket.filled_bL is not None:
            known_bL = k.new_zeros(bucket.row_bL.shape) if bias_bL is None else bias_bL
            bias = known_bL.masked_fill(~bucket.filled_bL, torch.finfo(k.dtype).min / 2)  # not -inf: an image may have no token at all
        yield k1.transpose(1, 2), v1.transpose(1, 2), None if bias is None else bias[:, None, None, :], bucket


def _varlen(q: Tensor, k: Tensor, v: Tensor, bias_T: Tensor | None, layout: Layout) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    scale, width, out_width = q.shape[-1] ** -0.5, q.shape[-1], v.shape[-1]
    extra = 0 if bias_T is None else 1
    padded = -(-max(width + extra, out_width) // 8) * 8  # the kernel wants equal head widths, a multiple of 8

    def widened(x: Tensor, channel: Tensor | None) -> Tensor:
        wide = F.pad(x, (0, padded - x.shape[-1]))
        if channel is None:
            return wide
        return torch.cat([wide[..., :width], channel.expand(*x.shape[:2], 1), wide[..., width + 1 :]], dim=-1)

    one = None if bias_T is None else q.new_ones(1, 1, 1)
    bias = None if bias_T is None else (bias_T / scale)[:, None, None]
    cu = layout.cu_B1
    out: Any = varlen_attn(widened(q, one), widened(k, bias), widened(v, None), cu, cu, layout.longest, layout.longest, scale=scale)
    return out[..., :out_width]


def _masked(q: Tensor, k: Tensor, v: Tensor, bias_T: Tensor | None, image_T: Int[Tensor, " T"], dropout: float) -> Tensor:
    exact = torch.promote_types(q.dtype, torch.float32)  # as fused kernels do inside
    scores_HTT = torch.einsum("thk,shk->hts", q.to(exact), k.to(exact)) * q.shape[-1] ** -0.5
    if bias_T is not None:
        scores_HTT = scores_HTT + bias_T
    other = image_T[:, None] != image_T[None, :]
    weights = scores_HTT.masked_fill(other, float("-inf")).softmax(-1)
    return torch.einsum("hts,shv->thv", F.dropout(weights, dropout), v.to(exact)).to(v.dtype)


@torch.library.custom_op("iared2::segments", mutates_args=())
def _segments_op(q: Tensor, k: Tensor, v: Tensor, bias_T: Tensor | None, cu_B1: Tensor) -> Tensor:
    """`segments` as one opaque operator, so that compiled graphs need not know the lengths."""
    with torch.no_grad():
        return _padded(q, k, v, bias_T, buckets_by_length(cu_B1.tolist()), 0.0)


@_segments_op.register_fake
def _segments_shape(q: Tensor, k: Tensor, v: Tensor, bias_T: Tensor | None, cu_B1: Tensor) -> Tensor:
    return torch.empty_like(v)


@torch.library.custom_op("iared2::segments_backward", mutates_args=())
def _segments_backward_op(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias_T: Tensor | None, cu_B1: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `segments`, spelled out: autograd is not at work inside an operator."""
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    offsets, scale = cu_B1.tolist(), q.shape[-1] ** -0.5
    exact = torch.promote_types(q.dtype, torch.float32)  # as fused kernels do inside
    for start, stop in zip(offsets[:-1], offsets[1:], strict=True):
        q_HnK, k_HnK, v_HnK, g_HnK = (x[start:stop].transpose(0, 1).to(exact) for x in (q, k, v, grad))
        scores = (q_HnK * scale) @ k_HnK.transpose(1, 2)
        weights = (scores if bias_T is None else scores + bias_T[start:stop]).softmax(-1)
        slope = weights * (g_HnK @ v_HnK.transpose(1, 2))
        slope -= weights * slope.sum(-1, keepdim=True)
        grad_q[start:stop] = (slope @ k_HnK * scale).transpose(0, 1)
        grad_k[start:stop] = (slope.transpose(1, 2) @ q_HnK * scale).transpose(0, 1)
        grad_v[start:stop] = (weights.transpose(1, 2) @ g_HnK).transpose(0, 1)
    return grad_q, grad_k, grad_v


@_segments_backward_op.register_fake
def _segments_backward_shape(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias_T: Tensor | None, cu_B1: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _remember(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple:
    return (*torch.ops.iared2.segments_backward(grad.contiguous(), *ctx.saved_tensors), None, None)


_segments_op.register_autograd(_gradients, setup_context=_remember)
