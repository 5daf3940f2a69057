"""Budgets from words, schedules that meet them, thresholds that meet schedules, and what a user sees of it."""

import json
import shutil
from dataclasses import replace

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

import iared2
from families import FAMILIES
from iared2.budget import CURVE, CURVE_IN_PAIRS, CURVE_OF_THE_GONE, Budget, curve, parse_budget, powered, solve_power
from iared2.cli import main
from iared2.errors import ConfigError, DataError
from iared2.evaluate.calibrate import Calibrator, _boundary
from iared2.interpreter import InterpreterConfig
from iared2.train.budget import reduced_for
from iared2.train.feeds import open_feeds
from iared2.train.recipes import find_recipe
from iared2.train.together_settings import TogetherSettings
from iared2.worth import WorthConfig


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("0.65x", "share", 0.65),
        ("65%", "share", 0.65),
        (" 0.8 G ", "macs", 0.8e9),
        ("800MMACs", "macs", 0.8e9),
        ("9ms", "ms", 9),
        (".5x", "share", 0.5),
    ],
)
def test_budgets_from_words(text, kind, value):
    found = parse_budget(text)
    assert (found.kind, found.value) == (kind, pytest.approx(value))


@pytest.mark.parametrize("text", ["", "0.65", "fast", "-1x", "0x", "1.2.3G", "nanx", "0.5 y"])
def test_other_words_are_answered_with_the_right_ones(text):
    with pytest.raises(ConfigError, match=r"wanted a share of the dense model's multiply-adds \(0.65x or 65%\)"):
        parse_budget(text)


def test_a_budget_of_the_dense_model_or_more_is_refused():
    assert Budget("macs", 0.5e9).share(10**9) == 0.5
    for budget in (Budget("share", 1.0), Budget("macs", 2e9)):
        with pytest.raises(ConfigError, match="wanted less than 1"):
            budget.share(10**9)


@pytest.mark.parametrize("depth", [4, 12, 24, 40])
@pytest.mark.parametrize("between", [False, True])
@pytest.mark.parametrize("how", [(True, False), (False, False), (False, True)])
def test_the_curve_falls_with_depth(depth, between, how):
    ratios = curve(depth, range(1, depth), between, *how)
    assert all(1 >= a >= b > 0 for a, b in zip(ratios[:-1], ratios[1:], strict=True))


def test_what_is_gone_for_good_goes_at_once():
    """At one cost, the plain schedules without a hand-over leave less after the first reduction and more after the last."""

    def ratios(*how):
        plain = curve(12, (1, 3, 5, 7, 9), True, *how)
        return powered(plain, solve_power(lambda ratios: (2 + 2 * sum(ratios)) / 12, plain, 0.6))  # each reduction holds for two blocks

    carried, gone, paired = ratios(True), ratios(False), ratios(False, True)
    assert gone[0] < paired[0] < carried[0] and gone[-1] > paired[-1] > carried[-1]


def test_crowds_are_thinned_first_and_most_goes_when_evidence_is_known():
    """In pairs little goes in block 1, most in block 3 and little afterwards."""
    blocks = (1, 3, 5, 7, 9)
    carried, gone, paired = (curve(12, blocks, True, *how) for how in ((True, False), (False, False), (False, True)))
    steps = [before - after for before, after in zip((1.0, *paired), paired, strict=False)]
    assert max(steps) == steps[1] and steps[0] > sum(steps[2:])
    assert carried[0] > paired[0] > gone[0] and carried[1] > paired[1]
    assert curve(12, blocks, True, True, True) == carried  # a hand-over counts for crowds, whatever pairs say


@pytest.mark.parametrize("between", [False, True])
def test_discarding_can_begin_at_the_first_block(between):
    assert all(ratio < 1 for ratio in curve(12, range(12), between, False, True))


