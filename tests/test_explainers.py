"""Explainers against references that share nothing with them: timm run by hand, captum, two-token examples, conservation."""

import copy
import math

import pytest
import timm.models.vision_transformer as vit
import torch
from torch import nn
from torch.nn import functional as F

import iared2
from families import FAMILIES
from iared2.errors import ConfigError
from iared2.explain import attention as seen
from iared2.explain.combined import scores_on_grid, shared
from iared2.explain.dense import attention_gradients, dense_pass
from iared2.explain.memorability import MemNet
from iared2.explain.methods import METHODS, find_explainer, method_list, method_names
from iared2.explain.perturbing import rise
from iared2.explain.propagation import relevance_of, relevance_pass
from iared2.explain.relevance import Rules, propagating
from iared2.tokens.grid import to_pixels

NEED_FILES = {"memorability"}
CAPTUM = {"ig", "smoothgrad", "occlusion", "lime"}
QUICK = [name for name in METHODS if name not in NEED_FILES | CAPTUM | {"rise"}]


def model_of(name: str = "deit", groups: int = 2, **options) -> iared2.ReducedTransformer:
    torch.manual_seed(0)
    model = iared2.reduce(FAMILIES[name].build(), groups, **options).eval()
    for parameter in model.reducers.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def by_hand(model, images, target=None):
    """timm's own forward without fused attention: weights of every block, their gradients, block inputs and theirs."""
    backbone, kept, inputs = model.backbone, [], []
    handles = []
    for block in backbone.blocks:
        block.attn.fused_attn = False
        handles.append(block.attn.attn_drop.register_forward_hook(lambda _m, x, _y: kept.append(x[0])))
        handles.append(block.register_forward_hook(lambda _m, x, _y: inputs.append(x[0])))
    images = images.clone().requires_grad_()
    logits = backbone(images)
    chosen = logits.argmax(1) if target is None else target
    total = logits.gather(1, chosen[:, None]).sum()
    grads = torch.autograd.grad(total, kept + inputs)
    for handle in handles:
        handle.remove()
    return [w.detach() for w in kept], grads[: len(kept)], [x.detach() for x in inputs], grads[len(kept) :]


@pytest.mark.parametrize("target", [None, torch.tensor([1, 0, 2])])
def test_gradient_methods_are_those_worked_out_on_timm_itself(target):
    model, images = model_of(), FAMILIES["deit"].images(3)
    weights, slopes, inputs, input_slopes = by_hand(model, images, target)
    count = weights[0].shape[-1]
    maps = {
        name: find_explainer(name, model)(images, target).flatten(1) for name in ("chefer", "gradcam", "gradcam_attention", "grad_rollout")
    }
    R = torch.eye(count).expand(3, -1, -1)
    for w, g in zip(weights, slopes, strict=True):
        R = R + (w * g).clamp(min=0).mean(1) @ R
    torch.testing.assert_close(maps["chefer"], R[:, 0, 1:], rtol=1e-4, atol=1e-7)
    x, g = inputs[-1][:, 1:], input_slopes[-1][:, 1:]
    torch.testing.assert_close(maps["gradcam"], (x * g.mean(1, keepdim=True)).sum(-1).relu(), rtol=1e-3, atol=1e-7)
    row, row_slope = weights[-1][:, :, 0, 1:], slopes[-1][:, :, 0, 1:]
    wanted = (row * row_slope.mean(-1, keepdim=True)).mean(1).relu()
    torch.testing.assert_close(maps["gradcam_attention"], wanted, rtol=1e-3, atol=1e-9)
    R = torch.eye(count).expand(3, -1, -1)
    for w, g in list(zip(weights, slopes, strict=True))[1:]:
        mixed = (w * g).clamp(min=0).mean(1) + torch.eye(count)
        R = mixed / mixed.sum(-1, keepdim=True) @ R
    torch.testing.assert_close(maps["grad_rollout"], R[:, 0, 1:], rtol=1e-4, atol=1e-7)


