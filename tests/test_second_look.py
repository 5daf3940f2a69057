"""A second look: pictures that one pass leaves open are passed again with nothing dropped, counted, and calibrated for."""

import json
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import iared2
import packs
from families import CLASSES, FAMILIES
from iared2.cli import main
from iared2.cost import dense_macs
from iared2.data.arrays import ArrayBatches, ImageArrays, Preprocess
from iared2.errors import ConfigError
from iared2.evaluate.calibrate import Calibrator, margin_for
from iared2.evaluate.classify import evaluate
from iared2.explain import explain
from iared2.explain.methods import find_explainer
from iared2.explain.ours import interpreter_maps
from iared2.export import export_onnx
from iared2.interpreter import InterpreterConfig
from iared2.keep import TopK
from iared2.model import ReducedTransformer, margin, reduce
from iared2.reducers.baselines import AttentionReducer, with_reducers
from iared2.tokens.packed import join, merge, pick_images, select, split
from iared2.trace import concatenate
from iared2.train import budget
from iared2.train.feeds import Feeds
from iared2.train.together_settings import TogetherSettings
from iared2.train.trainer import RunSettings
from iared2.worth import WorthConfig

LATEST: dict[str, Any] = {
    "place": "between",
    "worth": WorthConfig(),
    "keep_length": True,
    "similarity": "tokens",
    "weights": "score",
    "on_drop": "merge",
    "interpreter": InterpreterConfig(policy="class", context=True, init_score=0.3),
}


def lively(name: str = "deit", groups: Any = (1, 2), **settings: Any) -> ReducedTransformer:
    """In float64, with scores on both sides of the threshold."""
    model = reduce(FAMILIES[name].build(), groups, **settings).double().eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for reducer in model.reducers:
            for value in reducer.interpreter.parameters():
                value.normal_(0, 0.5)
    return model


def noise(count: int) -> ArrayBatches:
    """Batches of four noise pictures."""
    pixels = torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    arrays = ImageArrays(pixels, torch.arange(count) % CLASSES)
    return ArrayBatches(arrays, Preprocess((32, 32), (0.5,) * 3, (0.5,) * 3), 4, train=False)