@pytest.mark.parametrize(
    ("on_drop", "pairs", "wanted"),
    [
        ("merge", None, CURVE),
        ("merge", True, CURVE),
        ("fuse", None, CURVE_OF_THE_GONE),
        ("fuse", True, CURVE_OF_THE_GONE),
        ("discard", False, CURVE_OF_THE_GONE),
        ("discard", None, CURVE_OF_THE_GONE),
        ("discard", True, CURVE_IN_PAIRS),
    ],
)
def test_the_plain_schedule_follows_what_becomes_of_patches(on_drop, pairs, wanted):
    reduced = model(on_drop=on_drop, worth=WorthConfig(pairs=pairs))
    places = [12 * (block + 1) // reduced.adapter.depth for block in reduced.config.first_blocks]
    assert calibrator(reduced).plain_curve() == pytest.approx([wanted[place] for place in places])


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, (3, 4, 5, 7, 9)),
        ({"on_drop": "fuse"}, (3, 4, 5, 7, 9)),
        ({"worth": WorthConfig(pairs=True)}, (3, 4, 5, 7, 9)),
        ({"on_drop": "fuse", "worth": WorthConfig(pairs=True)}, (3, 4, 5, 7, 9)),
        ({"on_drop": "discard"}, (1, 3, 5, 7, 9)),
        ({"on_drop": "discard", "worth": WorthConfig(pairs=True, comparing=5)}, (1, 3, 5, 7, 9)),
        ({"on_drop": "discard", "worth": WorthConfig(pairs=False)}, (3, 4, 5, 7, 9)),
        ({"on_drop": "discard", "worth": None}, (3, 4, 5, 7, 9)),
        ({"on_drop": "discard", "blocks": (4, 8)}, (4, 8)),
    ],
)
def test_crowds_are_thinned_early_where_what_is_dropped_is_gone(settings, wanted):
    backbone = timm.create_model("deit_tiny_patch16_224", img_size=32)
    assert reduced_for(TogetherSettings(**settings), backbone).config.first_blocks == wanted


@given(st.floats(0.35, 0.95))
def test_the_power_found_costs_what_was_asked(share):
    def cost(ratios):
        return 0.3 + 0.7 * sum(r * r for r in ratios) / 3

    power = solve_power(cost, (0.9, 0.6, 0.3), share)
    assert cost(powered((0.9, 0.6, 0.3), power)) == pytest.approx(share, abs=1e-6)


def test_a_power_out_of_reach_names_what_can_be_had():
    with pytest.raises(ConfigError, match=r"got 0\.20x, but reducing at these blocks costs between 0\.30x and 1\.00x"):
        solve_power(lambda ratios: 0.3 + 0.7 * ratios[-1], (0.5,), 0.2)


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=20, unique=True), st.integers(0, 20))
def test_a_boundary_keeps_as_many_as_asked(chances, keep):
    chance_P = torch.tensor(chances, dtype=torch.float64)
    assert (chance_P > _boundary(chance_P, keep)).sum() == min(keep, len(chances))


def model(seed: int = 0, **settings) -> iared2.ReducedTransformer:
    torch.manual_seed(seed)
    interpreter = InterpreterConfig(policy="class", context=True, init_score=0.3)
    parts = {"place": "between", "worth": WorthConfig(), "on_drop": "merge"} | settings
    return iared2.reduce(FAMILIES["deit"].build(), (1, 2, 3), interpreter=interpreter, **parts).eval()


def calibrator(reduced: iared2.ReducedTransformer, count: int = 64) -> Calibrator:
    return Calibrator(reduced, list(FAMILIES["deit"].images(count).split(16)))


@pytest.mark.parametrize("worth", [None, WorthConfig()])
def test_thresholds_leave_the_shares_that_were_asked_for(worth):
    reduced = model(worth=worth)
    thresholds = calibrator(reduced).thresholds_for((0.8, 0.5, 0.2))
    assert len(thresholds) == 3 and reduced.threshold == thresholds
    found = calibrator(reduced).measure()
    assert found.ratios == pytest.approx((0.8, 0.5, 0.2), abs=0.005)
    _, trace = reduced.trace(FAMILIES["deit"].images(64))
    assert trace.keep_ratio[:, 2].std() > 0.01  # the shares hold on average, not in each picture


@pytest.mark.parametrize("share", [0.85, 0.7, 0.62])
def test_the_budget_is_met_and_what_is_expected_is_what_happens(share):
    reduced = model()
    expected = calibrator(reduced).to_share(share)
    assert expected.share == pytest.approx(share, abs=0.02)
    images = FAMILIES["deit"].images(64)
    with torch.no_grad():
        logits, trace = reduced.trace(images)
        agree = (logits.argmax(1) == reduced.backbone(images).argmax(1)).float().mean()
    assert trace.share_of_dense() == pytest.approx(expected.share, abs=1e-6)
    assert expected.agreement == pytest.approx(100 * agree.item(), abs=1e-3)
    assert expected.slope <= 0 and expected.pictures == 64


def test_settled_thresholds_are_one_half_and_answers_stay():
    reduced, images = model(), FAMILIES["deit"].images(20)
    found = calibrator(reduced)
    found.to_share(0.7)
    before = reduced(images)
    found.settle()
    assert reduced.threshold == 0.5
    torch.testing.assert_close(reduced(images), before)


