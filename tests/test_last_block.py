"""The last block for what the head reads alone: the same answers, gradients and traces, for fewer multiply-adds."""

from typing import Any

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import packs
from families import DEPTH, FAMILIES
from iared2 import cost
from iared2.backbones import base
from iared2.backbones.timm_vit import TimmViTAdapter
from iared2.errors import ConfigError
from iared2.explain.combined import combined_map
from iared2.interpreter import InterpreterConfig
from iared2.model import ReducedTransformer, reduce
from iared2.tokens.attention import attend, attend_prefix, recording
from iared2.tokens.packed import PackedTokens, prefix_alone
from iared2.worth import WorthConfig

READ_PREFIX = ("deit", "deit_distilled", "augreg", "deit3", "dinov2_reg", "clip")
READ_PATCHES = ("avg", "siglip", "map_with_class_token", "avg_with_prefix")


def lively(name: str, groups: Any = 2, **settings: Any) -> ReducedTransformer:
    """In float64, with scores on both sides of the threshold, so that images end with different lengths."""
    model = reduce(FAMILIES[name].build(), groups, skip_unread=True, **settings).double().eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for reducer in model.reducers:
            for value in reducer.interpreter.parameters():
                value.normal_(0, 0.5)
            reducer.interpreter.query.bias.zero_()
    return model


def both(model: ReducedTransformer, images: torch.Tensor) -> tuple[Any, Any]:
    """What `trace` gives with all of the last block, and without what nobody reads."""
    found = []
    for skip in (False, True):
        model.configure(skip_unread=skip)
        found.append(model.trace(images))
    return found[0], found[1]


# ---- attention ---------------------------------------------------------------------------------------------


@given(packs.images, st.integers(1, 3), st.booleans(), packs.seeds)
def test_attention_of_prefix_rows_is_that_of_all_rows(kept, prefix, with_mass, seed):
    tokens = packs.make_pack(kept, prefix=prefix, width=24, seed=seed)
    layout, draw = tokens.layout, torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(len(layout.image_T), 3, 4, dtype=torch.float64, generator=draw) for _ in range(3))
    mass = torch.randint(1, 9, (len(q),), generator=draw).double() if with_mass else None
    wanted = attend(q, k, v, layout, mass, impl="masked")[~layout.is_patch_T]
    found = attend_prefix(q[~layout.is_patch_T].view(layout.images, prefix, 3, 4), k, v, layout, mass)
    torch.testing.assert_close(found.flatten(0, 1), wanted, rtol=1e-10, atol=1e-10)


@given(packs.images, st.integers(1, 3))
def test_a_pack_of_prefix_tokens_alone_knows_where_everything_went(kept, prefix):
    tokens = packs.make_pack(kept, prefix=prefix)
    alone = prefix_alone(tokens)
    assert torch.equal(alone.x_TD, tokens.x_TD[~tokens.layout.is_patch_T])
    assert alone.layout.lengths == [prefix] * len(kept) and alone.layout.offsets == list(range(0, prefix * len(kept) + 1, prefix))
    assert (alone.carrier_BN == -1).all() and torch.equal(alone.layout.image_T, torch.arange(len(kept)).repeat_interleave(prefix))


# ---- answers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_drop", ["discard", "merge", "fuse"])
@pytest.mark.parametrize("place", ["before", "between"])
@pytest.mark.parametrize("name", READ_PREFIX)
def test_answers_and_traces_are_the_same_for_less(name, place, on_drop):
    model, family = lively(name, (1, 2), place=place, on_drop=on_drop), FAMILIES[name]
    (wanted, full), (found, short) = both(model, family.images(4).double())
    assert model.skips_unread and len({tuple(row) for row in full.keep_ratio.tolist()}) > 1
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    assert torch.equal(short.keep_GBN, full.keep_GBN) and torch.equal(short.score_GBN, full.score_GBN)
    assert torch.equal(short.carrier_GBN, full.carrier_GBN)
    patches = full.keep_GBN[-1].sum(-1).tolist()  # where none is left, nothing is left to skip
    assert [more > less for more, less in zip(full.macs, short.macs, strict=True)] == [count > 0 for count in patches]
    assert sum(patches) > 0 and short.dense_macs == full.dense_macs


