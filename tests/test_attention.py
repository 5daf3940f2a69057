"""Every implementation of attention against the masked one in float64; its error is at most twice plain PyTorch's."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import oracle
from iared2.errors import ConfigError
from iared2.tokens.attention import attend
from iared2.tokens.packed import Layout
from packs import lengths_layout

SLACK = {torch.float32: 1e-6, torch.bfloat16: 1e-2}
LENGTHS = {
    "ragged": [5, 1, 9, 3],
    "ones": [1, 1, 1],
    "equal": [6, 6, 6],
    "one image": [11],
    "a lonely token": [1],
    "256 short images": [1 + i % 5 for i in range(256)],
}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def tensors(
    lengths: list[int], dtype: torch.dtype, with_mass: bool, seed: int, heads: int = 3, value_width: int = 8
) -> list[Tensor | None]:
    """q, k, v, the gradient that comes back, and masses, rounded to `dtype` so that all see the same numbers."""
    draw, total = torch.Generator().manual_seed(seed), sum(lengths)
    widths = (8, 8, value_width, value_width)
    parts: list[Tensor | None] = [torch.randn(total, heads, w, generator=draw).to(dtype) for w in widths]
    mass = torch.randint(1, 20, (total,), generator=draw).float() if with_mass else None
    return [*parts, mass]


def run(function: Callable[..., Tensor], parts: list[Tensor | None], dtype: torch.dtype, backward: bool) -> list[Tensor]:
    """The output and, if asked for, the gradients of q, k and v."""
    q, k, v, back, mass = (None if x is None else x.detach().to(dtype) for x in parts)
    mass = None if mass is None else parts[4].to(torch.promote_types(dtype, torch.float32))
    inputs = [x.clone().requires_grad_(backward) for x in (q, k, v)]
    with torch.set_grad_enabled(backward):
        out = function(*inputs, mass)
    return [out.detach()] + (list(torch.autograd.grad(out, inputs, back)) if backward else [])


def plain(lengths: list[int]) -> Callable[..., Tensor]:
    """What one would write without this library: PyTorch's attention image by image."""

    def function(q: Tensor, k: Tensor, v: Tensor, mass: Tensor | None) -> Tensor:
        pieces = []
        for start, stop in pairwise([sum(lengths[:i]) for i in range(len(lengths) + 1)]):
            one = [x[start:stop].transpose(0, 1)[None] for x in (q, k, v)]
            bias = None if mass is None else mass[start:stop].log().to(q.dtype).view(1, 1, 1, -1)
            pieces.append(F.scaled_dot_product_attention(*one, attn_mask=bias)[0].transpose(0, 1))
        return torch.cat(pieces)

    return function


def ours(impl: str, layout: Layout) -> Callable[..., Tensor]:
    if impl == "operator":
        return lambda q, k, v, m: torch.ops.iared2.segments(q, k, v, None if m is None else m.log().to(q.dtype), layout.cu_B1)
    return lambda q, k, v, m: attend(q, k, v, layout, m, impl=impl)


def check(impl: str, layout: Layout, lengths: list[int], dtype: torch.dtype, mass: bool, backward: bool, seed: int) -> None:
    parts = tensors(lengths, dtype, mass, seed, value_width=12 if seed % 2 else 8)
    exact = run(ours("masked", layout), parts, torch.float64, backward)
    wanted = run(plain(lengths), parts, dtype, backward)
    got = run(ours(impl, layout), parts, dtype, backward)
    for name, e, w, g in zip(("out", "dq", "dk", "dv"), exact, wanted, got, strict=False):
        assert g.dtype == dtype and g.shape == e.shape
        limit = 2 * (w.double() - e).abs().max() + SLACK[dtype]
        assert (g.double() - e).abs().max() <= limit, f"{name} of {impl}"


def layout_for(impl: str, lengths: list[int]) -> Layout:
    from dataclasses import replace

    layout = lengths_layout(lengths)
    return replace(layout, uniform=lengths[0]) if impl == "uniform" else layout


@DTYPES
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("mass", [False, True], ids=["plain", "mass"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("impl", ["auto", "uniform", "buckets", "masked", "operator"])
def test_every_implementation_is_as_exact_as_pytorch(impl, lengths, mass, backward, dtype):
    if impl == "uniform" and len(set(lengths)) > 1:
        with pytest.raises(ConfigError, match="different lengths"):
            attend(*tensors(lengths, dtype, False, 0)[:3], lengths_layout(lengths), impl="uniform")
        return
    check(impl, layout_for(impl, lengths), lengths, dtype, mass, backward, seed=len(lengths))


@DTYPES
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=7), mass=st.booleans(), backward=st.booleans(), seed=st.integers(0, 99))
def test_random_lengths(dtype, lengths, mass, backward, seed):
    for impl in ["auto", "buckets", "operator", *(["uniform"] if len(set(lengths)) == 1 else [])]:
        check(impl, layout_for(impl, lengths), lengths, dtype, mass, backward, seed)


@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4), mass=st.booleans(), seed=st.integers(0, 99))
def test_the_masked_reference_is_attention_written_out(lengths, mass, seed):
    q, k, v, _, m = (None if x is None else x.double() for x in tensors(lengths, torch.float64, mass, seed, heads=2))
    wanted = oracle.attention(q, k, v, lengths, m)
    assert torch.allclose(attend(q, k, v, lengths_layout(lengths), m, impl="masked"), wanted, atol=1e-12)