def test_attention_and_rollout_are_timms_weights():
    model, images = model_of(), FAMILIES["deit"].images(3)
    weights, *_ = by_hand(model, images)
    for name, wanted in {
        "attention": weights[-1].mean(1)[:, 0, 1:],
        "attention:1": weights[1].mean(1)[:, 0, 1:],
        "attention:1:0": weights[1][:, 0, 0, 1:],
        "attention:0:max": weights[0].amax(1)[:, 0, 1:],
    }.items():
        torch.testing.assert_close(find_explainer(name, model)(images).flatten(1), wanted, rtol=1e-4, atol=1e-6)
    product = torch.eye(weights[0].shape[-1])
    for w in weights[1:]:
        mixed = 0.5 * w.mean(1) + 0.5 * torch.eye(w.shape[-1])
        product = mixed @ product
    torch.testing.assert_close(find_explainer("rollout", model)(images).flatten(1), product[:, 0, 1:], rtol=1e-4, atol=1e-6)


def test_legrad_asks_the_answer_as_it_stands_after_each_block():
    model, images = model_of(), FAMILIES["deit"].images(2)
    with torch.enable_grad():
        passed = dense_pass(model, images)
        found = seen.legrad(passed, None, model.num_classes, layers=1).flatten(1)
    (slope,) = attention_gradients(dense_pass(model, images), model.adapter.depth - 1, None, model.num_classes)
    torch.testing.assert_close(found, slope.clamp(min=0).mean((1, 2))[:, 1:])


@pytest.mark.parametrize("name", ["deit", "avg"])
def test_deep_taylor_conserves_relevance_in_every_layer(name):
    model, images = model_of(name).double(), FAMILIES[name].images(3).double()
    passed = relevance_pass(model, images, Rules(3))
    torch.testing.assert_close(passed.output_BC, model.backbone(images).float(), rtol=1e-5, atol=1e-5)
    for part in relevance_of(passed, passed.token_TD, None, model.num_classes):
        torch.testing.assert_close(part.view(3, -1).sum(1), torch.ones(3).double(), rtol=1e-6, atol=1e-6)