def test_settling_takes_thresholds_off_the_knife_edge():
    """Where nearly all chances lie at 1, thresholds that divide them do too, and 0.01 more drops nearly everything."""
    reduced = model(worth=WorthConfig())
    for reducer in reduced.reducers:
        reducer.worth.offset.data.fill_(-3.0)
    found = calibrator(reduced)
    found.at(found.plain_curve(), 1.0)  # thresholds that tell more than those that keep everything
    sharp = found.to_share(0.7)
    settled = found.settled(lambda: sharp)
    assert sharp.slope < -0.1 and settled.slope > -0.02
    assert settled.thresholds == (0.5,) * len(reduced.reducers)
    assert settled.share == pytest.approx(sharp.share, abs=0.002) and settled.agreement == pytest.approx(sharp.agreement, abs=2)


def test_where_chances_are_told_apart_no_more_the_budget_is_met_all_the_same():
    reduced = model(worth=WorthConfig())
    for reducer in reduced.reducers:
        reducer.worth.offset.data.fill_(-5.0)
    found = calibrator(reduced)
    found.at(found.plain_curve(), 1.0)
    settled = found.settled(lambda: found.to_share(0.7))
    assert settled.share == pytest.approx(0.7, abs=0.01) and settled.slope > -0.02 and settled.thresholds == (0.5,) * 3


def test_settling_keeps_what_was_met():
    without = calibrator(model(worth=None))
    met = without.to_share(0.7)
    assert without.settled(lambda: met) == met  # nothing to move
    again = Calibrator(model(), list(FAMILIES["deit"].images(64).split(16)), second_look=0.25)
    settled = again.settled(lambda: replace(again.to_share(0.8), milliseconds=3.0))
    assert settled.milliseconds == 3.0 and settled.again == pytest.approx(25) and settled.share == pytest.approx(0.8, abs=0.02)


def test_a_disagreement_is_kept_to_as_cheaply_as_can_be():
    reduced = model()
    strict, loose = (calibrator(reduced).to_disagreement(allowed) for allowed in (5.0, 40.0))
    assert strict.agreement >= 95.0 and loose.agreement >= 60.0
    assert loose.share < strict.share


def test_a_time_is_measured_and_one_out_of_reach_is_refused():
    found = calibrator(model())
    with pytest.raises(ConfigError, match=r"got 1e\+06 ms per image, but this model takes between"):
        found.to_milliseconds(1e6)


def test_a_time_is_met_by_thresholds_that_take_it(monkeypatch, caplog):
    """Time is what the multiply-adds would take, so the thresholds found have to have the share of the dense cost that was asked for."""
    found = calibrator(model())

    monkeypatch.setattr(Calibrator, "_time", lambda self: 10 * self.measure().share)
    expected = found.to_milliseconds(7.0)
    assert expected.milliseconds == pytest.approx(7.0, abs=0.2) and expected.share == pytest.approx(0.7, abs=0.02)
    assert expected.line().startswith(f"{expected.share:.3f} of the dense multiply-adds, {expected.milliseconds:.2f} ms per image")
    assert "nearer" not in caplog.text

    monkeypatch.setattr(Calibrator, "_time", lambda self: 10.0 if self.measure().share > 0.6 else 5.0)
    for wanted, nearest in ((6.0, 5.0), (9.0, 10.0)):
        expected = found.to_milliseconds(wanted)
        assert expected.milliseconds == nearest and found.measure().share == pytest.approx(expected.share)
        assert f"asked for {wanted:.2f} ms per image, found no thresholds nearer than {nearest:.2f} ms" in caplog.text


def test_the_time_told_is_measured_once_more(monkeypatch):
    """The nearest of several noisy times is nearer than it is."""
    times = iter([10.0, 5.0, *[7.0] * 7, 8.0])
    found = calibrator(model())
    monkeypatch.setattr(Calibrator, "_time", lambda _: next(times))
    assert found.to_milliseconds(7.0).milliseconds == 8.0


def test_after_a_training_what_comes_nearest_is_taken(monkeypatch, caplog):
    found = calibrator(model())
    monkeypatch.setattr(Calibrator, "_time", lambda self: 10 * self.measure().share)
    expected = found.meet(Budget("ms", 20.0), nearest=True)
    assert expected.milliseconds == pytest.approx(10 * expected.share) and expected.share > 0.99
    assert "asked for 20.00 ms per image, found no thresholds nearer than" in caplog.text
    with pytest.raises(ConfigError, match="costs between"):
        found.meet(Budget("share", 0.05))
    expected = found.meet(Budget("share", 0.05), nearest=True)
    assert expected.share == pytest.approx(found.at(found.plain_curve(), 12.0).share, abs=0.01)
    assert "asked for 0.050 of the dense multiply-adds, found no thresholds nearer than" in caplog.text


