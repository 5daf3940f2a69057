"""Every family, on tiny random models: keep-all is the untouched model, and any drop pattern is the masked dense one."""

from importlib.metadata import EntryPoint

import pytest
import timm.models.vision_transformer as vit
import torch
from timm.layers import PatchDropout
from torch import Tensor, nn

import oracle
from families import CLASSES, DEPTH, FAMILIES, Family
from iared2.backbones import adapt, base, register_adapter
from iared2.backbones.timm_vit import TimmViTAdapter
from iared2.errors import ConfigError, UnsupportedBackboneError
from iared2.keep import Given
from iared2.model import ReducedTransformer, reduce
from iared2.tokens.packed import take

GROUPS = (0, 2, 3)
HOW = pytest.mark.parametrize("how", ["discard", "merge", "fuse"])


def given_model(backbone: nn.Module, plan: dict[int, Tensor], how: str) -> ReducedTransformer:
    """A reduced model that keeps the places it is told to."""
    return told(reduce(backbone, tuple(plan), on_drop=how), plan)


def told(model: ReducedTransformer, plan: dict[int, Tensor]) -> ReducedTransformer:
    """Every reducer keeps given places, and scores all patches alike."""
    for reducer, keep_BN in zip(model.reducers, plan.values(), strict=True):
        reducer.rule = Given(keep_BN)
        reducer.interpreter.forward = lambda tokens, _class_TH=None: torch.full_like(tokens.x_TD[:, 0], 0.5)
    return model


def random_plan(backbone: nn.Module, images: Tensor, seed: int, blocks: tuple[int, ...] = GROUPS) -> dict[int, Tensor]:
    """Random keep masks, nested or not; with an image that keeps nothing where the head allows it."""
    adapter, draw = adapt(backbone), torch.Generator().manual_seed(seed)
    rows, columns = adapter.grid(*images.shape[-2:])
    plan = {}
    for block in blocks:
        keep_BN = torch.rand(len(images), rows * columns, generator=draw) < 0.6
        if adapter.needs_patch:
            keep_BN[:, seed % (rows * columns)] = True
        elif block == blocks[-1]:
            keep_BN[0] = False
        plan[block] = keep_BN
    return plan