def test_rules_on_two_tokens_worked_by_hand():
    x = torch.tensor([[2.0, -1.0]], dtype=torch.float64, requires_grad=True)
    weight, bias = torch.tensor([[1.0, 3.0], [2.0, -1.0]], dtype=torch.float64), torch.tensor([0.5, 0.0], dtype=torch.float64)
    with propagating(Rules(1)):
        out = F.linear(x, weight, bias)
    (found,) = torch.autograd.grad(out, x, torch.tensor([[6.0, 10.0]], dtype=torch.float64))
    # Products of the first output: 2 and -3, of which the positive alone counts; of the second: 4 and 1.
    torch.testing.assert_close(found, torch.tensor([[6.0 + 8.0, 2.0]], dtype=torch.float64))
    with propagating(Rules(1, attn=True)):
        out = F.linear(x, weight, bias)
    (found,) = torch.autograd.grad(out, x, torch.tensor([[1.0, 1.0]], dtype=torch.float64))
    # In AttnLRP passes carry R / x. Outputs -0.5 and 5, all of which is relevant: shares 2 / -0.5, -3 / -0.5; 4 / 5, 1 / 5.
    torch.testing.assert_close(x * found, torch.tensor([[2.0 + 4.0, -3.0 + 1.0]], dtype=torch.float64))
    with propagating(Rules(1, attn=True, gamma=1.0)):
        out = F.linear(x, weight, bias)
    (found,) = torch.autograd.grad(out, x, torch.tensor([[1.0, 1.0]], dtype=torch.float64))
    # The products -3 of the negative output and 4 and 1 of the positive one count twice, in numerator and denominator.
    wanted = [-0.5 * 2 / (-0.5 - 3) + 5 * 8 / (5 + 5), -0.5 * -6 / (-0.5 - 3) + 5 * 2 / (5 + 5)]
    torch.testing.assert_close(x * found, torch.tensor([wanted], dtype=torch.float64))
    one, two = (
        torch.tensor([[3.0, 1.0]], dtype=torch.float64, requires_grad=True),
        torch.tensor([[1.0, 1.0]], dtype=torch.float64, requires_grad=True),
    )
    with propagating(Rules(1)):
        total = one * 1.0 + two * 1.0
    found = torch.autograd.grad(total, (one, two), torch.tensor([[4.0, 2.0]], dtype=torch.float64))
    torch.testing.assert_close(torch.stack(found).squeeze(1), torch.tensor([[3.0, 1.0], [1.0, 1.0]], dtype=torch.float64))
    scores = torch.tensor([[1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    with propagating(Rules(1, attn=True)):
        weights = scores.softmax(-1)
    share = torch.tensor([1.0, 2.0], dtype=torch.float64).softmax(0)
    (found,) = torch.autograd.grad(weights, scores, torch.tensor([[1.0 / share[0], 0.0]], dtype=torch.float64))  # R = (1, 0)
    torch.testing.assert_close((scores * found)[0], torch.stack([1 * (1 - share[0]), -2 * share[1]]))


def test_attnlrp_on_norms_products_and_activations_worked_by_hand():
    x = torch.tensor([[3.0, -1.0, 4.0]], dtype=torch.float64, requires_grad=True)
    weight, bias = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64), torch.tensor([0.1, 0.0, 1.0], dtype=torch.float64)
    with propagating(Rules(1, attn=True)):
        out = F.layer_norm(x, (3,), weight, bias, 0.0)
    torch.testing.assert_close(out, F.layer_norm(x, (3,), weight, bias, 0.0))
    spread = math.sqrt((1 + 9 + 4) / 3)  # of 3, -1, 4 around their mean 2
    (found,) = torch.autograd.grad(out[:, 1].sum(), x)  # 2 (x_1 - mean) / spread, of which the spread is a constant
    torch.testing.assert_close(found, torch.tensor([[-1, 2, -1]], dtype=torch.float64) * 2 / 3 / spread)
    with propagating(Rules(1, attn=True)):
        out = F.gelu(x)
    (found,) = torch.autograd.grad(out, x, torch.ones(1, 3).double())
    torch.testing.assert_close(x * found, F.gelu(x))  # identity: R of the output is that of the input
    one, two = (torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in (2.0, 5.0))
    with propagating(Rules(1, attn=True)):
        out = (one * 1.0) * (two * 1.0)
    found = torch.autograd.grad(out, (one, two))
    assert (one * found[0]).item() == (two * found[1]).item() == 5.0  # half of 10 each


def test_attnlrp_stays_bounded_over_many_blocks():
    """Relevance of all values in a block's input stays near the answer; quotients of sums that cancel would grow without bounds."""
    backbone = vit.VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=24, num_heads=4, num_classes=5)
    model, images = iared2.reduce(backbone, 2).eval(), FAMILIES["deit"].images(2)
    for gamma in (0.0, 0.25):
        passed = relevance_pass(model, images, Rules(2, attn=True, gamma=gamma))
        torch.testing.assert_close(passed.output_BC, backbone(images), rtol=1e-4, atol=1e-4)
        found = relevance_of(passed, passed.token_TD, None, model.num_classes)
        for part, value in zip(found, passed.token_TD, strict=True):
            assert (part * value).view(2, -1).abs().sum(1).max() < 100


def test_attnlrp_without_gamma_is_gradient_times_input_where_nothing_bends():
    """On a linear layer without bias the epsilon rule is gradient times input."""
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 6, dtype=torch.float64)
    with propagating(Rules(1, attn=True)):
        out = F.linear(x, weight)
    (found,) = torch.autograd.grad(out[:, 1], x, torch.ones(4).double())
    torch.testing.assert_close(found, weight[1].expand(4, 6), rtol=1e-6, atol=1e-6)