def test_scores_that_are_not_numbers_have_no_threshold():
    reduced = model()
    torch.nn.init.constant_(reduced.reducers[1].worth.offset, float("nan"))
    with pytest.raises(ConfigError, match="an interpreter scores NaN or infinity"):
        calibrator(reduced).thresholds_for((0.8, 0.5, 0.2))


def test_a_model_without_a_classifier_is_measured_by_the_cosine():
    backbone = FAMILIES["dinov2_reg"].build(num_classes=0)
    reduced = iared2.reduce(backbone, (1, 2, 3), place="between", worth=WorthConfig(), on_drop="merge").eval()
    expected = Calibrator(reduced, [FAMILIES["dinov2_reg"].images(16)]).to_share(0.9)
    assert 0 < expected.agreement <= 100 and expected.kl == 0


def test_nothing_to_calibrate_on_and_answers_that_are_not_numbers():
    reduced = model()
    with pytest.raises(DataError, match="no pictures to calibrate on"):
        Calibrator(reduced, [])
    torch.nn.init.constant_(reduced.backbone.head.bias, float("nan"))
    with pytest.raises(ConfigError, match="answers NaN or infinity"):
        calibrator(reduced)


# ---- the commands ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A plain folder of pictures, some in a sub-folder, and weights of a tiny ViT."""
    root = tmp_path_factory.mktemp("plain")
    draw = torch.Generator().manual_seed(0)
    (root / "photos" / "more").mkdir(parents=True)
    for index in range(24):
        coarse = torch.randint(0, 255, (5, 6, 3), dtype=torch.uint8, generator=draw)
        place = root / "photos" / ("more" if index % 3 == 0 else "")
        Image.fromarray(coarse.numpy()).resize((48, 40)).save(place / f"{index}.png")
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit", num_classes=1000).state_dict(), root / "weights.safetensors")
    return root


def command(plain, *more: str, target: str = "0.7x") -> list[str]:
    named = ["--model", "test_vit", "--weights", str(plain / "weights.safetensors"), "--data", str(plain / "photos")]
    return ["train", "--target-macs", target, *named, "--device", "cpu", "--workers", "0", "--dtype", "float32", *more]


def without_weights(arguments: list[str]) -> list[str]:
    at = arguments.index("--weights")
    return arguments[:at] + arguments[at + 2 :]


def test_settings_may_begin_with_two_hyphens_where_no_recipe_is_named(plain, tmp_path, capsys):
    assert main(command(plain, "-o", str(tmp_path / "out"), "--together.walk_epoch=0")) == 2
    assert "did you mean 'walk_epochs'" in " ".join(capsys.readouterr().err.split())
    assert main(["train", "--nonsense"]) == 2
    assert "Unknown option: --nonsense" in capsys.readouterr().err


SMALL = ("data.held_out=8", "data.held_out_share=1", "data.batch_size=4", "data.views=1")


def test_a_training_for_a_time_that_cannot_be_had_any_more_is_saved_all_the_same(plain, tmp_path, monkeypatch, caplog):
    """On a machine that is busier after the training than before it."""
    speed = iter([1.0] * 10)  # of the timings in front of the training: both ends, seven in between, and once more the best
    monkeypatch.setattr(Calibrator, "_time", lambda self: 10 * self.measure().share / next(speed, 0.1))
    out = tmp_path / "out"
    assert main(command(plain, "-o", str(out), "together.walk_epochs=0", *SMALL, target="7ms")) == 0
    text = " ".join(caplog.text.split())
    assert "asked for 7.00 ms per image, found no thresholds nearer than" in text
    assert iared2.load_reduced(out, weights=plain / "weights.safetensors").config.rule == "threshold"


@pytest.mark.untyped
def test_fine_tuned_blocks_go_as_far_as_asked(plain, tmp_path):
    """And a run that is given again after its end goes no further."""

    def trained(folder: str, *more: str) -> dict[str, torch.Tensor]:
        assert main(command(plain, "-o", str(tmp_path / folder), *BLOCKS_ALONE, *SMALL, *more)) == 0
        return dict(iared2.load_reduced(tmp_path / folder).backbone.named_parameters())

    old = load_file(plain / "weights.safetensors")
    whole, half = trained("whole"), trained("half", "together.block_share=0.5")
    moved = [name for name in whole if not torch.equal(whole[name], old[name])]
    assert moved and all(name.startswith(("blocks.", "norm.", "head.", "fc_norm.")) for name in moved)
    for name in whole:
        torch.testing.assert_close(half[name], (old[name] + whole[name]) / 2)
    assert all(torch.equal(value, half[name]) for name, value in trained("half", "together.block_share=0.5").items())