def assert_same(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert got.shape == wanted.shape and got.dtype == wanted.dtype
    assert (got - wanted).abs().max() <= tolerance * max(1.0, float(wanted.detach().abs().max()))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@HOW
def test_keep_all_is_the_untouched_model(family: Family, training: bool, how: str):
    for which in range(len(family.sizes)):
        backbone, images = family.build().train(training), family.images(which=which)
        wanted = backbone(images)
        model = reduce(backbone, 2, on_drop=how).train(training)
        model.threshold = -1
        assert_same(model(images), wanted, 1e-5)


@HOW
def test_any_drop_pattern_is_the_masked_dense_model(family: Family, how: str):
    for which in range(len(family.sizes)):
        backbone, images = family.build().double(), family.images(which=which).double()
        plan = random_plan(backbone, images, seed=which + 5)
        with torch.no_grad():
            wanted, carriers, masses = oracle.masked_dense(backbone, images, plan, how)
            model = given_model(backbone, plan, how).double().eval()
            state = model.walk(model.start(images), DEPTH)
            assert_same(model(images), wanted, 1e-9)
        assert state.tokens.carrier_BN.tolist() == carriers
        if how != "discard":
            assert state.tokens.mass_T.tolist() == [m for image in masses for m in image]
        assert (wanted - backbone(images)).abs().max() > 1e-3  # the pattern matters


@pytest.mark.parametrize("name", ["deit", "deit_distilled", "deit3", "dinov2_reg", "clip", "siglip", "avg", "gated", "qk_norm"])
@HOW
def test_a_drop_between_the_halves_of_a_block_is_the_masked_dense_model(name: str, how: str):
    family = FAMILIES[name]
    backbone, images = family.build().double(), family.images().double()
    plan = random_plan(backbone, images, seed=11, blocks=(0, 1, 3))
    with torch.no_grad():
        wanted, carriers, _ = oracle.masked_dense(backbone, images, plan, how, between=True)
        model = told(reduce(backbone, tuple(plan), on_drop=how, place="between").double().eval(), plan)
        assert_same(model(images), wanted, 1e-9)
        assert model.walk(model.start(images), DEPTH).tokens.carrier_BN.tolist() == carriers
        for reducer in model.reducers:
            reducer.rule = Given(torch.ones_like(plan[0]))
        assert_same(model(images), backbone(images), 1e-9)


@pytest.mark.parametrize("name", ["parallel_scaling", "parallel_things"])
def test_blocks_without_two_halves_refuse_a_reduction_between_them(name: str):
    with pytest.raises(ConfigError, match="side by side; use 'before'"):
        reduce(FAMILIES[name].build(), 2, place="between")


@HOW
def test_gradients_are_those_of_the_masked_dense_model(family: Family, how: str):
    backbone, images = family.build().double(), family.images(2).double()
    plan = random_plan(backbone, images, seed=3, blocks=(1, 2))
    parameters = dict(backbone.named_parameters())

    def gradients(logits: Tensor) -> dict[str, Tensor]:
        back = torch.randn(logits.shape, dtype=logits.dtype, generator=torch.Generator().manual_seed(0))
        found = torch.autograd.grad(logits, list(parameters.values()), back, allow_unused=True)
        return {n: g for n, g in zip(parameters, found, strict=True) if g is not None}

    wanted = gradients(oracle.masked_dense(backbone, images, plan, how)[0])
    model = given_model(backbone, plan, how).double().eval()
    got = gradients(model(images))
    assert set(got) == set(wanted)
    for name, gradient in wanted.items():
        in_fp32 = "lambda" in name or (name == "pos_embed" and backbone.dynamic_img_size)  # inside timm, whatever the model is in
        assert_same(got[name], gradient, 1e-5 if in_fp32 else 1e-8)


def test_kept_tokens_run_densely_image_by_image_give_the_same_logits(family: Family):
    if family.options.get("global_pool") == "":
        pytest.skip("the head sees the full grid there, so there is no shorter answer to compare with")
    backbone, images = family.build(), family.images()
    plan = random_plan(backbone, images, seed=7)
    model = given_model(backbone, plan, "discard").eval()
    with torch.no_grad():
        got = model(images)
        for index, pixels in enumerate(images):
            assert_same(got[index], oracle.rerun_kept(backbone, pixels, plan, index), 1e-5)


def test_dropped_means_shorter(family: Family):
    """No masking in disguise: every linear layer of a block sees exactly the rows that are left."""
    backbone, images = family.build(), family.images()
    plan = random_plan(backbone, images, seed=7, blocks=(1,))
    model = given_model(backbone, plan, "discard").eval()
    rows: dict[int, set[int]] = {}
    for number, block in enumerate(backbone.blocks):
        for module in block.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(lambda _m, x, _y, n=number: rows.setdefault(n, set()).add(x[0].numel() // x[0].shape[-1]))
    model(images)
    prefix, everywhere = model.adapter.prefix, plan[1].shape[1]
    total = int(plan[1].sum()) + prefix * len(images)
    assert rows == {0: {(prefix + everywhere) * len(images)}, **{n: {total} for n in range(1, DEPTH)}}


# ---- the stochastic parts of training ---------------------------------------------------------------------


def with_rates(family: Family, **rates: float) -> nn.Module:
    return family.build(**rates).train()


@pytest.mark.parametrize("name", ["deit", "res_post_norm", "parallel_scaling", "diff_parallel", "parallel_things", "siglip"])
def test_stochastic_depth_draws_as_the_untouched_model_does(name: str):
    family = FAMILIES[name]
    backbone, images = with_rates(family, drop_path_rate=0.5), family.images(6)
    model = reduce(backbone, 2).train()
    model.threshold = -1
    torch.manual_seed(3)
    wanted = backbone(images)
    torch.manual_seed(3)
    assert_same(model(images), wanted, 1e-5)


@pytest.mark.parametrize("half", ["attend", "feed"])
@pytest.mark.parametrize("name", ["deit", "res_post_norm", "parallel_things"])
def test_stochastic_depth_acts_per_image(name: str, half: str):
    backbone = with_rates(FAMILIES[name], drop_path_rate=0.5, drop_rate=0.0)
    adapter, images = adapt(backbone), FAMILIES[name].images(40)
    with torch.no_grad():
        tokens = adapter.embed(images)
        after = adapter.feed(DEPTH - 1, tokens) if half == "feed" else adapter.attend(DEPTH - 1, tokens).tokens
        backbone.eval()
        exact = adapter.feed(DEPTH - 1, tokens) if half == "feed" else adapter.attend(DEPTH - 1, tokens).tokens
    delta = (after.x_TD - tokens.x_TD).view(40, -1)
    full = (exact.x_TD - tokens.x_TD).view(40, -1)
    ways = {0.0, 2.0} if name != "parallel_things" else {}
    factors = [round(float((d * f).sum() / (f * f).sum()), 3) for d, f in zip(delta, full, strict=True)]
    if ways:  # all of an image's tokens share the draw: its whole change is there twice as strong, or not at all
        assert set(factors) == ways
        assert_same(delta, full * torch.tensor(factors)[:, None], 1e-5)
    else:  # two branches draw for themselves
        assert len(set(factors)) > 2


@pytest.mark.parametrize("name", ["deit", "dinov2_reg", "siglip", "avg"])
@HOW
def test_patch_dropout_keeps_the_places_of_what_is_left(name: str, how: str):
    family = FAMILIES[name]
    backbone, images = with_rates(family, patch_drop_rate=0.4).double(), family.images(4).double()
    assert isinstance(backbone.patch_drop, PatchDropout)
    model = reduce(backbone, 2, on_drop=how).double().train()
    model.threshold = -1
    torch.manual_seed(11)
    wanted = backbone(images)
    torch.manual_seed(11)
    assert_same(model(images), wanted, 1e-9)
    torch.manual_seed(11)
    tokens, everything = model.adapter.embed(images), adapt(backbone.eval()).embed(images)
    layout = tokens.layout
    for row in range(len(tokens.x_TD)):
        image, place = int(layout.image_T[row]), int(layout.origin_T[row])
        same = (everything.layout.image_T == image) & (everything.layout.origin_T == place)
        if place >= 0:
            assert torch.allclose(tokens.x_TD[row], everything.x_TD[same][0], atol=1e-12)
    for image in range(4):
        patches = layout.origin_T[(layout.image_T == image) & layout.is_patch_T].tolist()
        assert patches == sorted(set(patches)) and len(patches) < everything.layout.places  # in the order of the grid
        assert [p for p in tokens.carrier_BN[image].tolist() if p >= 0] == patches


def test_patch_dropout_in_training_is_traced():
    family = FAMILIES["deit"]
    model = reduce(with_rates(family, patch_drop_rate=0.5), 2).train()
    model.threshold = -1
    _, trace = model.trace(family.images(2))
    assert trace.keep_ratio.tolist() == [[0.5, 0.5]] * 2
    assert trace.macs[0] < trace.dense_macs
    assert (trace.score_GBN[0] > 0).sum(1).tolist() == [8, 8]


@pytest.mark.parametrize("name", ["deit", "gated", "diff_attention", "parallel_scaling", "siglip"])
def test_dropouts_are_active_in_training_only(name: str):
    family = FAMILIES[name]
    backbone = family.build(attn_drop_rate=0.3, proj_drop_rate=0.3, drop_rate=0.3, pos_drop_rate=0.3)
    model = reduce(backbone, 2)
    model.threshold = -1
    images = family.images()
    assert_same(model.eval()(images), backbone(images), 1e-5)
    model.train()
    assert (model(images) - model(images)).abs().max() > 1e-3


# ---- what adapters say about themselves, and the registry ---------------------------------------------------


def test_adapters_know_their_backbones(family: Family):
    backbone = family.build()
    adapter = adapt(backbone)
    tokens = adapter.embed(family.images())
    assert (adapter.prefix, adapter.depth, adapter.width, adapter.heads) == (backbone.num_prefix_tokens, DEPTH, backbone.embed_dim, 4)
    assert adapter.has_class_token == (backbone.cls_token is not None)
    assert tokens.layout.prefix == adapter.prefix and tokens.layout.grid == adapter.grid(*family.sizes[0])
    assert tokens.layout.lengths == [adapter.prefix + tokens.layout.places] * 3
    assert adapter.splits == (all(isinstance(b, (vit.Block, vit.ResPostBlock)) for b in backbone.blocks),) * DEPTH
    names = adapter.frozen_parameters()
    assert names <= set(dict(backbone.named_parameters()))
    assert not [n for n in names if n.startswith(("blocks", "head", "norm.", "fc_norm", "attn_pool"))]
    left = {n for n, _ in backbone.named_parameters()} - names
    assert all(n.startswith(("blocks", "head", "norm.", "fc_norm", "attn_pool")) for n in left)


def test_no_parameter_is_added_renamed_or_replaced(family: Family):
    backbone = family.build()
    before = dict(backbone.named_parameters())
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in backbone.modules())
    model = reduce(backbone, 2)
    model(family.images())
    after = dict(backbone.named_parameters())
    assert before.keys() == after.keys() and all(after[n] is p for n, p in before.items())
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in backbone.modules())


class StrangeBlock(vit.Block):
    """A block of someone else's, which may do anything."""


class StrangeAttention(vit.Attention):
    """An attention of someone else's."""


def test_a_block_class_without_an_adapter_is_named():
    with pytest.raises(UnsupportedBackboneError, match=r"block 0 is a StrangeBlock; the adapter knows Block, ResPostBlock"):
        adapt(FAMILIES["deit"].build(block_fn=StrangeBlock))
    with pytest.raises(UnsupportedBackboneError, match="block 0 has an attention of class StrangeAttention"):
        adapt(FAMILIES["deit"].build(attn_layer=StrangeAttention))


def test_an_unknown_model_lists_the_adapters_tried():
    with pytest.raises(UnsupportedBackboneError, match=r"class Linear\. Tried .*timm_vit: not a timm VisionTransformer.*architecture\.md"):
        adapt(nn.Linear(3, 3))


class Mine(TimmViTAdapter):
    """An adapter from another package."""

    @classmethod
    def missing(cls, module: nn.Module) -> str | None:
        return None if isinstance(module, vit.VisionTransformer) else "not mine"


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict:
    """A copy that may be written to."""
    monkeypatch.setattr(base, "_ADAPTERS", dict(base._ADAPTERS))
    return base._ADAPTERS


@pytest.mark.parametrize("name", ["Mine", "my-adapter", "my.adapter", "", "2mine", "my adapter"])
def test_adapter_names_are_lower_case_identifiers(registry: dict, name: str):
    with pytest.raises(ValueError, match="wanted lower-case letters, digits and underscores"):
        register_adapter(name, Mine)


def test_the_last_adapter_registered_is_tried_first_and_names_are_taken_once(registry: dict):
    register_adapter("mine", Mine)
    register_adapter("mine", Mine)  # again is harmless
    assert type(adapt(FAMILIES["deit"].build())) is Mine
    with pytest.raises(ValueError, match="'mine' is taken by Mine"):
        register_adapter("mine", TimmViTAdapter)


def test_adapters_of_installed_packages_are_found_and_broken_ones_left_out(registry: dict, monkeypatch, caplog):
    entries = [
        EntryPoint("other", f"{__name__}:Mine", "iared2.backbones"),
        EntryPoint("gone", "no_such_package_at_all:Adapter", "iared2.backbones"),
        EntryPoint("Bad-Name", f"{__name__}:Mine", "iared2.backbones"),
    ]
    monkeypatch.setattr(base, "entry_points", lambda group: [e for e in entries if e.group == group])
    assert type(adapt(FAMILIES["deit"].build())) is Mine
    assert set(base.adapters()) >= {"timm_vit", "other"} and not {"gone", "Bad-Name"} & set(base.adapters())
    assert "'gone'" in caplog.text and "'Bad-Name'" in caplog.text


def test_take_of_everything_changes_nothing():
    family = FAMILIES["dinov2_reg"]
    tokens = adapt(family.build()).embed(family.images())
    chosen = Given(torch.ones(3, 16, dtype=torch.bool))(torch.zeros(len(tokens.x_TD)), tokens.layout)
    assert torch.equal(take(tokens, chosen).x_TD, tokens.x_TD)
    assert family.build().num_classes == CLASSES