def test_ours_cost_what_the_pass_did_cost():
    model, images = model_of(on_drop="merge"), FAMILIES["deit"].images(4)
    share, patches, width = model.trace(images)[1].share_of_dense(), 16, 32
    assert 0.2 < share < 0.9
    ours, group, slope = (find_explainer(name, model) for name in ("ours", "ours:1", "ours_gradient"))
    assert ours.forwards == 1.0  # not yet known
    for one in (ours, group, slope):
        one(images)
    dense = model.trace(images)[1].dense_macs
    assert group.forwards == share
    assert ours.forwards == pytest.approx(share + patches**2 * (width + 2) / dense)
    attention = (17 * 4 * width**2 + 2 * 17**2 * width) * 2  # two blocks are asked for their keys once more
    assert slope.forwards == pytest.approx(2.5 + share + (patches**2 * (2 * width + 3) + attention) / dense)


def test_attnlrp_gives_nothing_to_what_every_picture_has():
    """Positions and biases carry relevance too, but a patch without content shows none of it."""
    model, images = model_of(), FAMILIES["deit"].images(2)
    images[0] = 0.0
    images[1, :, :8, 8:16] = 0.0
    black, partly = find_explainer("attnlrp", model)(images)
    assert (black == 0).all() and partly[0, 1] == 0 and (partly != 0).sum() == 15


@pytest.mark.parametrize("name", ["deit", "dinov2_reg", "avg"])
def test_gradcam_is_that_of_grad_cam(name):
    """pytorch-grad-cam, told where a ViT's patches are; it scales to [0, 1] and to the size of the picture."""
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model, images = model_of(name), FAMILIES[name].images(3)
    prefix, backbone = model.adapter.prefix, copy.deepcopy(model.backbone).requires_grad_(True)

    def patches(x_BSD: torch.Tensor) -> torch.Tensor:
        return x_BSD[:, prefix:].transpose(1, 2).unflatten(2, (4, 4))

    with GradCAM(backbone, [backbone.blocks[-2]], reshape_transform=patches) as cam:
        wanted = torch.from_numpy(cam(images, [ClassifierOutputTarget(2)] * 3))
    found = to_pixels(find_explainer("gradcam", model)(images, torch.full((3,), 2)), (32, 32))
    found = found - found.amin((1, 2), keepdim=True)
    found = found / found.amax((1, 2), keepdim=True)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_method_runs_on_every_family_or_says_why_not(name):
    family = FAMILIES[name]
    model, images = model_of(name), family.images(2)
    done, refused = 0, []
    for method in QUICK:
        try:
            maps = find_explainer(method, model)(images)
        except ConfigError as error:
            refused.append(str(error))
            continue
        done += 1
        assert maps.shape[0] == 2 and maps.ndim == 3 and maps.isfinite().all(), method
        if method not in ("gaussian", "background", "random"):
            assert tuple(maps.shape[1:]) == model.adapter.grid(*images.shape[-2:]), method
    assert done >= 6
    assert all("\n" not in said and len(said) > 40 for said in refused)


def test_targets_change_maps_that_depend_on_a_class_and_no_others():
    model, images = model_of(), FAMILIES["deit"].images(2)
    one, two = torch.tensor([0, 0]), torch.tensor([1, 1])
    for name in QUICK:
        explainer = find_explainer(name, model)
        same = torch.equal(explainer(images, one), explainer(images, two))
        assert same == (name in {"ours", "attention", "rollout", "gaussian", "background"}), name


NEAR = ("chefer", "rollout", "gradcam", "legrad")
EXACT = ("lrp", "partial_lrp", "transformer_attribution", "attnlrp")  # computed in float32, whatever surrounds them