@pytest.mark.untyped
def test_what_is_fine_tuned_and_by_what_are_settings(plain, tmp_path, caplog):
    """Labels reach the blocks, and only the blocks asked for."""
    folder = tmp_path / "labelled"
    shutil.copytree(plain / "photos", folder)
    files = sorted(file.name for file in folder.glob("*.png"))
    (folder / "labels.csv").write_text("file,class_index\n" + "".join(f"{file},{i}\n" for i, file in enumerate(files)))
    how = ("together.imitation_epochs=0", "together.walk_epochs=0", "together.block_epochs=1", "together.block_target=label")
    what = ("data.labels=true", "together.block_first=4", "together.train_head=false", "together.block_optim.lr=1e-2")
    arguments = command(plain, "-o", str(tmp_path / "out"), *how, *what, *SMALL)
    arguments[arguments.index("--data") + 1] = str(folder)
    assert main(arguments) == 0
    assert " ".join(caplog.text.split()).count("accuracy") > 0  # of labels: nobody else is asked
    old, new = load_file(plain / "weights.safetensors"), dict(iared2.load_reduced(tmp_path / "out").backbone.named_parameters())
    moved = {name.split(".")[0] + "." + name.split(".")[1] for name in new if not torch.equal(new[name], old[name])}
    assert moved == {f"blocks.{block}" for block in range(4, max(int(n.split(".")[1]) for n in new if n.startswith("blocks.")) + 1)}


@pytest.mark.untyped
def test_a_plain_folder_and_a_budget_make_a_model_that_eval_takes(plain, tmp_path, caplog, capsys):
    out = tmp_path / "out"
    assert main(command(plain, "-o", str(out), "together.walk_epochs=1", "together.block_epochs=1", *SMALL)) == 0
    text = " ".join(caplog.text.split())
    assert "MACs agree with dense KL to dense patches left" in text and "reached: 0." in text
    reduced = iared2.load_reduced(out)  # its blocks were trained, so the weights are in it
    assert reduced.config.place == "between" and reduced.threshold == 0.5
    assert (reduced.config.similarity, reduced.config.weights, reduced.config.keep_length) == ("tokens", "score", True)
    assert "chosen on 8 pictures: other pictures may cost and answer otherwise" in text
    labelled = tmp_path / "labelled"
    labelled.mkdir()
    files = sorted((plain / "photos").glob("*.png"))
    for file in files:
        (labelled / file.name).write_bytes(file.read_bytes())
    (labelled / "labels.csv").write_text("file,class_index\n" + "".join(f"{file.name},{i}\n" for i, file in enumerate(files)))
    report = tmp_path / "report.json"
    assert main(["eval", "--model", str(out), "--data", str(labelled), "--json", str(report), "--workers", "0"]) == 0
    share = json.loads(report.read_text())["rows"][1]["macs_share"]
    assert share == pytest.approx(0.7, abs=0.05)  # other pictures than those it was calibrated on
    wish = ["--target-macs", "0.8x", "-o", str(tmp_path / "c"), "--workers", "0"]
    assert main(["calibrate", "--model", str(out), "--data", str(plain / "photos"), *wish]) == 0
    said = capsys.readouterr()
    assert "of the dense multiply-adds" in said.out and "a few hundred are wanted" in " ".join(said.err.split())
    again = iared2.load_reduced(tmp_path / "c")
    assert again.threshold == 0.5  # settled: what differs is what chances are measured from
    assert all(not torch.equal(one.worth.offset, other.worth.offset) for one, other in zip(again.reducers, reduced.reducers, strict=True))


BLOCKS_ALONE = ("together.imitation_epochs=0", "together.walk_epochs=0", "together.block_epochs=1", "together.block_optim.lr=1e-2")