def halved(model: ReducedTransformer, images: torch.Tensor) -> torch.Tensor:
    """Sets the margin that half of the images fall below, and says which do."""
    ranked = margin(model(images).detach()).double()
    model.configure(second_look=float(ranked.sort().values[len(images) // 2 - 1 : len(images) // 2 + 1].mean()))
    return ranked < model.config.second_look


# ---- which, and what they get ------------------------------------------------------------------------------


@given(st.lists(st.floats(-8, 8), min_size=2, max_size=6), st.floats(-3, 3))
def test_the_margin_is_between_the_two_likeliest_classes(logits, shift):
    chances = torch.tensor(logits, dtype=torch.float64).softmax(0).sort(descending=True).values
    found = margin(torch.tensor([logits]) + shift)
    torch.testing.assert_close(found.double(), (chances[:1] - chances[1:2]), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("skip_unread", [False, True])
@pytest.mark.parametrize("place", ["before", "between"])
@pytest.mark.parametrize("name", ["deit", "deit_distilled", "dinov2_reg", "siglip", "avg", "max", "clip"])
def test_unsure_images_get_the_dense_answer_and_the_others_keep_theirs(name, place, skip_unread):
    model, images = lively(name, place=place, on_drop="merge", skip_unread=skip_unread), FAMILIES[name].images(8).double()
    once, dense = model(images), model.backbone(images)
    again_B = halved(model, images)
    found, trace = model.trace(images)
    assert again_B.sum() == 4 and trace.again == tuple(again_B.tolist())
    torch.testing.assert_close(found[again_B], dense[again_B], rtol=1e-9, atol=1e-9)
    assert torch.equal(found[~again_B], once[~again_B]) and torch.equal(model(images), found)
    assert not torch.allclose(once[again_B], dense[again_B])  # there was something to mend


@pytest.mark.parametrize("place", ["before", "between"])
@pytest.mark.parametrize("groups", [(0, 1), (1, 3), (3,), (2,)])
def test_wherever_the_first_reduction_is(groups, place):
    model, images = lively("deit", groups, place=place, skip_unread=True), FAMILIES["deit"].images(6).double()
    dense, again_B = model.backbone(images), halved(model, images)
    torch.testing.assert_close(model(images)[again_B], dense[again_B], rtol=1e-9, atol=1e-9)
    assert again_B.sum() == 3


def test_with_the_latest_settings_and_an_answer_that_knows_no_neighbours():
    model, images = lively(**LATEST, skip_unread=True), FAMILIES["deit"].images(9).double()
    again_B = halved(model, images)
    together = model(images)
    for index, image in enumerate(images):
        alone, trace = model.trace(image[None])
        torch.testing.assert_close(alone[0], together[index], rtol=1e-9, atol=1e-9)
        assert trace.again == (bool(again_B[index]),)


@pytest.mark.parametrize("factor", [1, 1000])
def test_none_and_all(factor):
    """However sure the answers are: the margin of some is 1 to the last digit then."""
    model, images = lively(), FAMILIES["deit"].images(5).double()
    with torch.no_grad():
        model.backbone.head.weight.mul_(factor)
    once, dense = model(images), model.backbone(images)
    assert (margin(once) == 1).any() == (factor == 1000)
    assert model.trace(images)[1].again == (False,) * 5  # the default: 0
    model.configure(second_look=1)
    torch.testing.assert_close(model(images), dense)
    assert torch.equal(model.logits(images), once)  # one pass, whatever is set
    found, trace = model.trace(images, second_look=False)
    assert torch.equal(found, once) and trace.again == (False,) * 5
    model.train()
    assert torch.equal(model(images), once)


def test_the_smallest_margin_that_is_enough():
    model, images = lively(), FAMILIES["deit"].images(4).double()
    least = float(margin(model(images).detach()).min())
    model.configure(second_look=least)
    assert sum(model.trace(images)[1].again) == 1
    model.configure(second_look=least * 0.999)
    assert sum(model.trace(images)[1].again) == 0


def test_half_precision_margins_are_taken_from_wider_ones():
    logits = torch.tensor([[8.0, 8.0625, -3.0]], dtype=torch.bfloat16)
    assert margin(logits).dtype == torch.float32
    torch.testing.assert_close(margin(logits), margin(logits.float()), atol=0, rtol=0)


def test_two_equally_likely_classes_are_looked_at_however_small_the_margin():
    model, images = lively(), FAMILIES["deit"].images(3).double()
    with torch.no_grad():
        model.backbone.head.weight.zero_()
        model.backbone.head.bias.zero_()
    model.configure(second_look=1e-12)
    assert model.trace(images)[1].again == (True,) * 3


@given(packs.images, st.integers(0, 3), packs.seeds, st.booleans())
def test_picked_images_are_those_of_a_split(kept, prefix, seed, merged):
    tokens, draw = packs.make_pack(kept, prefix=prefix, seed=seed), torch.Generator().manual_seed(seed)
    if merged:
        chosen = select(packs.keep_mask(tokens.layout, draw), tokens.layout)
        gone = torch.ones(len(tokens.x_TD), dtype=torch.bool).index_fill(0, chosen.index_S, False).nonzero().squeeze(1)
        tokens = merge(tokens, chosen, gone, torch.full_like(gone, -1))
    index = (torch.rand(len(kept), generator=draw) < 0.6).nonzero().squeeze(1)
    if not len(index):
        index = torch.tensor([len(kept) - 1])
    found, wanted = pick_images(tokens, index), join([split(tokens)[i] for i in index.tolist()])
    assert torch.equal(found.x_TD, wanted.x_TD) and torch.equal(found.carrier_BN, wanted.carrier_BN)
    for name in ("cu_B1", "image_T", "origin_T"):
        assert torch.equal(getattr(found.layout, name), getattr(wanted.layout, name)), name
    assert found.layout.lengths == wanted.layout.lengths and found.layout.longest >= max(found.layout.lengths)
    assert (found.mass_T is None) == (wanted.mass_T is None) == (not merged)
    assert not merged or torch.equal(found.mass_T, wanted.mass_T)


# ---- what it costs -----------------------------------------------------------------------------------------


def counted(model: ReducedTransformer, images: torch.Tensor) -> int:
    """torch's own count of one real pass, in multiply-adds."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(images)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("skip_unread", [False, True])
@pytest.mark.parametrize("place", ["before", "between"])
@pytest.mark.parametrize("name", ["deit", "dinov2_reg", "avg"])
def test_both_passes_are_counted_as_torch_counts_them(name, place, skip_unread):
    """The second pass adds exactly its products, and none that the first has already done."""
    model, images = lively(name, (2, 3), place=place, skip_unread=skip_unread), FAMILIES[name].images(4).double()
    counted(model, images)  # interpreters fold their matrices once
    first, second = counted(model, images), model.trace(images)[1].macs
    model.configure(second_look=1)
    again = model.trace(images)[1]
    added = [both - one for both, one in zip(again.macs, second, strict=True)]
    assert again.again == (True,) * 4 and len(set(added)) == 1
    assert counted(model, images) - first == sum(added)
    assert 0 < added[0] < again.dense_macs


@pytest.mark.parametrize("place", ["before", "between"])
def test_linear_counts_leave_out_the_products_of_both_passes(place):
    """A block of n tokens has 2 n^2 D multiply-adds in products: those blocks whose attention runs again have them again."""
    model = lively("deit", (2, 3), place=place)
    blocks = 2 if place == "before" else 1  # of four, from the third on; its attention is shared where patches go between its halves
    both, linear = (model.second_look_macs((32, 32), 16, products) for products in (True, False))
    assert both - linear == blocks * 2 * 17**2 * 32
    feed, attend = 8 * 17 * 32**2, 4 * 17 * 32**2
    assert linear == 2 * feed + blocks * attend + 32 * CLASSES


def test_the_report_counts_both_passes_both_ways():
    model = lively().float()
    batches = noise(8)
    once = evaluate(model, batches).reduced
    model.configure(second_look=1)
    twice = evaluate(model, batches).reduced
    assert (once.looked_again, twice.looked_again, twice.agreement) == (0, 100, 100)
    assert twice.macs - once.macs == pytest.approx(model.second_look_macs((32, 32), 16), abs=2)
    assert twice.macs_linear - once.macs_linear == pytest.approx(model.second_look_macs((32, 32), 16, products=False), abs=2)


@pytest.mark.parametrize("name", ["ours", "ours_gradient", "ours:1"])
def test_maps_are_made_without(name, monkeypatch):
    model = lively("deit", (1, 2, 3), place="between", on_drop="merge").float()
    monkeypatch.setattr(ReducedTransformer, "finish_dense", None)  # nobody looks again
    found = []
    for second_look in (0, 1):
        model.configure(second_look=second_look)
        explainer = find_explainer(name, model)
        found.append((explainer(FAMILIES["deit"].images(2)), explainer.forwards))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]
    assert interpreter_maps(model, FAMILIES["deit"].images(2)).shape == (2, 3, 4, 4)


def test_costs_add_up_group_by_group_and_image_by_image():
    model, images = lively(), FAMILIES["deit"].images(6).double()
    once = model.trace(images)[1]
    again_B = halved(model, images)
    trace = model.trace(images)[1]
    second = model.second_look_macs((32, 32), 16)
    assert trace.macs == tuple(macs + second * again for macs, again in zip(once.macs, again_B.tolist(), strict=True))
    told = explain(model, images)
    assert [one.macs_G[-1] for one in told] == list(trace.macs)
    assert [one.trace.again[0] for one in told] == again_B.tolist()
    likeliest = model(images).float().softmax(-1).max(-1)
    assert [one.predictions[0].index for one in told] == likeliest.indices.tolist()
    assert [one.predictions[0].probability for one in told] == pytest.approx(likeliest.values.tolist())
    both = concatenate([trace, trace.image(2)])
    assert both.again == (*trace.again, trace.again[2]) and both.cpu().again == both.again
    plain = replace(trace, again=())  # as made by hand
    assert plain.image(1).again == () and concatenate([plain, trace]).again == ((False,) * 6 + trace.again)


# ---- where there can be none -------------------------------------------------------------------------------


def test_no_classes_no_doubt():
    tower = reduce(FAMILIES["deit"].build(num_classes=0), 2).eval()
    for ask in (lambda: tower.configure(second_look=0.1), lambda: reduce(FAMILIES["deit"].build(num_classes=0), 2, second_look=0.1)):
        with pytest.raises(ConfigError, match="this model names no class to be unsure of"):
            ask()
    with pytest.raises(ConfigError, match="names no class to be unsure of"):
        Calibrator(tower, [FAMILIES["deit"].images(4)], second_look=0.25)
    with pytest.raises(ConfigError, match="names no class to be unsure of"):  # its answer is a row of logits for every token
        lively("tokens_out").configure(second_look=0.1)
    nameless = FAMILIES["deit"].build()
    del nameless.num_classes
    with pytest.raises(ConfigError, match="names no class to be unsure of"):
        reduce(nameless, 2, second_look=0.1)


@pytest.mark.parametrize(("classes", "pool"), [(0, None), (1, None), (7, None), (5, "")])
def test_another_classifier_has_other_margins(classes, pool, tmp_path):
    model, images = reduce(FAMILIES["deit"].build(), 2, second_look=1.0).eval(), FAMILIES["deit"].images(2)
    model.reset_classifier(classes, pool)
    assert model.config.second_look == 0 and len(model(images)) == 2
    model.threshold = 0.4
    model.save_pretrained(tmp_path / "m")
    assert model.trace(images)[1].again == (False, False)


def test_a_saved_second_look_does_not_keep_a_tower_from_its_interpreters(tmp_path):
    reduce(FAMILIES["deit"].build(), 2, second_look=0.3).save_pretrained(tmp_path / "m")
    assert iared2.load_reduced(tmp_path / "m", backbone=FAMILIES["deit"].build()).config.second_look == 0.3
    assert iared2.load_reduced(tmp_path / "m", backbone=FAMILIES["deit"].build(num_classes=0)).config.second_look == 0


def test_reducers_of_others_are_left_alone():
    model, images = reduce(FAMILIES["deit"].build(), (1, 2)).eval(), FAMILIES["deit"].images(4)
    with_reducers(model, [AttentionReducer(TopK(ratio), "discard", 32) for ratio in (0.5, 0.25)])
    once = model.trace(images)[1]
    model.configure(second_look=margin_for(model, [images], 0.5))
    twice = model.trace(images)[1]
    assert torch.equal(once.keep_GBN, twice.keep_GBN) and sum(twice.again) == 2


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan"), "often"])
def test_other_margins_are_refused(value):
    with pytest.raises(ConfigError, match="second_look"):
        lively().configure(second_look=value)


def test_a_graph_chooses_no_pictures(tmp_path):
    model = reduce(FAMILIES["deit"].build(), 2, rule="top_k", ratios=(0.7, 0.4), second_look=0.2)
    with pytest.raises(ConfigError, match=r"got second_look=0\.2, but a graph cannot choose pictures"):
        export_onnx(model, tmp_path / "model.onnx")


@pytest.mark.untyped
def test_compiled_it_answers_alike():
    torch._dynamo.reset()
    model = lively(**LATEST, skip_unread=True).float()
    many = FAMILIES["deit"].images(12)
    halved(model, many)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        counts = set()
        for count in (8, 5, 12, 1, 7):
            torch.testing.assert_close(compiled(many[:count]), model(many[:count]))
            counts.add(sum(model.trace(many[:count])[1].again))
    assert len(counts) > 2
    torch._dynamo.reset()


# ---- calibration -------------------------------------------------------------------------------------------


def untrained() -> ReducedTransformer:
    torch.manual_seed(0)
    return iared2.reduce(FAMILIES["deit"].build(), (1, 2, 3), **LATEST).eval()


@pytest.mark.parametrize(("share", "again"), [(0.85, 0.25), (0.9, 0.125), (0.8, 0.0)])
def test_the_budget_pays_for_second_looks(share, again):
    model, images = untrained(), FAMILIES["deit"].images(64)
    found = Calibrator(model, list(images.split(16)), second_look=again).to_share(share)
    assert found.share == pytest.approx(share, abs=0.02) and found.again == pytest.approx(100 * again)
    _, trace = model.trace(images)
    assert sum(trace.again) == 64 * again and trace.share_of_dense() == pytest.approx(found.share)
    answers, once = model(images).argmax(1), model.logits(images)
    unsure = set(margin(once).argsort()[: round(64 * again)].tolist())
    assert {index for index, twice in enumerate(trace.again) if twice} == unsure
    assert found.agreement == pytest.approx(100 * (answers == model.backbone(images).argmax(1)).double().mean().item())
    assert ("25.0 % looked at again" in found.line()) == (again == 0.25)


def test_a_new_calibration_decides_anew():
    model, images = untrained(), list(FAMILIES["deit"].images(32).split(16))
    Calibrator(model, images, second_look=0.25).to_share(0.85)
    assert model.config.second_look > 0
    assert Calibrator(model, images).to_share(0.8).again == model.config.second_look == 0


def test_an_allowed_disagreement_is_cheaper_with_second_looks():
    """What is unsure is passed again, so the others may be reduced further."""
    images = list(FAMILIES["deit"].images(64).split(16))
    with_dense = Calibrator(untrained(), images, second_look=0.25).to_disagreement(5)
    assert 100 - with_dense.agreement <= 5 and with_dense.again == 25


def test_budgets_below_what_second_looks_leave_are_refused():
    calibrator = Calibrator(untrained(), [FAMILIES["deit"].images(16)], second_look=0.5)
    floor = calibrator.share_of((0.001, 0.001, 0.001))
    with pytest.raises(ConfigError, match="name a budget in between"):
        calibrator.to_share(floor - 0.05)


@pytest.mark.parametrize(("share", "again"), [(0.0, 0), (0.05, 1), (0.5, 8), (0.94, 15)])
def test_margins_for_shares(share, again):
    model, images = untrained(), FAMILIES["deit"].images(16)
    model.configure(second_look=margin_for(model, [images], share))
    assert sum(model.trace(images)[1].again) == again


@pytest.mark.parametrize(
    ("share", "said"), [(0.01, "which is none of 16"), (0.99, "which is all of 16"), (float("nan"), "from 0 to below 1")]
)
def test_shares_that_are_none_or_all_of_the_pictures(share, said):
    for ask in (margin_for, lambda model, images, share: Calibrator(model, images, second_look=share)):
        with pytest.raises(ConfigError, match=said):
            ask(untrained(), [FAMILIES["deit"].images(16)], share)


def test_margins_that_are_level_are_not_divided(caplog):
    """Of copies either all are looked at again or none; where more would be than asked for, none; and it is said."""
    model, one = untrained(), FAMILIES["deit"].images(4)
    order = margin(model(one)).argsort()
    images = one[order][[0, 1, 2, 2, 2, 2, 2, 3]]
    model.configure(second_look=margin_for(model, [images], 0.5))
    assert sum(model.trace(images)[1].again) == 2
    copies = [one[:1].expand(16, -1, -1, -1)]
    assert Calibrator(model, copies, second_look=0.5).to_share(0.95).again == 0
    assert "asked for a second look at 50.0 % of the pictures, and it is 0.0 %" in caplog.text


def test_schedules_are_searched_by_what_they_cost_with_second_looks():
    calibrator = Calibrator(untrained(), list(FAMILIES["deit"].images(32).split(16)), second_look=0.25)
    plain = Calibrator(untrained(), calibrator.batches)
    ratios = (0.8, 0.5, 0.2)
    second = calibrator.model.second_look_macs((32, 32), 16) / calibrator.dense_macs
    assert calibrator.share_of(ratios) - plain.share_of(ratios) == pytest.approx(0.25 * second)


def test_the_margin_is_that_of_the_schedule_that_was_chosen():
    """Not that of the last one tried."""
    calibrator = Calibrator(untrained(), list(FAMILIES["deit"].images(64).split(16)), second_look=0.25)
    family = calibrator.family()
    first = calibrator.at(family, 0.5)
    left = calibrator.model.config.second_look
    calibrator.at(family, 3.0)
    assert calibrator.model.config.second_look != left
    calibrator._use(first)
    assert calibrator.model.config.second_look == left and calibrator.measure() == first
    timed = calibrator.to_milliseconds(calibrator._time(), nearest=True)
    assert calibrator.model.config.second_look == margin_for(calibrator.model, calibrator.batches, 0.25) and timed.again == 25


def test_too_many_second_looks_are_named_as_the_reason():
    calibrator = Calibrator(untrained(), [FAMILIES["deit"].images(16)], second_look=0.75)
    with pytest.raises(
        ConfigError, match=r"second looks at 75\.0% of the pictures, 0\.\d\dx of the dense model, are among it: ask for fewer"
    ):
        calibrator.to_share(0.4)
    with pytest.raises(ConfigError, match=r"which costs 1.* of the dense model with 93.8 % of the pictures looked at again"):
        Calibrator(untrained(), [FAMILIES["deit"].images(16)], second_look=0.94).to_disagreement(0)


def test_walks_are_paid_for_without_second_looks(monkeypatch, tmp_path):
    """The budget minus what second looks cost is what a first pass may cost while it is trained."""
    seen = []
    monkeypatch.setattr(budget, "_stages", lambda *given: seen.append(given[3]) or [])
    monkeypatch.setattr(budget.Trainer, "fit", lambda *_: None)
    batches = noise(16)
    feeds = Feeds(train=batches, held_out=batches)
    settings = TogetherSettings(target="0.85x", second_look=0.25, blocks=(1, 2, 3))
    model = budget.reduced_for(settings, FAMILIES["deit"].build())
    outcome = budget.train_together(settings, model, feeds, RunSettings(tmp_path, "none"), Accelerator(cpu=True))
    second = 0.25 * model.second_look_macs((32, 32), 16) / dense_macs(model.adapter, 32, 32)
    assert seen == [pytest.approx(0.85 - second)]
    assert outcome.expected.again == 25 and outcome.expected.share == pytest.approx(0.85, abs=0.03)


@pytest.mark.parametrize("share", ["-0.1", "1", "2", "nan"])
def test_wrong_shares_end_in_one_line(share, tmp_path, capsys):
    wish = ["--data", str(tmp_path), "-o", str(tmp_path / "o"), "--target-macs", "0.7x", "--second-look", share]
    assert main(["calibrate", *wish]) == 2
    assert "--second-look: got" in (said := " ".join(capsys.readouterr().err.split())) and "wanted a share of the pictures" in said


# ---- commands ----------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path):
    """A folder of labelled pictures, and weights of a tiny ViT whose answers differ."""
    from PIL import Image

    draw, folder = torch.Generator().manual_seed(0), tmp_path / "photos"
    folder.mkdir()
    for index in range(24):
        coarse = torch.randint(0, 255, (5, 6, 3), dtype=torch.uint8, generator=draw)
        Image.fromarray(coarse.numpy()).resize((48, 40)).save(folder / f"{index}.png")
    (folder / "labels.csv").write_text("file,class_index\n" + "".join(f"{index}.png,{index}\n" for index in range(24)))
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit", num_classes=1000).state_dict(), tmp_path / "weights.safetensors")
    return folder


@pytest.mark.untyped
def test_from_training_to_eval_and_explain(photos, tmp_path, capsys, caplog):
    weights, out = ["--weights", str(tmp_path / "weights.safetensors")], tmp_path / "out"
    small = ["data.batch_size=8", "data.held_out=8", "together.walk_epochs=0", "together.second_look=0.25"]
    quiet = ["--device", "cpu", "--workers", "0", "--dtype", "float32"]
    named = ["--target-macs", "0.85x", "--data", str(photos), "--model", "test_vit", "-o", str(out)]
    assert main(["train", *named, *weights, *quiet, *small]) == 0
    assert "25.0 % looked at again" in " ".join(caplog.text.split())
    saved = iared2.load_reduced(out, weights=tmp_path / "weights.safetensors")
    assert 0 < saved.config.second_look < 1
    wish = ["--target-macs", "0.9x", "--second-look", "0.25", "-o", str(tmp_path / "c")]
    assert main(["calibrate", "--model", str(out), "--data", str(photos), *wish, *weights, *quiet]) == 0
    assert "25.0 % looked at again" in capsys.readouterr().out
    report = tmp_path / "report.json"
    assert main(["eval", "--model", str(tmp_path / "c"), "--data", str(photos), "--json", str(report), *weights, *quiet]) == 0
    told = json.loads(report.read_text())
    assert (
        told["settings"]["second_look"] == iared2.load_reduced(tmp_path / "c", weights=tmp_path / "weights.safetensors").config.second_look
    )
    row = told["rows"][1]
    assert row["looked_again"] == 25 and row["macs_share"] == pytest.approx(0.9, abs=0.02)
    assert "25.0 % of the images were looked at again" in " ".join(capsys.readouterr().out.split())
    shown = tmp_path / "shown"
    assert main(["explain", "--photos", str(photos), "-o", str(shown), "--model", str(tmp_path / "c"), *weights, *quiet]) == 0
    records = json.loads((shown / "manifest.json").read_text())["photos"]
    twice = [one for one in records if one["looked_again"]]
    assert 0 < len(twice) < len(records) == 24 and all(any("with nothing dropped" in note for note in one["notes"]) for one in twice)
    assert not any("with nothing dropped" in note for one in records if not one["looked_again"] for note in one["notes"])
    assert all(one["groups"][-1]["macs"] == one["macs"] for one in records)


def test_the_margin_is_saved(tmp_path):
    model = reduce(FAMILIES["deit"].build(num_classes=CLASSES), 2, second_look=0.125)
    model.save_pretrained(tmp_path / "m")
    assert iared2.load_reduced(tmp_path / "m", backbone=FAMILIES["deit"].build(num_classes=CLASSES)).config.second_look == 0.125