@pytest.mark.parametrize("name", ["deit", "dinov2_reg"])
def test_half_precision_and_registers_break_nothing(name):
    model, images = model_of(name), FAMILIES[name].images(2)
    exact = {method: find_explainer(method, model)(images) for method in NEAR + EXACT}
    with torch.autocast("cpu", torch.bfloat16):
        half = {method: find_explainer(method, model)(images) for method in exact}
    for method, wanted in exact.items():
        same = torch.corrcoef(torch.stack([half[method].flatten(), wanted.flatten()]))[0, 1]
        assert same > (0.95 if method in NEAR else 0.9999), method


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_in_other_precisions_are_explained(dtype):
    model, images = model_of().to(dtype), FAMILIES["deit"].images(2).to(dtype)
    for method in (*QUICK, "ig", "smoothgrad", "occlusion", "lime", "rise"):
        maps = find_explainer(method, model)(images)
        assert maps.dtype == torch.float32 and maps.isfinite().all(), method
    assert next(model.parameters()).dtype == dtype


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_callers_may_be_without_gradients(context):
    model = model_of()
    wanted = {name: find_explainer(name, model)(FAMILIES["deit"].images(2)) for name in QUICK}
    with context():
        images = FAMILIES["deit"].images(2)
        for name, maps in wanted.items():
            torch.testing.assert_close(find_explainer(name, model)(images), maps)


def test_a_model_in_training_stays_there():
    model, images = model_of().train(), FAMILIES["deit"].images(2)
    model.backbone.norm.eval()
    before = [module.training for module in model.modules()]
    for name in ("chefer", "ours", "lrp"):
        find_explainer(name, model)(images)
    assert [module.training for module in model.modules()] == before and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("method", ["smoothgrad", "lime", "rise", "ig", "occlusion"])
def test_a_map_depends_on_no_neighbour_but_where_it_draws_on_the_seed(method):
    model, images = model_of(), FAMILIES["deit"].images(2)
    pair = find_explainer(method, model, seed=1)(torch.stack([images[0], 20 * images[1]]))
    alone = find_explainer(method, model, seed=1)(images[:1])
    torch.testing.assert_close(pair[0], alone[0], rtol=1e-3, atol=1e-4)
    other = find_explainer(method, model, seed=2)(images[:1])
    assert torch.equal(other, alone) == (method in ("ig", "occlusion"))


def test_where_two_tokens_answer_both_are_read():
    model, images = model_of("deit_distilled"), FAMILIES["deit_distilled"].images(2)
    assert model.adapter.answering == 2
    with torch.no_grad():
        rows = dense_pass(model, images).attention_BHSS[-1].mean(1)[:, :2, 2:].mean(1)
        torch.testing.assert_close(find_explainer("attention", model)(images).flatten(1), rows)
        model.backbone.head.weight.zero_()  # only the distillation token answers
        model.backbone.head.bias.zero_()
    assert find_explainer("gradcam_attention", model)(images).abs().sum() > 0


def test_occlusion_costs_the_passes_that_it_makes():
    model, images, seen_images = model_of(), FAMILIES["deit"].images(2), []
    explainer = find_explainer("occlusion", model)
    handle = model.backbone.register_forward_hook(lambda _m, x, _y: seen_images.append(len(x[0])))
    explainer(images)
    handle.remove()
    assert explainer.forwards == sum(seen_images) / 2


def test_a_merged_patch_is_scored_by_its_carrier():
    model, images = model_of(on_drop="merge"), FAMILIES["deit"].images(3)
    with torch.no_grad():
        _, trace = model.trace(images)
    found_GBN = scores_on_grid(trace)
    assert torch.equal(found_GBN[0], trace.score_GBN[0])
    for image in range(3):
        for place in range(found_GBN.shape[-1]):
            carrier = int(trace.carrier_GBN[0, image, place])
            assert found_GBN[1, image, place] == (trace.score_GBN[1, image, carrier] if carrier >= 0 else 0)
    assert (trace.carrier_GBN[0] != torch.arange(found_GBN.shape[-1])).any()


def test_sharing_by_the_identity_changes_nothing_and_by_means_evens_out():
    value_BN = torch.rand(2, 5)
    torch.testing.assert_close(shared(value_BN, torch.eye(5).expand(2, -1, -1), times=3), value_BN)
    torch.testing.assert_close(shared(value_BN, torch.full((2, 5, 5), 0.2)), value_BN.mean(1, keepdim=True).expand(-1, 5))


