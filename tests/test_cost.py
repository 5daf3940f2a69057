"""Multiply-adds: the closed form equals torch's counter, for dense models, reduced ones, and every kind of head."""

import pytest
import timm
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from families import FAMILIES
from iared2 import cost
from iared2.backbones import adapt
from iared2.interpreter import InterpreterConfig
from iared2.keep import share_of
from iared2.model import ReducedTransformer, reduce
from iared2.worth import WorthConfig


def counted(function, *shape: int) -> int:
    """Multiply-adds by torch's counter, on the meta device: on the CPU it misses attention."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function(torch.empty(*shape, device="meta"))
    return counter.get_total_flops() // 2


def by_formula(patches: int, width: int, depth: int, prefix: int, pixels: int, classes: int, products: bool = True) -> int:
    """Patch embedding, 12 n D^2 + 2 n^2 D per block, and the classifier (section 3.1)."""
    n = patches + prefix
    block = 12 * n * width**2 + (2 * n * n * width if products else 0)
    return patches * pixels * width + depth * block + width * classes


NAMED = {  # model, pixels, width, G as printed, G without the two products
    "deit_small_patch16_224": (224, 384, 4.6, 4.24),
    "deit_base_patch16_224": (224, 768, 17.6, 16.85),
    "deit_base_patch16_384": (384, 768, 55.5, 49.35),
}


@pytest.mark.parametrize("name", NAMED)
def test_named_models(name):
    size, width, printed, linear = NAMED[name]
    with torch.device("meta"):
        backbone = timm.create_model(name).eval()
    adapter, patches = adapt(backbone), (size // 16) ** 2
    got = cost.dense_macs(adapter, size, size)
    assert got == by_formula(patches, width, 12, 1, 3 * 16 * 16, 1000) == counted(backbone, 1, 3, size, size)
    assert round(got / 1e9, 1) == printed
    without = cost.dense_macs(adapter, size, size, products=False)
    assert without == by_formula(patches, width, 12, 1, 3 * 16 * 16, 1000, products=False)
    assert without / 1e9 == pytest.approx(linear, abs=0.02)  # the paper's table: 16.8 and 49.4 for DeiT-B


@pytest.mark.parametrize("name", FAMILIES)
def test_dense_models_of_every_family_equal_torchs_count(name):
    family = FAMILIES[name]
    backbone = family.build().to("meta").requires_grad_(False)
    for size in family.sizes:
        assert cost.dense_macs(adapt(backbone), *size) == counted(backbone, 1, 3, *size)


def test_cost_follows_a_new_classifier_and_a_new_input_size():
    backbone = FAMILIES["dynamic"].build()
    adapter = adapt(backbone)
    before = cost.dense_macs(adapter, 32, 32)
    backbone.reset_classifier(105)
    assert cost.dense_macs(adapter, 32, 32) == before + 100 * backbone.embed_dim
    backbone.set_input_size(patch_size=(4, 4))
    assert cost.dense_macs(adapter, 32, 32) == counted(backbone.to("meta"), 1, 3, 32, 32)


def shortened(model: ReducedTransformer, kept: tuple[int, ...]):
    """The untouched model with rows cut off before the groups' blocks, so that torch can count it."""

    def run(images: torch.Tensor) -> torch.Tensor:
        backbone = model.backbone
        x = backbone.norm_pre(backbone._pos_embed(backbone.patch_embed(images)))
        for number, block in enumerate(backbone.blocks):
            if number in model.config.first_blocks:
                x = x[:, : model.adapter.prefix + kept[model.config.first_blocks.index(number)]]
            x = block(x)
        return backbone.forward_head(backbone.norm(x))

    return run


@pytest.mark.parametrize(
    "name", ["deit", "deit_distilled", "dinov2_reg", "siglip", "prr", "diff_attention", "parallel_scaling", "parallel_things"]
)
@pytest.mark.parametrize("policy", ["learned", "class"])
def test_reduced_models_cost_what_runs(name, policy):
    family = FAMILIES[name]
    backbone, ratios = family.build(), (0.8, 0.5)
    if policy == "class" and backbone.cls_token is None:
        pytest.skip("no class token")
    model = reduce(backbone, 2, rule="top_k", ratios=ratios, interpreter=InterpreterConfig(policy=policy)).eval()
    _, trace = model.trace(family.images(2))
    kept = tuple(share_of(r, 16) for r in ratios)
    entering = (16, kept[0])
    scoring = sum(n * 32 * 4 + (0 if policy == "learned" else 2 * 32 * 32) for n in entering)
    backbone.to("meta").requires_grad_(False)
    assert trace.macs == (counted(shortened(model, kept), 1, 3, 32, 32) + scoring,) * 2
    assert trace.dense_macs == counted(backbone, 1, 3, 32, 32)
    assert trace.share_of_dense() == trace.macs[0] / trace.dense_macs


def test_merging_pays_for_the_matching():
    discard, merge = (
        reduce(FAMILIES["deit"].build(), 2, rule="top_k", ratios=(0.75, 0.5), on_drop=how).eval() for how in ("discard", "merge")
    )
    images = FAMILIES["deit"].images(1)
    extra = merge.trace(images)[1].macs[0] - discard.trace(images)[1].macs[0]
    assert extra == (16 * 16 * 32 + 16 * 32) + (12 * 12 * 32 + 12 * 32)  # all pairs of what enters, and a norm each


