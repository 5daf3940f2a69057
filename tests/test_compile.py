"""torch.compile: one graph for all lengths, no compilation after warm-up, the same numbers.

The backends are cheap: `eager` runs the captured graph as it is, `aot_eager` its forward and backward traces.
"""

from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import iared2
from families import FAMILIES
from iared2.worth import WorthConfig

pytestmark = pytest.mark.untyped  # torch.compile cannot trace through the shape checks

RULES = {"threshold": {}, "top_k": {"rule": "top_k", "ratios": (0.7, 0.3)}}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


LATEST = {"place": "between", "worth": WorthConfig(), "keep_length": True, "similarity": "tokens", "weights": "score", "skip_unread": True}


def _model(name: str = "deit", on_drop: str = "discard", rule: str = "threshold", **parts: Any) -> iared2.ReducedTransformer:
    start = iared2.InterpreterConfig(init_score=0.5)
    model = iared2.reduce(FAMILIES[name].build(), groups=2, on_drop=on_drop, interpreter=start, **RULES[rule], **parts).eval()
    for parameter in model.reducers.parameters():
        nn.init.normal_(parameter, std=0.7)
    return model


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("on_drop", "parts"), [("discard", {}), ("merge", {}), ("merge", LATEST), ("fuse", {})])
def test_no_recompilation_over_batches_of_other_lengths(on_drop, parts, rule):
    model, counter, seen = _model("deit", on_drop, rule, **parts), CompileCounterWithBackend("eager"), set()
    compiled = torch.compile(model, backend=counter)
    with torch.no_grad():
        for images in (torch.randn(4, 3, 32, 32), torch.randn(3, 3, 32, 32)):  # a size, then any size
            compiled(images)
        warm = counter.frame_count
        assert warm == 2  # no graph breaks: one graph each
        for step in range(20):
            images = torch.randn(2 + step % 5, 3, 32, 32)
            wanted, trace = model.trace(images)
            torch.testing.assert_close(compiled(images), wanted)
            seen.add(tuple(trace.keep_GBN.sum((1, 2)).tolist()))
    assert counter.frame_count == warm
    assert len(seen) >= (15 if rule == "threshold" else 5)  # lengths did differ


def test_fixed_batch_compiles_once():
    model, counter = _model(), CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for _ in range(5):
            images = torch.randn(4, 3, 32, 32)
            torch.testing.assert_close(compiled(images), model(images))
    assert counter.frame_count == 1


def test_inside_another_compiled_module():
    model, counter = _model(), CompileCounterWithBackend("eager")
    compiled = torch.compile(nn.Sequential(model, nn.Softmax(-1)), backend=counter)
    with torch.no_grad():
        for step in range(6):
            images = torch.randn(4, 3, 32, 32)
            torch.testing.assert_close(compiled(images), model(images).softmax(-1))
            if step == 1:
                warm = counter.frame_count
    assert counter.frame_count == warm

    in_one = torch.compile(lambda images: model.logits(images).softmax(-1), backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(in_one(images), model(images).softmax(-1))


@pytest.mark.parametrize("name", ["avg", "siglip"])
def test_pooling_over_patches(name):
    model, counter = _model(name, "merge"), CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter)
    with torch.no_grad():
        for step in range(8):
            images = torch.randn(2 + step % 4, 3, 32, 32)
            torch.testing.assert_close(compiled(images), model(images))
            if step == 2:
                warm = counter.frame_count
    assert counter.frame_count == warm


@pytest.mark.parametrize("on_drop", ["discard", "merge", "fuse"])
def test_gradients(on_drop):
    model = _model("deit", on_drop)
    compiled, images = torch.compile(model, backend="aot_eager"), torch.randn(3, 3, 32, 32)
    grads = []
    for function in (model, compiled):
        model.zero_grad()
        function(images).square().sum().backward()
        grads.append({name: p.grad.clone() for name, p in model.backbone.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, wanted in grads[0].items():
        torch.testing.assert_close(grads[1][name], wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()) + 1e-6)


def test_the_global_setting_is_left_alone():
    before = torch.compiler.config.capture_dynamic_output_shape_ops
    _model()(torch.randn(1, 3, 32, 32))
    assert torch.compiler.config.capture_dynamic_output_shape_ops == before