@pytest.mark.untyped
def test_a_training_goes_on_from_a_reduced_model(plain, tmp_path):
    """Its interpreters, settings and, where it has one, trained backbone; what is not trained stays, and so does its own schedule."""
    backbone = timm.create_model("test_vit", num_classes=1000)
    backbone.load_state_dict(load_file(plain / "weights.safetensors"))
    torch.manual_seed(1)
    first = iared2.reduce(backbone, (1, 3), interpreter=InterpreterConfig(policy="class"), on_drop="fuse").eval()
    for reducer in first.reducers:
        torch.nn.init.normal_(reducer.interpreter.query.weight, std=0.3)
    first.save_pretrained(tmp_path / "first")
    assert main(command(plain, "-o", str(tmp_path / "second"), "--start", str(tmp_path / "first"), *BLOCKS_ALONE, *SMALL)) == 0
    more = ("--start", str(tmp_path / "second"), "together.block_first=4", "together.train_head=false")
    assert main(without_weights(command(plain, "-o", str(tmp_path / "third"), *more, *BLOCKS_ALONE, *SMALL))) == 0
    second, third = (iared2.load_reduced(tmp_path / name) for name in ("second", "third"))  # trained blocks are in them
    kept = {"first_blocks": (1, 3), "place": "before", "on_drop": "fuse", "worth": None, "similarity": "keys", "skip_unread": True}
    for model in (second, third):
        assert {key: getattr(model.config, key) for key in kept} == kept
        assert all(torch.equal(value, first.reducers.state_dict()[key]) for key, value in model.reducers.state_dict().items())
    named = dict(second.backbone.named_parameters())
    assert not torch.equal(named["blocks.3.mlp.fc1.weight"], backbone.blocks[3].mlp.fc1.weight)
    moved = {name for name, value in third.backbone.named_parameters() if not torch.equal(value, named[name])}
    assert moved and all(int(name.split(".")[1]) >= 4 for name in moved)


@pytest.mark.untyped
def test_interpreters_that_go_on_do_not_begin_anew(plain, tmp_path):
    """Trained with steps of next to nothing they are still those of the start; and its own backbone is saved though nobody trained it."""
    assert main(command(plain, "-o", str(tmp_path / "first"), *BLOCKS_ALONE, *SMALL)) == 0
    more = ("--start", str(tmp_path / "first"), "together.imitation_optim.lr=1e-9", "together.walk_epochs=0", *SMALL)
    assert main(without_weights(command(plain, "-o", str(tmp_path / "second"), *more))) == 0
    first, second = (iared2.load_reduced(tmp_path / name) for name in ("first", "second"))
    assert all(torch.equal(a, b) for a, b in zip(first.backbone.parameters(), second.backbone.parameters(), strict=True))
    for (name, old), new in zip(first.reducers.state_dict().items(), second.reducers.state_dict().values(), strict=True):
        # Offsets are where thresholds lie: those of this budget, on these pictures.
        assert torch.allclose(old, new, atol=0.2 if "offset" in name else 1e-5), name


@pytest.mark.untyped
def test_the_embedded_models_weights_are_found_in_the_package(plain, tmp_path):
    wish = ["--target-macs", "0.7x", "-o", str(tmp_path), "--workers", "0", "--device", "cpu", "together.walk_epochs=0", *SMALL]
    former = ["together.similarity=keys", "together.weights=mass", "together.keep_length=false"]
    assert main(["train", "--model", "iared2_mini_patch8_96", "--data", str(plain / "photos"), *wish, *former]) == 0
    config = iared2.load_reduced(tmp_path).config
    assert (config.similarity, config.weights, config.keep_length) == ("keys", "mass", False)
    assert not (tmp_path / "backbone.safetensors").exists()
    mine, embedded = (iared2.load_reduced(name).backbone.state_dict() for name in (tmp_path, "iared2_mini_patch8_96"))
    assert all(torch.equal(mine[key], embedded[key]) for key in embedded)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("target", "more", "message"),
    [
        ("0.01x", (), "budget: got 0.01x, but reducing at these blocks costs between"),
        ("1.5x", (), "wanted less than 1"),
        ("soon", (), "together.target: budget: got 'soon', wanted a share"),
        ("0.7x", ("together.walk.labels=true", "together.walk_epochs=1"), "together.walk.labels needs labels; give labelled data"),
        ("0.7x", ("together.block_target=label", "together.block_epochs=1"), "together.block_target=label needs labels; give labelled"),
        ("0.7x", ("together.block_first=99", "together.block_epochs=1"), "together.block_first: got 99"),
        ("0.7x", ("together.block_target=label", "together.train_head=false"), "so block_target, train_head would do nothing; set"),
        ("0.7x", ("together.walk_epochs=0", "together.walk.labels=true"), "walk_epochs: got 0, so walk.labels would do nothing; set"),
        ("0.7x", ("data.flip=true",), "together.remember: needs pictures without augmentation"),
        ("0.7x", ("--start=iared2_mini_patch8_96", "together.place=between"), "with its own settings; leave out together.place"),
        ("0.7x", ("--start=iared2_mini_patch8_96", "together.worth.mass=false"), "with its own worth; leave worth out, or the start"),
        ("0.7x", ("--start=iared2_mini_patch8_96", 'backbone.arguments={"depth": 3}'), "brings its own backbone; leave out backbone.arg"),
        ("0.7x", ('together={"start": "nowhere"}',), "model 'nowhere': not embedded"),
        ("0.7x", ("--start=",), "together.start: String should have at least 1 character"),
        ("0.7x", ("--start=2024",), "model '2024': not embedded"),
        ("0.7x", ("--start=nowhere",), "model 'nowhere': not embedded"),
        ("0.7x", ("data.held_out=24", "data.held_out_share=1"), "cannot take 24 pictures away"),
    ],
)
def test_wrong_requests_end_in_one_line(plain, tmp_path, capsys, target, more, message):
    small = [] if any("held_out" in part for part in more) else SMALL
    assert main(command(plain, "-o", str(tmp_path), *small, *more, target=target)) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert message in error and "Traceback" not in error