@pytest.mark.parametrize("name", READ_PREFIX)
def test_with_nothing_dropped_the_answer_is_the_untouched_models(name):
    model, images = lively(name), FAMILIES[name].images(3).double()
    model.threshold = -1
    torch.testing.assert_close(model(images), model.backbone(images), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", READ_PATCHES)
def test_a_head_that_reads_patches_gets_them(name):
    model = lively(name, 2, on_drop="merge")
    (wanted, full), (found, short) = both(model, FAMILIES[name].images(3).double())
    assert not model.skips_unread and torch.equal(found, wanted) and short.macs == full.macs


def test_pooling_may_change_later():
    model, images = lively("deit"), FAMILIES["deit"].images(2).double()
    assert model.skips_unread
    model.reset_classifier(7, global_pool="avg")
    model.double()
    (wanted, full), (found, short) = both(model, images)
    assert not model.skips_unread and torch.equal(found, wanted) and full.macs == short.macs


@pytest.mark.parametrize(("place", "skips"), [("before", True), ("between", False)])
def test_a_reduction_in_the_last_block_is_not_lost(place, skips):
    """Before the block it runs as ever; between its halves it scores patches, which must then be there."""
    model = lively("deit", (1, DEPTH - 1), place=place, on_drop="merge")
    (wanted, full), (found, short) = both(model, FAMILIES["deit"].images(4).double())
    assert model.skips_unread == skips and len(short.macs) == 4
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    assert torch.equal(short.keep_GBN, full.keep_GBN) and (short.macs != full.macs) == skips


def test_a_paused_walk_is_finished_from_wherever_it_is():
    model, images = lively("deit", (1, 2), place="between", on_drop="merge"), FAMILIES["deit"].images(3).double()
    wanted = model(images)
    for block in range(DEPTH + 1):
        state = model.finish(model.walk(model.start(images), block))
        torch.testing.assert_close(model.adapter.head(state.tokens), wanted)
        assert len(state.reductions) == 2 and state.block == DEPTH
    half = model.attend_block(model.walk(model.start(images), DEPTH - 1), DEPTH - 1)
    torch.testing.assert_close(model.adapter.head(model.finish(half).tokens), wanted)
    kept = model.finish(model.start(images), reduce=(0,))
    assert len(kept.reductions) == 1 and not torch.allclose(model.adapter.head(kept.tokens), wanted)


def test_a_caller_can_ask_for_less_than_the_setting_says():
    """Training stages read answers alone, whatever the model they train is set to."""
    model, images = lively("deit", (1, 2), place="between", on_drop="merge"), FAMILIES["deit"].images(3).double()
    model.configure(skip_unread=False)
    whole, short = model.finish(model.start(images)), model.finish(model.start(images), skip_unread=True)
    torch.testing.assert_close(model.adapter.head(short.tokens), model.adapter.head(whole.tokens))
    assert len(short.tokens.x_TD) == 3 * model.adapter.prefix < len(whole.tokens.x_TD)
    model.configure(skip_unread=True)
    assert len(model.finish(model.start(images), skip_unread=False).tokens.x_TD) == len(whole.tokens.x_TD)


@pytest.mark.parametrize("name", ["deit", "deit3", "dinov2_reg"])
def test_gradients_are_the_same(name):
    model, images = lively(name, (1, 2), place="between", on_drop="merge", worth=WorthConfig()), FAMILIES[name].images(3).double()
    found = []
    for skip in (False, True):
        model.configure(skip_unread=skip)
        model.zero_grad()
        model(images).square().sum().backward()
        found.append({key: value.grad for key, value in model.named_parameters() if value.grad is not None})
    assert found[0].keys() == found[1].keys() and any(key.endswith("blocks.3.attn.qkv.weight") for key in found[0])
    for key, wanted in found[0].items():
        torch.testing.assert_close(found[1][key], wanted, rtol=1e-8, atol=1e-8)


def test_features_are_those_of_all_tokens():
    model, images = lively("deit", on_drop="merge"), FAMILIES["deit"].images(2).double()
    features = model.forward_features(images)
    model.configure(skip_unread=False)
    assert torch.equal(features, model.forward_features(images)) and features.shape == (2, 17, 32)
    torch.testing.assert_close(model.forward_head(features), model(images))


# ---- what cannot be taken apart ----------------------------------------------------------------------------


class WithLowRank(nn.Linear):
    """A wrapped layer, as adapters make them: its weight alone says little."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + x.mean(-1, keepdim=True)


def test_a_wrapped_layer_runs_whole():
    backbone = FAMILIES["deit"].build()
    old, wrapped = backbone.blocks[-1].attn.qkv, WithLowRank(32, 96)
    wrapped.load_state_dict(old.state_dict())
    backbone.blocks[-1].attn.qkv = wrapped
    model, images = reduce(backbone, 2, skip_unread=True).eval(), FAMILIES["deit"].images(2)
    model.threshold = -1
    assert not model.skips_unread
    torch.testing.assert_close(model(images), backbone(images))


def test_a_hook_sees_all_tokens():
    model, images, seen = lively("deit"), FAMILIES["deit"].images(2).double(), []
    handle = model.backbone.blocks[-1].attn.qkv.register_forward_hook(lambda *passed: seen.append(passed[2].shape))
    model.threshold = -1
    model(images)
    assert seen == [(2 * 17, 96)] and not model.skips_unread
    handle.remove()
    assert model.skips_unread


@pytest.mark.parametrize("layer", ["attn.qkv", "attn.proj", "norm2", "mlp", "mlp.fc1", "ls1", "drop_path2"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre", "patched"])
def test_a_watched_layer_of_the_block_runs_whole(layer, kind):
    """Hooks of every kind, and a forward of this very object."""
    model, images, seen = lively("deit"), FAMILIES["deit"].images(2).double(), []
    module = model.backbone.blocks[-1].get_submodule(layer)
    if kind == "patched":
        forward = module.forward
        module.forward = lambda x: (seen.append(1), forward(x))[1] * 1.5
    else:
        getattr(module, f"register_{kind}_hook")(lambda *_: seen.append(1))
    model.threshold = -1
    answer = model(images.requires_grad_())
    answer.sum().backward()
    assert seen and not model.skips_unread
    torch.testing.assert_close(answer, model.backbone(images))


class OfMine(TimmViTAdapter):
    """From another package: its head adds the mean of the patches to the class token, whatever timm's pooling is called."""

    def head(self, tokens: PackedTokens) -> torch.Tensor:
        x_BSD = tokens.x_TD.view(tokens.layout.images, -1, self.width)
        return self.module.head(x_BSD[:, 0] + x_BSD[:, 1:].mean(1))


def test_adapters_made_from_timms_read_what_they_read(monkeypatch):
    monkeypatch.setattr(base, "_ADAPTERS", {"of_mine": OfMine})
    model, images = lively("deit"), FAMILIES["deit"].images(2).double()
    model.threshold = -1
    (wanted, _), (found, _) = both(model, images)
    assert type(model.adapter) is OfMine and not model.skips_unread
    assert wanted.isfinite().all() and torch.equal(found, wanted)


def test_records_of_attention_are_never_silently_short():
    model, images = lively("deit", rule="top_k", ratios=(0.7, 0.4)), FAMILIES["deit"].images(2).double()
    with recording(), pytest.raises(ConfigError, match=r"configure\(skip_unread=False\)"):
        model(images)
    model.configure(skip_unread=False)
    with recording() as records:
        model(images)
    assert len(records) == DEPTH


# ---- cost --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("worth", [None, WorthConfig()])
@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_what_is_counted_is_what_runs(name, worth):
    backbone = timm.create_model(name, depth=4, num_classes=10).eval()
    options = {"rule": "top_k", "ratios": (0.7, 0.4), "place": "between", "on_drop": "merge"}
    model = reduce(backbone, (1, 2), worth=worth, interpreter=InterpreterConfig(policy="class"), skip_unread=True, **options).eval()
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        start, macs = model.start(images), model.trace(images)[1].macs[0]
        with FlopCounterMode(display=False) as counter:
            model.adapter.head(model.finish(start).tokens)
    assert macs - model.adapter.embed_macs(224, 224) == pytest.approx(counter.get_total_flops() / 2, rel=2e-3)


@pytest.mark.parametrize("products", [True, False])
def test_of_the_last_block_keys_and_values_are_paid_for_all_tokens(products):
    model = lively("deit", (2,))
    n, width, size = 17, 32, (32, 32)
    saved = cost.dense_macs(model.adapter, *size, products) - cost.reduced_macs(
        model.adapter, {}, size, 16, [], products, prefix_alone=True
    )
    assert saved == (n - 1) * 10 * width**2 + (2 * n * (n - 1) * width if products else 0)


def test_it_is_kept_with_the_model(tmp_path):
    model = reduce(timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5), 2, skip_unread=True)
    model.save_pretrained(tmp_path)
    assert ReducedTransformer.from_pretrained(tmp_path, backbone=model.backbone).config.skip_unread
    assert not reduce(model.backbone, 2).config.skip_unread  # the paper's models compute all


@pytest.mark.parametrize("skip", [False, True])
def test_our_map_costs_what_torch_counts(skip):
    backbone = timm.create_model("deit_tiny_patch16_224").eval()
    model = reduce(backbone, (3, 6), on_drop="merge", rule="top_k", ratios=(0.5, 0.2), skip_unread=skip).eval()
    images = torch.randn(1, 3, 224, 224)
    dense = cost.dense_macs(model.adapter, 224, 224)  # in front: the patch embedding's are counted by running it once
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        _, share = combined_map(model, images)
    assert counter.get_total_flops() / 2 == pytest.approx(share * dense, rel=2e-3)
