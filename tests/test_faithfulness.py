"""Faithfulness of maps: toy models whose best order is known, slow loops in float64, runs that go on, the command."""

import csv
import json
import math

import iared2  # first: makes timm importable beside a CPU-only torch

# isort: split
import numpy as np
import pytest
import timm
import torch
from PIL import Image

from doubles import Methods, labelled_folder
from iared2 import cli
from iared2.data.arrays import ImageArrays
from iared2.data.raw import raw_images
from iared2.data.sources import open_data
from iared2.data.streams import StreamedImages
from iared2.errors import ConfigError, DataError
from iared2.evaluate.bootstrap import means, resamples
from iared2.evaluate.faithful_run import FaithfulnessRun, FaithOptions
from iared2.evaluate.faithfulness import FIGURES, TESTS, area, faithfulness, gini, removal_curve, token_curve
from iared2.evaluate.imputation import impute, road
from iared2.evaluate.judge import Judge
from iared2.evaluate.randomised import randomised, rank_correlation, steps_of
from iared2.evaluate.removal import blur, blurred, gone, on_grid, rank_of, zero
from iared2.evaluate.saco import coefficient, saco
from iared2.keep import Given
from iared2.saving import save_reduced

GRID, SIDE = 4, 16


class Linear:
    """Logits [sum of weight x mean colour of each patch, half of what the whole picture has]: the best order is that of the weights."""

    def __init__(self, weight_hw, scale=20.0):
        self.weight_hw, self.scale, self.calls = weight_hw.double(), scale, 0

    def __call__(self, images):
        return self.judged(on_grid(images.mean(1), (GRID, GRID)))

    def judged(self, colour_Bhw):
        self.calls += 1
        gain_B = self.scale * (colour_Bhw * self.weight_hw).sum((1, 2)) / self.weight_hw.sum()
        return torch.stack([gain_B, torch.full_like(gain_B, self.scale / 2)], dim=1)

    def grid(self, images):
        return GRID, GRID

    def without(self, images, keep_BN):
        return self.judged(on_grid(images.mean(1), (GRID, GRID)) * keep_BN.view(-1, GRID, GRID))


WEIGHT = torch.tensor([[9.0, 2, 1, 8], [1, 3, 7, 2], [6, 1, 2, 5], [1, 4, 1, 3]]).exp2()
WHITE = torch.ones(2, 3, SIDE, SIDE)


def maps(kind):
    found = {"right": WEIGHT, "reversed": -WEIGHT, "constant": torch.full((GRID, GRID), 0.3), "random": torch.rand(GRID, GRID)}[kind]
    return found.expand(2, -1, -1)


