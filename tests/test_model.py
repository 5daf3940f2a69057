"""The reduced transformer's surface: groups, thresholds, traces, timm's methods, taking apart, saving and loading."""

import copy
import dataclasses
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import iared2
from families import DEPTH, FAMILIES, randomised
from iared2.errors import ConfigError, HubError, IARED2Error, UnsupportedBackboneError, WeightsError
from iared2.interpreter import InterpreterConfig
from iared2.keep import BatchBudget, Given, Threshold, TopK
from iared2.model import ReducedTransformer, reduce
from iared2.reduction import ReductionConfig, even_groups, group_starts
from iared2.saving import load_reduced
from iared2.trace import concatenate

NAME = "vit_tiny_patch16_224"


def lively(model: ReducedTransformer, seed: int = 0) -> ReducedTransformer:
    """Interpreters with weights that spread scores around 0.5."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for reducer in model.reducers:
            for value in reducer.parameters():
                value.normal_(0, 0.5)
            reducer.interpreter.query.bias.zero_()
    return model.eval()


def deit(groups=2, **settings) -> ReducedTransformer:
    return lively(reduce(FAMILIES["deit"].build(), groups, **settings))


def named(seed: int = 0, **options) -> nn.Module:
    """A backbone that timm can build again by name; small, random, from no network."""
    torch.manual_seed(seed)
    return randomised(timm.create_model(NAME, img_size=32, num_classes=5, **options)).eval()


# ---- groups and settings -----------------------------------------------------------------------------------


def test_three_lines_make_a_reduced_model():
    model = iared2.reduce(FAMILIES["deit"].build(depth=6), groups=3)
    logits = model(FAMILIES["deit"].images(2))
    assert logits.shape == (2, 5) and model.config.first_blocks == (0, 2, 4) and model.threshold == 0.5


@pytest.mark.parametrize("depth", [1, 2, 6, 12])
def test_groups_are_even(depth):
    for groups in range(1, depth + 3):
        if depth % groups:
            with pytest.raises(
                ConfigError, match=rf"got {groups}, which does not divide the backbone's {depth} blocks.*first block of each group"
            ):
                even_groups(depth, groups)
        else:
            blocks = even_groups(depth, groups)
            assert len(blocks) == groups and blocks[0] == 0 and {b - a for a, b in pairwise(blocks)} <= {depth // groups}
    with pytest.raises(ConfigError):
        even_groups(depth, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"groups": (1, 1)}, "wanted ascending block numbers"),
        ({"groups": (2, 1)}, "wanted ascending block numbers"),
        ({"groups": (-1, 2)}, "wanted ascending block numbers"),
        ({"groups": ()}, "wanted ascending block numbers"),
        ({"groups": (0, 4)}, "got block 4, but the backbone has blocks 0 to 3"),
        ({"groups": 2, "thresholds": (0.5,)}, "got 1, wanted one for each of 2 groups"),
        ({"groups": 2, "rule": "top_k"}, "ratios: got 0, wanted one for each of 2 groups"),
        ({"groups": 2, "rule": "top_k", "ratios": (0.5, 0.0)}, "ratios: got .*wanted numbers above 0"),
        ({"groups": 2, "rule": "topk", "ratios": (0.5, 0.5)}, "rule"),
        ({"groups": 2, "treshold": (1, 1)}, "unknown setting 'treshold'; did you mean 'thresholds'"),
    ],
)
def test_wrong_settings_say_what_is_wanted(settings, message):
    with pytest.raises(ConfigError, match=message):
        reduce(FAMILIES["deit"].build(), **settings)


def test_groups_by_their_first_blocks_reduce_there():
    model = deit((1, 3))
    _, trace = model.trace(FAMILIES["deit"].images(2))
    assert trace.first_blocks == (1, 3) and trace.groups == 2


@pytest.mark.parametrize("value", [-1, 0, 0.3, 1.5, float("inf"), -7.5])
def test_threshold_is_any_number(value):
    model, images = deit(), FAMILIES["deit"].images(4)
    model.threshold = value
    assert model.threshold == value
    _, trace = model.trace(images)
    wanted = trace.score_GBN[0] > value
    assert torch.equal(trace.keep_GBN[0], wanted)
    if value < 0:
        assert trace.keep_ratio.tolist() == [[1, 1]] * 4
        assert torch.allclose(model(images), model.backbone(images), atol=1e-5)
    if value > 1:
        assert trace.keep_ratio.tolist() == [[0, 0]] * 4 and torch.isfinite(model(images)).all()


def test_thresholds_may_differ_by_group():
    model = deit()
    model.threshold = (0.2, 0.7)
    assert model.threshold == (0.2, 0.7) and [r.rule.threshold for r in model.reducers] == [0.2, 0.7]
    model.threshold = [0.4, 0.4]
    assert model.threshold == 0.4
    with pytest.raises(ConfigError, match="got 3, wanted one for each of 2 groups"):
        model.threshold = (0.1, 0.2, 0.3)
    assert model.threshold == 0.4  # a refused change changes nothing


def test_configure_changes_rules_and_keeps_weights():
    model = deit()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    model.configure(rule="top_k", ratios=(0.5, 0.25), on_drop="merge")
    assert [r.rule for r in model.reducers] == [TopK(0.5), TopK(0.25)] and all(r.on_drop == "merge" for r in model.reducers)
    model.configure(rule="batch_budget")
    assert isinstance(model.reducers[0].rule, BatchBudget)
    model.threshold = 0.3
    assert model.reducers[1].rule == Threshold(0.3)
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    with pytest.raises(ConfigError, match="first_blocks cannot change after reduction"):
        model.configure(first_blocks=(0,))
    with pytest.raises(ConfigError, match="on_drop"):
        model.configure(on_drop="keep")
    with pytest.raises(ConfigError, match="unknown setting"):
        model.configure(ratio=(0.5, 0.5))


def test_without_prefix_tokens_the_best_patch_stays():
    model = lively(reduce(FAMILIES["siglip"].build(), 2))
    model.threshold = 2.0
    logits, trace = model.trace(FAMILIES["siglip"].images(3))
    assert (trace.keep_GBN.sum(-1) == 1).all() and torch.isfinite(logits).all()
    assert torch.equal(trace.keep_GBN[0].float().argmax(1), trace.score_GBN[0].argmax(1))


def test_gradient_flows_to_the_backbone_but_not_through_choices():
    model = deit()
    model(FAMILIES["deit"].images(2)).sum().backward()
    assert all(p.grad is not None for p in model.backbone.parameters())
    assert all(p.grad is None for p in model.reducers.parameters())


# ---- the trace ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_drop", ["discard", "merge", "fuse"])
def test_the_trace_tells_what_happened(on_drop):
    family = FAMILIES["non_square"]
    model, images = lively(reduce(family.build(), 2, on_drop=on_drop)), family.images(3)
    logits, trace = model.trace(images)
    assert torch.equal(logits, model(images))
    assert trace.grid == (4, 6) and trace.score_GBN.shape == trace.keep_GBN.shape == trace.carrier_GBN.shape == (2, 3, 24)
    assert trace.keep_ratio.shape == (3, 2) and trace.heatmap().shape == (3, 4, 6) and len(trace.macs) == 3
    assert trace.score_GBN.min() >= 0 and trace.score_GBN.max() <= 1
    gone = ~trace.keep_GBN[0]
    assert gone.any() and (trace.score_GBN[1][gone] == 0).all() and (trace.score_GBN[1][~gone] > 0).all()
    assert (trace.heatmap(1)[gone.view(3, 4, 6)] == 0).all()
    for kept_BN, score_BN in zip(trace.keep_GBN, trace.score_GBN, strict=True):
        above_BN = score_BN > 0.5
        assert (kept_BN & above_BN).equal(above_BN)  # the best of those that go may stay, for all of them
        assert ((kept_BN & ~above_BN).sum(1) == (on_drop == "fuse")).all()
    assert torch.equal(trace.keep_ratio[:, 0], trace.keep_GBN[0].float().mean(1))
    for group in range(2):
        carrier_BN, everywhere = trace.carrier_GBN[group], torch.arange(24).expand(3, -1)
        assert torch.equal(trace.keep_GBN[group], carrier_BN == everywhere)
        assert trace.keep_GBN[group].gather(1, carrier_BN.clamp(min=0))[carrier_BN >= 0].all()
        assert torch.equal(
            trace.carried(group),
            trace.keep_GBN[group] if on_drop == "discard" else trace.keep_GBN[group].any(1, keepdim=True).expand(3, 24),
        )


def test_the_trace_is_frozen_and_can_be_split_and_joined():
    model, images = deit(), FAMILIES["deit"].images(4)
    _, trace = model.trace(images)
    with pytest.raises(dataclasses.FrozenInstanceError):
        trace.macs = ()
    parts = [trace.image(i) for i in range(4)]
    joined = concatenate(parts)
    for name in ("score_GBN", "keep_GBN", "carrier_GBN"):
        assert torch.equal(getattr(joined, name), getattr(trace, name))
    assert joined.macs == trace.macs and torch.equal(trace.image(-1).score_GBN, parts[3].score_GBN)
    assert not trace.cpu().score_GBN.requires_grad


@pytest.mark.parametrize("groups", [2.0, None, "3", True, ("1", "2"), (0.5, 1)])
def test_groups_that_are_no_numbers_are_refused(groups):
    with pytest.raises(ConfigError, match=r"groups: got .*wanted how many groups, or the first block of each"):
        group_starts(DEPTH, groups)


def test_groups_may_be_numpy_numbers_and_are_given_once():
    assert group_starts(DEPTH, np.int64(2)) == group_starts(DEPTH, 2) and group_starts(DEPTH, [np.int32(1), 3]) == (1, 3)
    with pytest.raises(ConfigError, match="first_blocks: give the first block of each group as groups"):
        reduce(FAMILIES["deit"].build(), 2, first_blocks=(1,))


def test_thresholds_are_whatever_is_a_number_but_nan():
    model = deit(2)
    for value in (np.float32(0.25), torch.tensor(0.25), "0.25", [0.25, 0.25]):
        model.threshold = value
        assert model.threshold == 0.25
    for value in (None, "half", float("nan"), [0.5], object()):
        with pytest.raises(ConfigError, match="threshold"):
            model.threshold = value
        assert model.threshold == 0.25
    model.threshold = float("inf")
    assert json.loads(json.dumps(model.config.model_dump(mode="json"), allow_nan=False))["thresholds"] == ["inf", "inf"]
    assert ReductionConfig.model_validate(model.config.model_dump(mode="json")) == model.config


def test_a_refused_setting_changes_nothing():
    model = deit(2)
    rules = [reducer.rule for reducer in model.reducers]
    for ratios in ((0.1, 2), (0.5,), (-1, 0.5)):
        with pytest.raises(ConfigError, match="ratios"):
            model.configure(rule="top_k", ratios=ratios)
        assert [reducer.rule for reducer in model.reducers] == rules and model.config.rule == "threshold"


@pytest.mark.parametrize("policy", ["learned", "class"])
@pytest.mark.parametrize("on_drop", ["discard", "merge", "fuse"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_traces_in_every_precision(dtype, on_drop, policy):
    model = deit(2, on_drop=on_drop, interpreter=InterpreterConfig(policy=policy)).to(dtype)
    images = FAMILIES["deit"].images(2).to(dtype)
    logits, trace = model.trace(images)
    assert logits.dtype == dtype and logits.isfinite().all()
    assert torch.equal(logits, model(images)) and trace.dense_macs == deit().trace(images.float())[1].dense_macs


def test_damage_shows_in_the_answer_instead_of_being_dropped():
    model = deit(2)
    images = FAMILIES["deit"].images(2).clone()
    images[0] = float("nan")
    for threshold in (-1, 0.5):
        model.threshold = threshold
        logits, trace = model.trace(images)
        assert logits[0].isnan().all() and logits[1].isfinite().all() and trace.score_GBN[:, 0].isnan().any()


def test_an_empty_batch_has_an_empty_answer():
    for on_drop in ("discard", "merge", "fuse"):
        model = deit(2, on_drop=on_drop)
        empty = torch.empty(0, *FAMILIES["deit"].images(1).shape[1:])
        assert model(empty).shape == model.backbone(empty).shape


def test_the_map_of_a_model_with_one_group_is_that_groups():
    trace = deit(1).trace(FAMILIES["deit"].images(1))[1]
    assert torch.equal(trace.heatmap(), trace.heatmap(0))
    with pytest.raises(ConfigError, match="group: got 1, wanted one of 0 to 0"):
        trace.heatmap(1)


# ---- timm's surface --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["deit", "deit_distilled", "dinov2_reg", "siglip", "avg", "non_square", "parallel_things"])
def test_timms_methods_give_what_the_untouched_model_gives_when_all_is_kept(name):
    family = FAMILIES[name]
    backbone, images = family.build(), family.images(2)
    model = reduce(backbone, 2).eval()
    model.threshold = -1
    with torch.no_grad():
        features = model.forward_features(images)
        assert torch.allclose(features, backbone.forward_features(images), atol=2e-5)
        assert torch.allclose(model.forward_head(features), backbone(images), atol=2e-5)
        assert torch.allclose(model.forward_head(features, pre_logits=True), backbone.forward_head(features, pre_logits=True), atol=2e-5)
        for options in (
            {},
            {"indices": 2},
            {"indices": [0, -1]},
            {"norm": True},
            {"output_fmt": "NLC"},
            {"return_prefix_tokens": True},
            {"intermediates_only": True},
            {"indices": [0, 1], "stop_early": True},
            {"output_dict": True},
            {"output_dict": True, "return_prefix_tokens": True, "intermediates_only": True, "indices": 1},
        ):
            got, wanted = model.forward_intermediates(images, **options), backbone.forward_intermediates(images, **options)
            assert not isinstance(wanted, dict) or set(got) == set(wanted)
            flat = [list(flatten(x)) for x in (got, wanted)]
            assert len(flat[0]) == len(flat[1])
            assert all(g.shape == w.shape and torch.allclose(g, w, atol=2e-5) for g, w in zip(*flat, strict=True)), options
    assert (model.num_features, model.num_classes) == (backbone.num_features, backbone.num_classes)


def flatten(value):
    if isinstance(value, Tensor):
        yield value
    else:
        for part in (value[key] for key in sorted(value)) if isinstance(value, dict) else value:
            yield from flatten(part)


@pytest.mark.parametrize("indices", [[DEPTH], [-DEPTH - 1], 0, DEPTH + 1])
def test_intermediates_of_blocks_that_do_not_exist_are_refused(indices):
    with pytest.raises(ConfigError, match="indices"):
        deit().forward_intermediates(FAMILIES["deit"].images(1), indices=indices)


def test_an_unknown_format_of_intermediates_is_refused():
    with pytest.raises(ConfigError, match="output_fmt: got 'NHWC', wanted 'NCHW' or 'NLC'"):
        deit().forward_intermediates(FAMILIES["deit"].images(1), output_fmt="NHWC")


@pytest.mark.parametrize("on_drop", ["discard", "merge", "fuse"])
def test_features_lie_on_the_full_grid_each_place_filled_by_its_carrier(on_drop):
    model, images = deit(on_drop=on_drop), FAMILIES["deit"].images(3)
    with torch.no_grad():
        features, (logits, trace) = model.forward_features(images), model.trace(images)
        maps = model.forward_intermediates(images, norm=True, intermediates_only=True)
    assert features.shape == (3, 17, 32)
    places = features[:, 1:]
    carrier_BN = trace.carrier_GBN[-1]
    assert (places[carrier_BN < 0] == 0).all() and (places[carrier_BN >= 0].abs().sum(-1) > 0).all()
    filled = places.gather(1, carrier_BN.clamp(min=0)[..., None].expand_as(places))
    assert torch.equal(places[carrier_BN >= 0], filled[carrier_BN >= 0])
    assert torch.allclose(maps[-1].flatten(2).transpose(1, 2), places, atol=1e-5) and [m.shape for m in maps] == [(3, 32, 4, 4)] * DEPTH
    assert torch.allclose(model.forward_head(features), logits, atol=1e-5)  # the class token is all that this head reads


@pytest.mark.parametrize(
    "name", ["avg", "avg_final_norm", "avg_with_prefix", "avgmax", "max", "siglip", "map_with_class_token", "prr", "tokens_out"]
)
def test_head_of_features_is_the_model_when_dropped_tokens_are_merged(name):
    family = FAMILIES[name]
    model, images = lively(reduce(family.build(), 2, on_drop="merge")), family.images(3)
    model.threshold = 0.4  # every image keeps a patch, also where the head could do without
    with torch.no_grad():
        logits, trace = model.trace(images)
        assert not trace.keep_GBN[-1].all() and trace.carried().all()
        assert torch.allclose(model.forward_head(model.forward_features(images)), logits, atol=1e-5)


@pytest.mark.parametrize("rule", ["threshold", "top_k"])
def test_a_head_without_pooling_answers_for_every_place(rule):
    family = FAMILIES["tokens_out"]
    model = lively(reduce(family.build(), 2, rule=rule, ratios=(0.5, 0.5)))
    assert model(family.images(2)).shape == (2, 17, 5)


def test_reset_classifier_and_pooling():
    model = deit()
    assert not model.adapter.needs_patch
    model.reset_classifier(7, "avg")
    assert model.num_classes == 7 and model.adapter.needs_patch
    model.threshold = 2.0  # the best patch stays, for now the head needs one
    logits, trace = model.trace(FAMILIES["deit"].images(2))
    assert logits.shape == (2, 7) and torch.isfinite(logits).all() and (trace.keep_GBN.sum(-1) == 1).all()
    model.reset_classifier(0)
    assert model(FAMILIES["deit"].images(2)).shape == (2, 32)


def test_timm_resolves_the_data_configuration():
    backbone = named()
    assert timm.data.resolve_model_data_config(reduce(backbone, 3)) == timm.data.resolve_model_data_config(backbone)


def test_unload_gives_the_untouched_backbone_back_bit_for_bit():
    backbone = FAMILIES["dinov2_reg"].build()
    before, images = copy.deepcopy(backbone.state_dict()), FAMILIES["dinov2_reg"].images(2)
    wanted = backbone(images)
    model = lively(reduce(backbone, 2, on_drop="merge"))
    model(images)
    assert model.unload() is backbone and torch.equal(backbone(images), wanted)
    assert list(backbone.state_dict()) == list(before) and all(torch.equal(before[n], v) for n, v in backbone.state_dict().items())


def test_copies_are_independent():
    model, images = deit(), FAMILIES["deit"].images(2)
    other = copy.deepcopy(model)
    wanted = model(images)
    with torch.no_grad():
        for value in other.parameters():
            value.zero_()
    assert torch.equal(model(images), wanted) and (other(images) == 0).all() and other.adapter.module is other.backbone


def test_answers_do_not_depend_on_batch_mates():
    for on_drop in ("discard", "merge", "fuse"):
        model, images = deit(on_drop=on_drop), FAMILIES["deit"].images(5)
        alone = torch.cat([model(x[None]) for x in images])
        assert torch.allclose(model(images), alone, atol=1e-5)


# ---- saving and loading ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ReducedTransformer]:
    """A model whose backbone was trained after reduction, and the folder it was saved in."""
    model = lively(reduce(named(), (0, 5), on_drop="merge", thresholds=(0.4, 0.6), interpreter=InterpreterConfig(heads=6)))
    with torch.no_grad():
        model.backbone.head.bias += 1
    model.labels = list("abcde")
    folder = tmp_path_factory.mktemp("saved") / "model"
    model.save_pretrained(folder)
    return folder, model


def damaged(saved: tuple[Path, ReducedTransformer], target: Path) -> Path:
    """A copy to break."""
    for path in saved[0].iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_round_trip_with_the_trained_backbone(saved):
    folder, model = saved
    assert {"config.json", "reducers.safetensors", "backbone.safetensors", "labels.json"} <= {p.name for p in folder.iterdir()}
    images = torch.randn(3, 3, 32, 32)
    for again in (ReducedTransformer.from_pretrained(folder), iared2.load_reduced(str(folder))):
        assert not again.training and again.config == model.config and again.labels == model.labels
        assert torch.equal(again(images), model(images))
        assert all(torch.equal(v, again.state_dict()[n]) for n, v in model.state_dict().items())
        assert {p.name for p in again.files} == {"reducers.safetensors", "backbone.safetensors"}
        assert not again.backbone_trained


def test_only_what_reduction_added_is_saved_while_the_backbone_is_as_it_was(tmp_path):
    backbone = named()
    model = lively(reduce(backbone, 3))
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "backbone.safetensors").exists()
    stored = load_file(tmp_path / "reducers.safetensors")
    assert set(stored) == set(model.reducers.state_dict())
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["schema"] == 1 and config["backbone"]["architecture"] == NAME and not config["backbone"]["included"]
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(load_reduced(str(tmp_path), backbone=backbone)(images), model(images))
    save_file(backbone.state_dict(), tmp_path / "mine.safetensors")
    assert torch.equal(load_reduced(str(tmp_path), weights=tmp_path / "mine.safetensors")(images), model(images))


def one_step(model: ReducedTransformer, parameter: nn.Parameter) -> None:
    for value in model.parameters():
        value.requires_grad_(value is parameter)
    loss = nn.functional.cross_entropy(model(torch.randn(8, 3, 32, 32)), torch.arange(8) % 5)
    loss.backward()
    torch.optim.SGD([parameter], lr=0.5).step()


@pytest.mark.parametrize("which", ["head.bias", "head.weight", "blocks.11.mlp.fc1.weight", "cls_token"])
def test_any_training_step_is_noticed(which):
    """Gradients of the head add up to zero over classes, so a plain sum of weights would not notice."""
    model = lively(reduce(named(), 3))
    model.backbone.head.bias.data.zero_()
    model = lively(reduce(model.unload(), 3))
    assert not model.backbone_trained
    one_step(model, dict(model.backbone.named_parameters())[which])
    assert model.backbone_trained


def test_a_new_classifier_and_another_pooling_survive_the_round_trip(tmp_path):
    model = lively(reduce(named(), 3))
    model.reset_classifier(9, "avg")
    model.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(ReducedTransformer.from_pretrained(tmp_path)(images), model(images))


def test_saved_in_half_precision(saved, tmp_path):
    from iared2.saving import save_reduced

    save_reduced(saved[1], tmp_path, half=True)
    assert all(v.dtype == torch.float16 for v in load_file(tmp_path / "backbone.safetensors").values())
    again = load_reduced(str(tmp_path))
    assert all(p.dtype == torch.float32 for p in again.parameters())
    assert torch.allclose(again.backbone.head.weight, saved[1].backbone.head.weight, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "no config.json"),
        ("config.json", b"{", "not valid JSON"),
        ("config.json", b"\xff\xfe\x00", "not valid JSON"),
        ("config.json", b"[]", "not written by iared2"),
        ("config.json", b'{"library": "other"}', "not written by iared2"),
        ("reducers.safetensors", None, "no such weights file"),
        ("reducers.safetensors", b"", "not a readable safetensors file"),
        ("reducers.safetensors", b"noise" * 100, "not a readable safetensors file"),
        ("backbone.safetensors", None, "no such weights file"),
        ("labels.json", b"{", "not valid JSON"),
        ("labels.json", b'{"a": 1}', "something else than a list"),
    ],
)
def test_damaged_and_missing_files_are_named(saved, tmp_path, name, content, message):
    folder = damaged(saved, tmp_path)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(WeightsError, match=message) as caught:
        load_reduced(str(folder))
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 99}, "schema 99, but this version reads up to 1; upgrade iared2"),
        ({"reduction": {"first_blocks": [3, 1]}}, "wanted ascending block numbers"),
        ({"reduction": {"first_blocks": [0], "tau": 1}}, "unknown setting 'tau'"),
        ({"reduction": None}, "Input should be a valid dictionary"),
        (
            {"backbone": {"architecture": None, "tag": None, "arguments": {}, "included": True}},
            "not a named timm model; give it as `backbone=`",
        ),
        ({"backbone": {}}, "'backbone' lacks .*architecture.*; save the model again"),
        ({"backbone": 3}, "'backbone' lacks"),
        ({"schema": "new"}, "schema new"),
    ],
)
def test_configurations_that_cannot_be_read_say_why(saved, tmp_path, change, message):
    folder = damaged(saved, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(WeightsError, match=message):
        load_reduced(str(folder))


def test_truncated_and_mismatched_weights_are_refused(saved, tmp_path):
    folder = damaged(saved, tmp_path)
    path = folder / "reducers.safetensors"
    whole, tensors = path.read_bytes(), load_file(path)
    path.write_bytes(whole[:-100])
    with pytest.raises(WeightsError, match="not a readable safetensors file"):
        load_reduced(str(folder))
    name = next(n for n in tensors if n.endswith("query.weight"))
    save_file(tensors | {name: torch.zeros(3, 5)}, path)
    with pytest.raises(WeightsError, match=r"query.weight has shape \(3, 5\), the model wants \(192, 192\)"):
        load_reduced(str(folder))
    save_file({n: t for n, t in tensors.items() if n != name} | {"extra": torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match=r"made for another model: it lacks .*query.weight.*has 'extra'"):
        load_reduced(str(folder))


def test_a_name_that_is_nowhere_says_what_to_do(monkeypatch):
    monkeypatch.setattr("iared2.saving.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"no/such-model.*not embedded.*not a folder here.*offline mode"):
        ReducedTransformer.from_pretrained("no/such-model")


def test_all_errors_share_one_base_and_fit_pythons_own():
    for error, python in (
        (ConfigError, ValueError),
        (UnsupportedBackboneError, TypeError),
        (WeightsError, ValueError),
        (HubError, ConnectionError),
    ):
        assert issubclass(error, IARED2Error) and issubclass(error, python)


def test_configs_are_frozen():
    config = ReductionConfig(first_blocks=(0,))
    with pytest.raises(ValueError, match="frozen"):
        config.on_drop = "merge"


def test_a_replayed_trace_gives_the_same_answer():
    model, images = deit(), FAMILIES["deit"].images(3)
    logits, trace = model.trace(images)
    for reducer, keep_BN in zip(model.reducers, trace.keep_GBN, strict=True):
        reducer.rule = Given(keep_BN)
    assert torch.equal(model(images), logits)