@pytest.mark.untyped
def test_a_start_that_does_not_fit_is_refused(plain, tmp_path, capsys):
    def refused(*arguments: str) -> str:
        assert main(arguments) == 2
        return " ".join(capsys.readouterr().err.split())

    weights, photos = plain / "weights.safetensors", plain / "photos"
    command = ["train", "--target-macs", "0.7x", "--data", str(photos), "-o", str(tmp_path / "out")]
    of_mini = [*command, "--start", "iared2_mini_patch8_96", "--model"]
    assert "reduces iared2_mini_patch8_96, but the model named is test_vit; give --model iared2" in refused(*of_mini, "test_vit")
    assert "brings the weights that its backbone was trained to" in refused(*of_mini, "iared2_mini_patch8_96", "--weights", str(weights))
    iared2.reduce(timm.create_model("test_vit.r160_in1k", num_classes=1000), 2).save_pretrained(tmp_path / "out")
    ours = [*command, "--weights", str(weights), "--start", str(tmp_path / "out" / ".." / "out"), "--model"]
    assert "is the output folder" in refused(*ours, "test_vit")
    (tmp_path / "out").rename(tmp_path / "moved")
    ours[-2] = str(tmp_path / "moved")
    assert "reduces test_vit.r160_in1k, but the model named is test_vit.other" in refused(*ours, "test_vit.other")


@pytest.mark.untyped
def test_a_start_that_became_another_makes_another_run(plain, tmp_path, capsys):
    """Under the same name; what is recorded of the first run does not claim settings that the start decided."""
    backbone = timm.create_model("test_vit", num_classes=1000)
    iared2.reduce(backbone, 2, rule="top_k", ratios=(0.7, 0.4)).save_pretrained(tmp_path / "start")
    go_on = command(plain, "-o", str(tmp_path / "out"), "--start", str(tmp_path / "start"), *BLOCKS_ALONE, *SMALL)
    assert main(go_on) == 0
    assert iared2.load_reduced(tmp_path / "out").config.rule == "threshold"  # by which budgets are met
    recorded = json.loads((tmp_path / "out" / "recipe.json").read_text())["together"]
    assert recorded["start"] == str(tmp_path / "start") and not {"place", "on_drop", "worth"} & set(recorded)
    other = iared2.load_reduced(tmp_path / "start", backbone=backbone)
    torch.nn.init.normal_(other.reducers[0].interpreter.query.weight)
    other.save_pretrained(tmp_path / "start")
    assert main(go_on) == 2 and "another recipe" in " ".join(capsys.readouterr().err.split())