def in_pixels(map_Bhw):
    return map_Bhw.repeat_interleave(SIDE // GRID, 1).repeat_interleave(SIDE // GRID, 2)


# ---- orders ------------------------------------------------------------------------------------------------------


def test_the_largest_goes_first():
    rank = rank_of(torch.tensor([[[3.0, 1.0], [0.0, 2.0]]]), (2, 2))
    assert rank.tolist() == [[[0, 2], [3, 1]]]
    assert gone(rank, 0.5).tolist() == [[[True, False], [False, True]]]
    assert gone(rank, 0.5, least_first=True).tolist() == [[[False, True], [True, False]]]
    assert not gone(rank, 0.0).any() and not gone(rank, 0.0, least_first=True).any() and gone(rank, 1.0, least_first=True).all()


def test_equal_values_go_in_a_fixed_random_order_of_cells():
    flat = rank_of(torch.full((2, 8, 8), 0.7), (SIDE, SIDE))
    assert torch.equal(flat[0], flat[1]) and torch.equal(flat, rank_of(torch.zeros(2, 8, 8), (SIDE, SIDE)))
    assert not torch.equal(flat, rank_of(torch.zeros(2, 8, 8), (SIDE, SIDE), seed=1))
    assert sorted(flat[0].flatten().tolist()) == list(range(SIDE * SIDE))
    rows = gone(flat, 0.5)[0].float().mean(1)
    assert rows.std() < 0.35  # not one half and then the other
    half = torch.zeros(1, GRID, GRID)
    half[0, :, 0] = 1
    assert gone(rank_of(half, (GRID, GRID)), 0.25)[0, :, 0].all()


def test_ranks_against_a_slow_sort():
    values = torch.randn(3, 5, 7)
    rank = rank_of(values, (5, 7))
    for one, found in zip(values.flatten(1).tolist(), rank.flatten(1).tolist(), strict=True):
        assert found == [sum(other > value for other in one) for value in one]


def test_maps_that_cannot_be_ordered():
    with pytest.raises(ConfigError, match="not finite"):
        rank_of(torch.full((1, 2, 2), math.nan), (2, 2))
    with pytest.raises(ConfigError, match="one map per image"):
        removal_curve(torch.rand(3, 2, 2), WHITE, Linear(WEIGHT))
    with pytest.raises(ConfigError, match="one map per image"):
        token_curve(torch.rand(2, 2), WHITE, Linear(WEIGHT))


# ---- curves ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fill", [zero, blurred, road])
@pytest.mark.parametrize("least_first", [False, True])
def test_a_curve_against_a_slow_loop(fill, least_first):
    model, images, map_ = Linear(WEIGHT), torch.rand(2, 3, SIDE, SIDE), torch.rand(2, SIDE, SIDE)
    curve = removal_curve(map_, images, model, fill, least_first)
    for row in range(2):
        order = sorted(range(SIDE * SIDE), key=lambda p: float(map_[row].flatten()[p]), reverse=not least_first)
        chosen = int(model(images[row : row + 1]).argmax())
        for step, share in enumerate(curve.share_S):
            left = images[row : row + 1].clone()
            mask = torch.zeros(SIDE * SIDE, dtype=torch.bool)
            mask[order[: round(share * SIDE * SIDE)]] = True
            left = fill(left, mask.view(1, SIDE, SIDE)) if share else left
            logits = model(left)[0]
            assert float(curve.chance_BS[row, step]) == pytest.approx(float(logits.softmax(0)[chosen]), abs=1e-6)
            assert bool(curve.hit_BS[row, step]) == (int(logits.argmax()) == chosen)


@pytest.mark.parametrize("way", ["patch", "pixel", "tokens"])
def test_the_right_order_is_best_and_its_reverse_is_worst(way):
    def areas(map_, least_first):
        if way == "tokens":
            curve = token_curve(map_, WHITE, Linear(WEIGHT), least_first)
        else:
            curve = removal_curve(in_pixels(map_) if way == "pixel" else map_, WHITE, Linear(WEIGHT), zero, least_first)
        return float(curve.top1[0]), float(curve.chance[0])

    for least_first, sign in ((False, 1), (True, -1)):
        right, wrong = areas(maps("right"), least_first), areas(maps("reversed"), least_first)
        for other in ("constant", "random"):
            between = areas(maps(other), least_first)
            assert all(sign * r <= sign * b <= sign * w for r, b, w in zip(right, between, wrong, strict=True)), other
        assert sign * right[0] < sign * wrong[0] and sign * right[1] < sign * wrong[1]
        assert areas(maps("right"), least_first) == pytest.approx(areas(maps("reversed"), not least_first))


def test_one_patch_that_decides():
    weight = torch.zeros(GRID, GRID)
    weight[2, 1] = 1.0
    right = token_curve(weight.expand(2, -1, -1), WHITE, Linear(weight))
    assert right.top1.tolist() == [0, 0]  # gone in the first step
    last = token_curve(weight.expand(2, -1, -1), WHITE, Linear(weight), least_first=True)
    assert last.top1.tolist() == [100, 100]
    assert removal_curve(weight.expand(2, -1, -1), WHITE, Linear(weight), least_first=True).hit_BS[:, :9].all()


def test_areas_by_hand():
    assert area(torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]]), (0.0, 0.25, 1.0)).tolist() == [0.5, 1.0]