@pytest.mark.parametrize("worth", [None, WorthConfig()])
@pytest.mark.parametrize("on_drop", ["discard", "merge", "fuse"])
def test_what_is_counted_is_what_runs(on_drop, worth):
    """Torch's counter on a real pass of one image, for which nothing is padded; norms are no products, and prefix rows are free."""
    interpreter = InterpreterConfig(policy="class", context=worth is not None)
    backbone = timm.create_model("deit_tiny_patch16_224", depth=4, num_classes=10).eval()
    options = {"rule": "top_k", "ratios": (0.7, 0.4), "place": "between", "on_drop": on_drop}
    model = reduce(backbone, (1, 2), worth=worth, interpreter=interpreter, **options).eval()
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        start, macs = model.start(images), model.trace(images)[1].macs[0]
        with FlopCounterMode(display=False) as counter:
            model.adapter.head(model.walk(start, 4).tokens)
    assert macs - model.adapter.embed_macs(224, 224) == pytest.approx(counter.get_total_flops() / 2, rel=2e-3)


@pytest.mark.parametrize("name", ["deit", "dinov2_reg"])
def test_a_reduction_between_halves_saves_the_second_half_of_its_block(name):
    """Attention of block 1 and all before it are paid in full; its FFN and everything after it for the kept tokens alone."""
    family = FAMILIES[name]
    model = reduce(family.build(), (1,), rule="top_k", ratios=(0.5,), place="between").eval()
    macs = model.trace(family.images(1))[1].macs[0]
    before = reduce(family.build(), (1,), rule="top_k", ratios=(0.5,)).eval().trace(family.images(1))[1].macs[0]
    full, half = model.adapter.prefix + 16, model.adapter.prefix + 8
    block = model.backbone.blocks[1]
    attention = sum(m.in_features * m.out_features for m in block.attn.modules() if isinstance(m, nn.Linear))
    assert macs - before == (full - half) * attention + 2 * 32 * (full**2 - half**2)


def test_comparing_and_context_are_paid_for():
    plain, full = (
        reduce(FAMILIES["deit"].build(), (2,), rule="top_k", ratios=(0.5,), interpreter=InterpreterConfig(context=context), worth=worth)
        for context, worth in ((False, None), (True, WorthConfig()))
    )
    images = FAMILIES["deit"].images(1)
    extra = full.eval().trace(images)[1].macs[0] - plain.eval().trace(images)[1].macs[0]
    assert extra == 16 * 32 + 16 * 17 * 32  # one query against 16 keys; every patch against every patch, and 16 norms


def test_an_attention_pool_over_merged_tokens_pays_for_every_patch():
    """Merged tokens are un-merged before the pool, so its keys and values are computed for all of them."""
    discard, merge = (
        reduce(FAMILIES["siglip"].build(), (2,), rule="top_k", ratios=(0.5,), on_drop=how).eval() for how in ("discard", "merge")
    )
    images = FAMILIES["siglip"].images(1)
    matching = 16 * 16 * 32 + 16 * 32
    pooled = 8 * (2 * 32 * 32 + 2 * 32)  # keys, values, and two products with one query for the 8 patches that are back
    assert merge.trace(images)[1].macs[0] - discard.trace(images)[1].macs[0] == matching + pooled


def test_a_head_without_pooling_answers_for_dropped_places_too():
    model = reduce(FAMILIES["tokens_out"].build(), (2,), rule="top_k", ratios=(0.5,)).eval()
    images = FAMILIES["tokens_out"].images(1)
    logits, trace = model.trace(images)
    adapter, interpreter = model.adapter, 16 * 32 * 4
    left = sum(adapter.block_cost(block).macs(adapter.prefix + (16 if block < 2 else 8)) for block in range(adapter.depth))
    head = logits.shape[1] * 32 * logits.shape[2]  # one answer for every place, dropped or not
    assert trace.macs[0] == adapter.embed_macs(32, 32) + interpreter + left + head


def test_macs_are_counted_image_by_image():
    model = reduce(FAMILIES["deit"].build(), 2).eval()
    for reducer in model.reducers:
        reducer.interpreter.policy_token.data.mul_(100)
        nn.init.zeros_(reducer.interpreter.key.bias)
        nn.init.normal_(reducer.interpreter.query.weight)
    images = FAMILIES["deit"].images(6)
    _, trace = model.trace(images)
    assert len(set(trace.macs)) > 1
    for index in range(6):
        kept = [int(x) for x in trace.keep_GBN[:, index].sum(-1)]
        reducers = dict(zip(model.config.first_blocks, model.reducers, strict=True))
        assert trace.macs[index] == cost.reduced_macs(model.adapter, reducers, (32, 32), 16, kept)
        assert model.trace(images[index : index + 1])[1].macs == (trace.macs[index],)


def test_tracing_counts_the_patch_embedding_once_per_size(monkeypatch):
    model = reduce(FAMILIES["deit"].build(), 2).eval()
    images = FAMILIES["deit"].images(4)
    model.trace(images)
    monkeypatch.setattr("iared2.backbones.timm_vit.FlopCounterMode", None)  # counting again would fail
    model.trace(images)