@pytest.mark.untyped
def test_an_empty_folder_and_weights_that_are_not_numbers_end_in_one_line(plain, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    arguments = command(plain, "-o", str(tmp_path / "o"), *SMALL)
    arguments[arguments.index("--data") + 1] = str(tmp_path / "empty")
    assert main(arguments) == 2
    assert "no pictures in it" in " ".join(capsys.readouterr().err.split())
    import timm
    from safetensors.torch import load_file

    tensors = load_file(plain / "weights.safetensors")
    tensors["norm.weight"] = torch.full_like(tensors["norm.weight"], 3e38)  # finite in the file, infinite in the answers
    save_file(tensors, tmp_path / "wild.safetensors")
    arguments = command(plain, "-o", str(tmp_path / "o"), *SMALL)
    arguments[arguments.index("--weights") + 1] = str(tmp_path / "wild.safetensors")
    assert main(arguments) == 2
    assert "answers NaN or infinity" in " ".join(capsys.readouterr().err.split())
    assert timm.is_model("test_vit")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "wanted one of --target-macs 0.65x and --disagreement 1.5"),
        (["--target-macs", "0.7x", "--disagreement", "2"], "give one of the two"),
        (["--disagreement", "-3"], "wanted a percentage from 0 to 100"),
        (["--target-macs", "0.7x", "--limit", "0"], "--limit: got 0"),
    ],
)
def test_calibrate_refuses_unclear_wishes(tmp_path, capsys, arguments, message):
    assert main(["calibrate", "--data", str(tmp_path), "-o", str(tmp_path / "o"), *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_an_output_that_is_a_file_is_refused_before_the_work(tmp_path, capsys):
    Image.new("RGB", (32, 32)).save(tmp_path / "grey.png")
    for output, message in (
        (tmp_path / "grey.png", "but this is a file"),
        ("/proc/nowhere", "cannot be written to"),
        (tmp_path / ("a" * 300), "cannot be written to"),
    ):
        assert main(["calibrate", "--data", str(tmp_path), "-o", str(output), "--target-macs", "0.7x"]) == 2
        assert message in " ".join(capsys.readouterr().err.split())


def test_rules_without_thresholds_are_not_calibrated():
    model = iared2.reduce(FAMILIES["deit"].build(), 2, rule="top_k", ratios=(0.8, 0.5)).eval()
    with pytest.raises(ConfigError, match="keeps patches by 'top_k', which has no thresholds"):
        Calibrator(model, [FAMILIES["deit"].images(4)])
    assert model.config.rule == "top_k"


def test_training_takes_the_size_that_a_backbone_was_built_for():
    from iared2.data.arrays import Preprocess

    assert Preprocess.of(FAMILIES["deit"].build(), flip=False).size == (32, 32)


def tower(plain, tmp_path, *more: str) -> list[str]:
    """The command for the same backbone without a classifier."""
    from safetensors.torch import load_file

    tensors = {name: value for name, value in load_file(plain / "weights.safetensors").items() if not name.startswith("head.")}
    save_file(tensors, tmp_path / "tower.safetensors")
    arguments = command(plain, "-o", str(tmp_path / "o"), "data.views=0", "backbone.arguments.num_classes=0", *more)
    arguments[arguments.index("--weights") + 1] = str(tmp_path / "tower.safetensors")
    return arguments


@pytest.mark.untyped
def test_few_pictures_and_no_classifier_are_enough(plain, tmp_path, caplog):
    """A fifth is held out of what there is; a tower without classes is rewarded by the cosine of its embeddings."""
    assert main(tower(plain, tmp_path, "data.batch_size=4", "together.walk_epochs=1")) == 0
    text = " ".join(caplog.text.split())
    assert "(on 4 pictures)" in text  # of 24
    assert "MACs cosine to dense patches left" in text and "KL" not in text


@pytest.mark.untyped
def test_labels_for_a_tower_without_classes_are_refused(plain, tmp_path, capsys):
    assert main(tower(plain, tmp_path, "data.labels=true")) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "this backbone has no classifier (num_classes = 0) to be right or wrong; set data.labels=false" in said


@pytest.mark.parametrize("in_memory", [False, True])
def test_the_training_pictures_are_not_held_out_of_themselves(plain, in_memory, caplog):
    caplog.set_level("INFO", "iared2.train")
    recipe = find_recipe("budget", [f"data.train={plain / 'photos'}", "data.held_out=0", "data.views=0", f"data.in_memory={in_memory}"])
    feeds = open_feeds(recipe, FAMILIES["deit"].build(), 0)
    assert feeds.held_out is None and feeds.train.steps() > 0
    assert "nothing is held out" in caplog.text


def test_calibration_counts_what_it_could_read(plain, tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    for file in list((plain / "photos").glob("*.png"))[:6]:
        (photos / file.name).write_bytes(file.read_bytes())
    (photos / "broken.png").write_bytes(b"no picture")
    wish = ["--target-macs", "0.8x", "-o", str(tmp_path / "o"), "--workers", "0", "--device", "cpu"]
    assert main(["calibrate", "--data", str(photos), *wish]) == 1
    said = capsys.readouterr()
    assert "(on 6 pictures)" in " ".join(said.out.split()) and "chosen on 6 pictures" in " ".join(said.err.split())
    assert iared2.load_reduced(tmp_path / "o").config.rule == "threshold"