def test_integrated_gradients_are_complete_and_occlusion_is_what_is_lost():
    pytest.importorskip("captum")
    from iared2.explain import perturbing

    model, images = model_of(), FAMILIES["deit"].images(2)
    answer, _ = perturbing.answers(model, images, None)
    signed = perturbing.captum().IntegratedGradients(answer).attribute(images, baselines=perturbing._black(model, images), n_steps=64)
    with torch.no_grad():
        gained = answer(images) - answer(perturbing._black(model, images))
    torch.testing.assert_close(signed.flatten(1).sum(1).float(), gained, rtol=0.05, atol=2e-3)
    maps = find_explainer("occlusion", model)(images)
    covered, patch = images.clone(), 32 // model.adapter.grid(32, 32)[0]
    covered[:, :, : 2 * patch, : 2 * patch] = 0
    with torch.no_grad():
        lost = answer(images) - answer(covered)
    torch.testing.assert_close(maps[:, 0, 0], lost, rtol=1e-3, atol=1e-5)  # one window alone covers the corner


@pytest.mark.parametrize("name", ["ig", "smoothgrad", "lime"])
def test_captums_methods_give_pixels_and_repeat(name):
    pytest.importorskip("captum")
    model, images = model_of(), FAMILIES["deit"].images(2)
    explainer = find_explainer(name, model)
    maps = explainer(images)
    assert maps.shape == (2, 32, 32) and maps.std() > 0 and explainer.slow
    assert torch.equal(maps, explainer(images))


def test_rise_finds_the_only_patch_that_matters():
    class Corner(nn.Module):
        num_classes = 2

        def forward(self, images):
            value = images[:, :, :8, :8].mean((1, 2, 3))
            return torch.stack([8 * value, torch.zeros_like(value)], dim=1)

    model = model_of()
    model.backbone = Corner()
    object.__setattr__(model, "_classes", 2)
    maps = rise(model, torch.ones(1, 3, 32, 32), torch.tensor([0]), draws=300)
    assert maps[0, :6, :6].mean() > maps[0, 10:, 10:].mean() + 0.05


def test_memnet_slides_over_crops_and_asks_for_its_weights(tmp_path):
    from safetensors.torch import save_file

    net = MemNet().eval()
    with torch.no_grad():
        assert net(torch.zeros(1, 3, 227, 227)).shape == (1, 1, 1)
        wide = torch.rand(1, 3, 227, 259)
        torch.testing.assert_close(net(wide)[0, 0, 0], net(wide[..., :227])[0, 0, 0], rtol=0, atol=1e-3)  # borders are padded
    path = tmp_path / "net.safetensors"
    save_file({"features.0.weight": torch.zeros(1)}, path)
    with pytest.raises(iared2.errors.DataError, match="does not hold MemNet's weights"):
        find_explainer(f"memorability:{path}", model_of())
    with pytest.raises(ConfigError, match="weights are not public"):
        find_explainer("memorability", model_of())


def test_wrong_names_details_and_targets_are_answered():
    model = model_of()
    for name, said in {
        "chefr": "chefer",
        "attention:99": "block '99', wanted one of 0 to",
        "attention:0:9": "head '9'",
        "ours:7": "group '7', wanted one of 0 to 1",
        "rollout:3": "takes nothing behind a colon",
    }.items():
        with pytest.raises(ConfigError, match=said):
            find_explainer(name, model)
    with pytest.raises(ConfigError, match="got class 99, but the head knows classes 0 to"):
        find_explainer("chefer", model)(FAMILIES["deit"].images(1), torch.tensor([99]))
    assert len(method_list()) == len(method_names()) == len(METHODS)


def test_parameters_ask_for_gradients_again_afterwards():
    model = model_of()
    find_explainer("chefer", model)(FAMILIES["deit"].images(1))
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