@pytest.mark.parametrize("impl", ["buckets", "uniform", "masked"])
def test_mass_has_a_gradient_too(impl):
    lengths = [4, 4]
    layout = layout_for(impl, lengths)
    q, k, v, back, mass = (x.double() for x in tensors(lengths, torch.float64, True, 0))
    grads = []
    for function in (lambda m: attend(q, k, v, layout, m, impl=impl), lambda m: oracle.attention(q, k, v, lengths, m)):
        leaf = mass.clone().requires_grad_()
        grads.append(torch.autograd.grad(function(leaf), leaf, back)[0])
    assert torch.allclose(*grads, atol=1e-12)


def test_images_without_tokens_are_skipped():
    lengths = [3, 0, 2, 0]
    q, k, v, back, _ = tensors(lengths, torch.float32, False, 0)
    for impl in ("buckets", "operator"):
        got = run(ours(impl, lengths_layout(lengths)), [q, k, v, back, None], torch.float32, True)
        wanted = run(ours(impl, lengths_layout([3, 2])), [q, k, v, back, None], torch.float32, True)
        for g, w in zip(got, wanted, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-6)


def test_unknown_implementation_lists_the_known():
    q, k, v, _, _ = tensors([2], torch.float32, False, 0)
    with pytest.raises(ConfigError, match="got impl='fast', wanted one of auto, uniform, varlen, buckets, masked"):
        attend(q, k, v, lengths_layout([2]), impl="fast")


@pytest.mark.parametrize("impl", ["uniform", "buckets", "masked"])
def test_dropout_drops_weights_and_keeps_the_mean(impl):
    lengths = [16, 16]
    layout = layout_for(impl, lengths)
    q, k, v, _, _ = tensors(lengths, torch.float32, False, 0)
    exact = attend(q, k, v, layout, impl=impl)
    draws = torch.stack([attend(q, k, v, layout, dropout=0.5, impl=impl) for _ in range(400)])
    assert draws.std(0).min() > 0.01
    assert (draws.mean(0) - exact).abs().max() < 0.35


@pytest.mark.parametrize("width", [8, 10, 64])
@pytest.mark.parametrize("mass", [False, True], ids=["plain", "mass"])
def test_the_kernel_without_bias_gets_mass_through_an_extra_channel(width, mass, monkeypatch):
    lengths = [4, 1, 7]
    layout = lengths_layout(lengths)

    def stand_in(q, k, v, cu_q, cu_k, max_q, max_k, *, scale):
        """The variable-length kernel's contract, in plain torch."""
        assert q.shape == k.shape == v.shape and q.shape[-1] % 8 == 0
        assert cu_q.dtype == cu_k.dtype == torch.int32 and max_q == max_k >= max(lengths)
        pieces = []
        for start, stop in pairwise(cu_q.tolist()):
            weights = (torch.einsum("thk,shk->hts", q[start:stop], k[start:stop]) * scale).softmax(-1)
            pieces.append(torch.einsum("hts,shv->thv", weights, v[start:stop]))
        return torch.cat(pieces)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in)
    draw = torch.Generator().manual_seed(0)
    for value_width in (width, 2 * width):
        q, k = (torch.randn(12, 3, width, generator=draw, dtype=torch.float64) for _ in range(2))
        v = torch.randn(12, 3, value_width, generator=draw, dtype=torch.float64)
        parts = [q, k, v, torch.randn(v.shape, generator=draw, dtype=torch.float64), torch.arange(1, 13) if mass else None]
        got = run(ours("varlen", layout), parts, torch.float64, True)
        wanted = run(ours("masked", layout), parts, torch.float64, True)
        assert all(torch.allclose(g, w, atol=1e-10) for g, w in zip(got, wanted, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("mass", [False, True], ids=["plain", "mass"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_the_variable_length_kernel(lengths, mass, dtype):
    parts = [None if x is None else x.cuda() for x in tensors(lengths, dtype, mass, 0)]
    layout = lengths_layout(lengths)
    on_gpu = Layout(layout.cu_B1.cuda(), layout.image_T.cuda(), layout.origin_T.cuda(), 0, layout.grid, layout.longest)
    exact = run(ours("masked", on_gpu), parts, torch.float64, True)
    wanted = run(plain(lengths), parts, dtype, True)
    got = run(ours("varlen", on_gpu), parts, dtype, True)
    for e, w, g in zip(exact, wanted, got, strict=True):
        assert (g.double() - e).abs().max() <= 2 * (w.double() - e).abs().max() + 1e-2


@pytest.mark.parametrize("mass", [False, True], ids=["plain", "mass"])
@pytest.mark.parametrize("packed_qkv", [False, True], ids=["apart", "one projection"])
def test_the_operators_keep_torchs_contract(mass, packed_qkv):
    lengths = [3, 1, 4]
    q, k, v, back, m = tensors(lengths, torch.float32, mass, 0)
    if packed_qkv:  # views of one tensor, as a block makes them
        q, k, v = torch.stack([q, k, v], dim=1).unbind(1)
    bias, cu = None if m is None else m.log(), lengths_layout(lengths).cu_B1
    torch.library.opcheck(torch.ops.iared2.segments_backward.default, (back, q, k, v, bias, cu))
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(torch.ops.iared2.segments.default, (*leaves, bias, cu))