def test_the_explained_class_may_be_given():
    curve = token_curve(maps("right"), WHITE, Linear(WEIGHT), class_B=torch.tensor([1, 0]))
    assert not curve.hit_BS[0, 0] and curve.hit_BS[1, 0]
    assert torch.allclose(curve.chance_BS[0] + curve.chance_BS[1], torch.ones((), dtype=torch.float64))


def test_tokens_never_lose_the_last_patch():
    class Counting(Linear):
        def without(self, images, keep_BN):
            kept.append(keep_BN.sum(1).tolist())
            return super().without(images, keep_BN)

    kept = []
    token_curve(maps("right"), WHITE, Counting(WEIGHT))
    assert [row[0] for row in kept] == [16 - round(16 * step / 10) for step in range(10)]

    class Two(Counting):
        def grid(self, images):
            return 1, 2

        def judged(self, colour):
            return super().judged(torch.ones(2, GRID, GRID))

        def without(self, images, keep_BN):
            kept.append(keep_BN.sum(1).tolist())
            return self.judged(None)

    kept.clear()
    token_curve(maps("right"), WHITE, Two(WEIGHT))
    assert min(row[0] for row in kept) == 1


# ---- fills -------------------------------------------------------------------------------------------------------


def test_blur_by_definition():
    images = torch.rand(1, 2, 40, 60, dtype=torch.float64)
    reach = (round(5 * 40 / 224), round(5 * 60 / 224))
    kernels = [
        torch.tensor([math.exp(-(d**2) / (2 * max(1.0, 5 * side / 224) ** 2)) for d in range(-r, r + 1)])
        for side, r in zip((40, 60), reach, strict=True)
    ]
    found, weights = blur(images), [kernel / kernel.sum() for kernel in kernels]
    for y, x in ((20, 30), (0, 0), (39, 59)):
        total = 0.0
        for i, a in enumerate(weights[0].tolist()):
            for j, b in enumerate(weights[1].tolist()):
                v, u = abs(y + i - reach[0]), abs(x + j - reach[1])
                total += a * b * float(images[0, 1, v if v < 40 else 78 - v, u if u < 60 else 118 - u])
        assert float(found[0, 1, y, x]) == pytest.approx(total, abs=1e-6)
    assert torch.allclose(blur(torch.full((1, 3, 9, 9), 0.4)), torch.full((1, 3, 9, 9), 0.4))


def slow_impute(image, mask):
    """The dense system, row by row."""
    height, width = mask.shape
    places = [(y, x) for y in range(height) for x in range(width) if mask[y, x]]
    number = {place: row for row, place in enumerate(places)}
    matrix, right = np.zeros((len(places),) * 2), np.zeros((len(places), image.shape[0]))
    for (y, x), row in number.items():
        total = 0.0
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                place = (y + dy, x + dx)
                if (dy, dx) == (0, 0) or not (0 <= place[0] < height and 0 <= place[1] < width):
                    continue
                weight = 1 / 6 if 0 in (dy, dx) else 1 / 12
                total += weight
                if place in number:
                    matrix[row, number[place]] -= weight
                else:
                    right[row] += weight * image[:, place[0], place[1]]
        matrix[row, row] = total
    out = image.copy()
    out[:, mask] = np.linalg.solve(matrix, right).T
    return out


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_imputation_against_a_dense_system(share):
    images, mask = torch.rand(3, 3, 9, 13, dtype=torch.float64), torch.rand(3, 9, 13) < share
    mask[:, 4, 5] = False
    mask[2], mask[2, 0, 0] = True, False  # one pixel left
    found = impute(images, mask, tolerance=1e-13)
    for row in range(3):
        assert np.allclose(found[row].numpy(), slow_impute(images[row].numpy(), mask[row].numpy()), atol=1e-9)
    assert torch.allclose(impute(images.float(), mask), found.float(), atol=0.02)
    assert torch.equal(found.permute(0, 2, 3, 1)[~mask], images.permute(0, 2, 3, 1)[~mask])


def test_imputation_of_nothing_and_of_everything():
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(impute(images, torch.zeros(2, 8, 8, dtype=torch.bool)), images)
    assert not impute(images, torch.ones(2, 8, 8, dtype=torch.bool)).any()
    half = torch.zeros(2, 8, 8, dtype=torch.bool)
    half[:, :4] = True
    assert torch.equal(road(images, half), road(images, half))
    noise = (road(images, half) - impute(images, half))[:, :, :4]
    assert 0.005 < noise.std() < 0.02 and not (road(images, half) - images)[:, :, 4:].any()


# ---- SaCo --------------------------------------------------------------------------------------------------------


def slow_saco(map_, image, model, groups=10):
    """The paper's pseudo-code, on pixels in float64."""
    values = map_.double().flatten()
    order = sorted(range(len(values)), key=lambda p: float(values[p]), reverse=True)
    whole = model(image[None]).softmax(1)[0]
    chosen = int(whole.argmax())
    salience, drop = [], []
    for group in range(groups):
        inside = order[group * len(order) // groups : (group + 1) * len(order) // groups]
        left = image.clone().flatten(1)
        left[:, inside] = image.flatten(1).mean(1, keepdim=True)
        salience.append(float(values[inside].mean()))
        drop.append(float(whole[chosen] - model(left.view_as(image)[None]).softmax(1)[0, chosen]))
    signed = total = 0.0
    for i in range(groups - 1):
        for j in range(i + 1, groups):
            weight = salience[i] - salience[j] if drop[i] >= drop[j] else -(salience[i] - salience[j])
            signed, total = signed + weight, total + abs(weight)
    return signed / total


def test_saco_against_a_slow_loop():
    images, map_ = torch.rand(2, 3, SIDE, SIDE), torch.randn(2, SIDE, SIDE)
    found = saco(map_, images, Linear(WEIGHT))
    for row in range(2):
        assert float(found[row]) == pytest.approx(slow_saco(map_[row], images[row], Linear(WEIGHT)), abs=1e-6)


def test_saco_of_known_orders():
    weight = torch.arange(SIDE * SIDE).view(SIDE, SIDE).float()

    def model(images):
        gain_B = (images.mean(1) * weight).sum((1, 2)) / weight.sum()
        return torch.stack([gain_B, torch.zeros_like(gain_B)], dim=1)

    images = torch.full((1, 3, SIDE, SIDE), 0.8)
    images[:, :, : SIDE // 2, ::2] = 1.0  # the mean colour is another one
    images = torch.ones(1, 3, SIDE, SIDE) - 0.2 * torch.rand(1, 1, SIDE, SIDE).round()
    salience = (images.mean(1) - images.mean()) * weight  # what replacement takes from the first logit
    assert float(saco(salience, images, model)) > 0.999
    assert float(saco(-salience, images, model)) < -0.999
    assert saco(torch.full((1, 4, 4), 0.1), images, model).tolist() == [0.0]
    assert -1 <= float(saco(torch.rand(1, 4, 4), images, model)) <= 1


def test_the_coefficient_by_hand():
    # Pairs (0,1): 2 right, (0,2): 3 wrong, (1,2): 1 wrong
    assert float(coefficient(torch.tensor([[4.0, 2.0, 1.0]]), torch.tensor([[0.5, 0.4, 0.9]]))) == pytest.approx((2 - 3 - 1) / 6)


# ---- Gini, ranks, random weights ---------------------------------------------------------------------------------


def test_gini_against_all_pairs():
    values = torch.randn(3, 4, 5)
    for one, found in zip(values.abs().double().flatten(1), gini(values), strict=True):
        assert float(found) == pytest.approx(float((one[:, None] - one[None, :]).abs().sum() / (2 * len(one) ** 2 * one.mean())))
    assert gini(torch.full((1, 3, 3), -2.0)).abs().max() < 1e-12 and gini(torch.zeros(1, 3, 3)).tolist() == [0]
    single = torch.zeros(1, 4, 4)
    single[0, 1, 1] = 5
    assert float(gini(single)) == pytest.approx(15 / 16)


def test_rank_correlation():
    one = torch.randn(2, 4, 4)
    found = rank_correlation(torch.cat([one, one, one]), torch.cat([one.exp(), -one, torch.ones_like(one)]))
    assert found[:4].tolist() == pytest.approx([1, 1, -1, -1]) and found[4:].isnan().all()
    x, y = torch.tensor([[[1.0, 2, 3, 4]]]), torch.tensor([[[1.0, 1, 4, 2]]])
    assert float(rank_correlation(x, y)) == pytest.approx(float(torch.corrcoef(torch.tensor([[1.0, 2, 3, 4], [1.5, 1.5, 4, 3]]))[0, 1]))


def test_steps_of_randomisation():
    assert [steps_of(depth) for depth in (1, 2, 3, 6, 12)] == [(1,), (1, 2), (1, 2, 3), (1, 2, 4, 6), (1, 2, 4, 8, 12)]


# ---- a real model ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return iared2.reduce(timm.create_model("iared2_mini_patch8_64", num_classes=10), 3).eval()


@pytest.fixture
def judge(model):
    return Judge(model, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


def test_random_weights_come_and_go(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    depth = model.adapter.depth
    with pytest.raises(KeyboardInterrupt), randomised(model, 1, seed=3):  # noqa: PT012
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert changed and all(f"blocks.{depth - 1}." in name for name in changed)
        raise KeyboardInterrupt
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with randomised(model, depth):
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert any(name.startswith("reducers") for name in changed) and any(".blocks.0." in name for name in changed)
        assert not any("patch_embed" in name or "head" in name for name in changed)


def test_dropped_tokens_are_gone():
    shape = {"img_size": 64, "patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 3}
    one = iared2.reduce(timm.create_model("vit_tiny_patch16_224", num_classes=10, **shape), (0,)).eval()
    judge, images, keep = Judge(one, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)), torch.rand(2, 3, 64, 64), torch.rand(2, 64) < 0.4
    one.reducers[0].rule = Given(keep)
    with torch.no_grad():
        wanted = one(judge.normalised(images))
        assert torch.allclose(judge.without(images, keep), wanted, atol=1e-5)
        assert torch.allclose(judge.without(images, torch.ones(2, 64, dtype=torch.bool)), judge(images), atol=1e-5)
        changed = torch.where(keep.view(2, 1, 8, 8).repeat_interleave(8, 2).repeat_interleave(8, 3), images, torch.rand_like(images))
        assert torch.allclose(judge.without(changed, keep), wanted, atol=1e-5)  # whatever colour they had
        assert torch.allclose(
            judge(images),
            one.backbone((images - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / torch.tensor([0.2, 0.3, 0.4])[:, None, None]),
            atol=1e-5,
        )


def test_all_figures_of_a_real_model(judge):
    images = torch.rand(2, 3, 64, 64)
    found = faithfulness(torch.rand(2, 8, 8), images, judge)
    assert found.value.keys() == set(FIGURES) - {"randomised_1", "randomised_all"}
    assert all(value.shape == (2,) and value.isfinite().all() for value in found.value.values())
    assert found.curve.keys() == {f"{way}_{order}" for way in ("zero", "blur", "road", "tokens") for order in ("positive", "negative")}
    again = faithfulness(torch.rand(2, 8, 8), images, judge, torch.tensor([3, 3]))
    assert not torch.equal(again.value["deletion_zero"], found.value["deletion_zero"])


def test_a_judge_that_answers_nan_judges_nothing():
    broken = iared2.reduce(timm.create_model("iared2_mini_patch8_64", num_classes=10), 3).eval()
    broken.backbone.head.bias.data[0] = float("nan")
    judge, images = Judge(broken, (0.5,) * 3, (0.5,) * 3), torch.rand(2, 3, 64, 64)
    with pytest.raises(ConfigError, match="the dense model answers NaN or infinity"):
        judge(images)
    with pytest.raises(ConfigError, match="the dense model answers NaN or infinity"):
        judge.without(images, torch.ones(2, 64, dtype=torch.bool))


def test_no_classifier_no_answer():
    bare = iared2.reduce(timm.create_model("iared2_mini_patch8_64", num_classes=0), 3)
    with pytest.raises(ConfigError, match="no classifier"):
        Judge(bare, (0.5,) * 3, (0.5,) * 3)


# ---- runs --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    return labelled_folder(tmp_path / "data")


def pictures(folder):
    return raw_images(open_data(folder), folder)


def known(rows):
    return [(row.method, row.images, row.figures, row.intervals, row.curves) for row in rows]


FEW = ("zero", "gini")


def test_methods_side_by_side(model, folder):
    methods = Methods()
    task = FaithfulnessRun(model, pictures(folder), methods.find, FaithOptions(batch_size=4, slow_limit=1, tests=(*FEW, "randomised")))
    told = []
    rows = task.run(["bright", "weights", "nan", "slow one", "chance"], told.append)
    assert [row.images for row in rows] == [4, 4, 0, 1, 4]
    assert "not finite" in rows[2].why
    assert sum(told) <= task.work([row.method for row in rows])
    bright, weights, _, slow, chance = rows
    assert set(bright.figures) == {*TESTS["zero"], "gini", *TESTS["randomised"]}
    assert bright.figures["randomised_1"] == pytest.approx(1) == bright.figures["randomised_all"]  # it does not look at the model
    assert abs(weights.figures["randomised_1"]) < 0.5 and abs(chance.figures["randomised_all"]) < 0.6
    assert len(bright.curves["randomised"]["blocks"]) >= len(slow.curves["randomised"]["blocks"]) == 2
    for row in (bright, weights, slow, chance):
        for name, value in row.figures.items():
            low, high = row.intervals[name]
            assert low - 1e-9 <= value <= high + 1e-9
        curve = row.curves["zero_positive"]
        assert curve["share"][0] == 0 and curve["share"][-1] == 1 and curve["top1"][0] == 1
        assert row.figures["positive"] == pytest.approx(
            100 * float(area(torch.tensor([curve["top1"][1:10]]), curve["share"][1:10])), abs=0.01
        )
        ends = row.curves["zero_negative"]
        assert curve["chance"][0] == ends["chance"][0] and curve["chance"][-1] == ends["chance"][-1]


def test_a_killed_run_goes_on_and_repeats_nothing(model, folder, tmp_path):
    options, names = FaithOptions(batch_size=1, tests=FEW), ["chance", "bright"]
    whole = FaithfulnessRun(model, pictures(folder), Methods().find, options).run(names)
    killed, rest, again = Methods(stop_after=3), Methods(), Methods()
    with pytest.raises(KeyboardInterrupt):
        FaithfulnessRun(model, pictures(folder), killed.find, options, tmp_path / "records").run(names)
    assert known(FaithfulnessRun(model, pictures(folder), rest.find, options, tmp_path / "records").run(names)) == known(whole)
    assert len(killed.calls) + len(rest.calls) == 8
    assert known(FaithfulnessRun(model, pictures(folder), again.find, options, tmp_path / "records").run(names)) == known(whole)
    assert not again.calls


def test_other_facts_are_other_records(model, folder, tmp_path):
    def calls(**changes):
        methods = Methods()
        options = FaithOptions(**{"batch_size": 4, "tests": ("gini",), **changes})
        FaithfulnessRun(model, pictures(folder), methods.find, options, tmp_path / "records").run(["bright"])
        return len(methods.calls)

    assert [calls(), calls(), calls(target=3), calls(target="label"), calls(seed=1), calls(tests=("saco",))] == [1, 0, 1, 1, 1, 1]
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(folder / "c0/0.png")
    assert calls() == 1


def test_which_class_is_explained(model, folder):
    def targets(target):
        methods = Methods()
        FaithfulnessRun(model, pictures(folder), methods.find, FaithOptions(batch_size=4, target=target, tests=("gini",))).run(["bright"])
        return methods.targets[0].tolist()

    batch = pictures(folder).batch(range(4), FaithfulnessRun(model, pictures(folder), Methods().find).how)
    how = FaithfulnessRun(model, pictures(folder), Methods().find).how
    assert targets("predicted") == Judge(model, how.mean, how.std)(batch.image_BCHW).argmax(1).tolist()
    assert targets("label") == batch.label_B.tolist() and targets(7) == [7] * 4


def test_raw_pictures_are_those_of_eval(model, folder):
    from iared2.data.batches import make_batches

    how = FaithfulnessRun(model, pictures(folder), Methods().find).how
    wanted = next(iter(make_batches(open_data(folder), how, 4, train=False).epoch(0)))
    found = pictures(folder).batch(range(4), how, workers=2)
    assert torch.allclose(Judge(model, how.mean, how.std).normalised(found.image_BCHW), wanted["images"], atol=1e-5)
    assert torch.equal(found.label_B, wanted["labels"])


def test_pictures_in_memory_and_streams(model, tmp_path):
    pixels, labels = torch.randint(0, 256, (3, 20, 20, 3), dtype=torch.uint8), torch.tensor([1, 2, 3])
    found = raw_images(ImageArrays(pixels, labels), tmp_path)
    how = FaithfulnessRun(model, found, Methods().find).how
    batch = found.batch([2, 0], how)
    assert batch.label_B.tolist() == [3, 1] and batch.image_BCHW.shape == (2, 3, *how.size) and batch.image_BCHW.max() <= 1
    assert len(found.subset(2, 0)) == 2 and found.subset(9, 0) is found
    other = pixels.clone()
    other[0, 0, 0, 0] ^= 1
    assert raw_images(ImageArrays(other, labels), tmp_path).stamps != found.stamps
    with pytest.raises(DataError, match="a stream cannot be sampled"):
        raw_images(StreamedImages(lambda: iter(()), 3), tmp_path)
    with pytest.raises(DataError, match="no pictures"):
        raw_images(ImageArrays(pixels[:0], labels[:0]), tmp_path)


def test_broken_pictures_are_left_out(model, folder, tmp_path):
    (folder / "c1/1.png").write_bytes(b"no picture")
    for _ in range(2):
        task = FaithfulnessRun(model, pictures(folder), Methods().find, FaithOptions(batch_size=1, tests=FEW), tmp_path / "records")
        assert task.run(["bright"])[0].images == 3
        assert len(task.skipped) == 1


def test_intervals_are_as_wide_as_means_are_uncertain():
    value = (torch.arange(400) % 2).double()[:, None]
    drawn = means(value, resamples(400))
    assert 3.92 * float(drawn.std()) == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.1)
    holes = torch.tensor([[1.0], [math.nan], [3.0]])
    assert means(holes, torch.ones(1, 3, dtype=torch.float64)).tolist() == [[2.0]]


# ---- the command -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("faithfulness") / "model"
    save_reduced(model, path, with_backbone=True)
    return path


@pytest.fixture
def run(saved, capfd):
    def run(*arguments, model=saved):
        code = cli.main(["faithfulness", "--model", str(model), "--workers", "0", *map(str, arguments)])
        captured = capfd.readouterr()
        return code, captured.out, captured.err.splitlines()

    return run


def test_the_command(run, folder, tmp_path):
    out = tmp_path / "out"
    code, printed, errors = run("-d", folder, "-o", out, "--methods", "ours", "--limit", 3, "--json", tmp_path / "copy.json")
    assert (code, errors) == (0, [])
    assert "3 of 4 pictures" in printed and "ROAD" in printed
    content = json.loads((out / "faithfulness.json").read_text())
    assert content == json.loads((tmp_path / "copy.json").read_text())
    assert [row["method"] for row in content["rows"]] == ["ours", "random"]
    for row in content["rows"]:
        assert row["images"] == 3 and row["error"] is None
        for name in FIGURES:
            low, high = row["intervals"][name]
            assert low <= row[name] <= high
    curves = json.loads((out / "curves.json").read_text())["curves"]
    assert curves["ours"]["tokens_positive"]["share"] == [step / 10 for step in range(10)]
    assert Image.open(out / "curves.png").size[0] > 500
    table = list(csv.DictReader((out / "faithfulness.csv").open()))
    assert float(table[0]["saco"]) == content["rows"][0]["saco"]
    assert "95 % intervals" in (out / "faithfulness.md").read_text() and r"\toprule" in (out / "faithfulness.tex").read_text()
    assert run("-d", folder, "-o", out, "--methods", "ours", "--limit", 3)[0] == 0


def test_a_plain_folder_and_few_tests(run, folder, tmp_path):
    code, _, errors = run("-d", folder / "c0", "-o", tmp_path / "out", "--methods", "random", "--tests", "saco,gini")
    assert (code, errors) == (0, [])
    row = json.loads((tmp_path / "out/faithfulness.json").read_text())["rows"][0]
    assert row["images"] == 2 and row["saco"] is not None and row["positive"] is None and row["intervals"]["positive"] is None
    assert not (tmp_path / "out/curves.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--methods", "gausian"), "did you mean 'gaussian'"),
        (("--methods", ","), "--methods: got none"),
        (("--tests", "zeros"), "--tests: got 'zeros'"),
        (("--tests", ","), "--tests: got ''"),
        (("--target", 10), "got class 10, outside the model's 10 classes"),
        (("--target", -1), "got class -1"),
        (("--target", "dog"), "--target: got 'dog', wanted predicted, label or the number of a class"),
        (("--limit", 0), "--limit: got 0"),
        (("--slow-limit", 0), "--slow-limit: got 0"),
    ],
)
def test_wrong_options_are_one_line(run, folder, tmp_path, arguments, message):
    code, _, errors = run("-d", folder, "-o", tmp_path / "out", *arguments)
    assert code == 2 and len(errors) == 1 and message in errors[0]
    assert not (tmp_path / "out").exists()


def test_wrong_data_is_one_line(run, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    code, _, errors = run("-d", tmp_path / "empty", "-o", tmp_path / "out")
    assert code == 2 and len(errors) == 1 and "no pictures" in errors[0]
    code, _, errors = run("-d", tmp_path / "nowhere", "-o", tmp_path / "out")
    assert code == 2 and len(errors) == 1 and "no such folder" in errors[0]
    (folder / "labels.csv").write_text("file,class_index\nc0/0.png,11\n")
    code, _, errors = run("-d", folder, "-o", tmp_path / "out", "--target", "label")
    assert code == 2 and len(errors) == 1 and "label 11" in errors[0]


def test_a_model_without_a_classifier(run, folder, tmp_path):
    bare = iared2.reduce(timm.create_model("iared2_mini_patch8_64", num_classes=0), 3)
    save_reduced(bare, tmp_path / "bare", with_backbone=True)
    code, _, errors = run("-d", folder, "-o", tmp_path / "out", model=tmp_path / "bare")
    assert code == 2 and len(errors) == 1 and "no classifier" in errors[0]
