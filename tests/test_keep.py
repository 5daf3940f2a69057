"""Keep rules: which rows go on, against loops over images."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import packs
from iared2.errors import ConfigError
from iared2.keep import BatchBudget, Given, KeepRule, Sampled, Threshold, TopK, share_of
from iared2.tokens.packed import Layout, select, select_places
from packs import PLACES, make_layout, rows_of

PREFIX = st.integers(0, 2)


def scores(layout: Layout, seed: int) -> torch.Tensor:
    """Distinct scores in a random order; those of prefix rows are the best of all and the worst."""
    draw = torch.Generator().manual_seed(seed)
    score_T = (torch.randperm(len(layout.image_T), generator=draw) + 1) / (len(layout.image_T) + 2)
    score_T[~layout.is_patch_T] = torch.rand(int((~layout.is_patch_T).sum()), generator=draw).round()
    return score_T


def kept_patches(rule: KeepRule, score_T: torch.Tensor, layout: Layout) -> list[list[int]]:
    """Kept patch rows per image; checks what holds for every rule."""
    chosen = rule(score_T, layout)
    index = chosen.index_S.tolist()
    assert index == sorted(index) and chosen.cu_B1.dtype == torch.int32
    prefix_rows = set((~layout.is_patch_T).nonzero().flatten().tolist())
    assert prefix_rows <= set(index), "prefix tokens are never dropped"
    rows = [[r for r in image if r in set(index)] for image in rows_of(layout)]
    lengths = [len(image) for image in rows]
    assert chosen.cu_B1.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert chosen.uniform is None or lengths == [chosen.uniform] * len(lengths)
    return [[r for r in image if r not in prefix_rows] for image in rows]


def best(rows: list[int], score_T: torch.Tensor, count: int) -> list[int]:
    return sorted(sorted(rows, key=lambda r: -float(score_T[r]))[:count])


def patches(layout: Layout) -> list[list[int]]:
    return [[r for r in rows if layout.is_patch_T[r]] for rows in rows_of(layout)]


@given(kept=packs.images, prefix=PREFIX, threshold=st.sampled_from([-1.0, 0.0, 0.3, 0.5, 0.9, 1.0]), spare=st.booleans(), seed=packs.seeds)
def test_threshold(kept, prefix, threshold, spare, seed):
    layout = make_layout(kept, prefix)
    score_T = scores(layout, seed)
    wanted = [[r for r in rows if score_T[r] > threshold] for rows in patches(layout)]
    if spare:
        wanted = [w or best(rows, score_T, 1) for w, rows in zip(wanted, patches(layout), strict=True)]
    assert kept_patches(Threshold(threshold, spare), score_T, layout) == wanted
    if threshold == -1:
        assert wanted == patches(layout)


def test_a_score_at_the_threshold_is_dropped():
    layout = make_layout([[0, 1, 2]], 0)
    assert kept_patches(Threshold(0.5), torch.tensor([0.5, 0.5000001, 0.4]), layout) == [[1]]
    assert kept_patches(Threshold(-1), torch.zeros(3), layout) == [[0, 1, 2]]


@given(kept=packs.images, prefix=PREFIX, ratio=st.floats(0.01, 1), seed=packs.seeds)
def test_top_k_keeps_a_share_of_the_grid_in_each_image(kept, prefix, ratio, seed):
    layout = make_layout(kept, prefix)
    score_T, k = scores(layout, seed), math.ceil(ratio * PLACES - 1e-9)
    assert kept_patches(TopK(ratio), score_T, layout) == [best(rows, score_T, k) for rows in patches(layout)]


@given(
    images=st.integers(1, 4),
    left=st.sets(st.integers(0, PLACES - 1), min_size=1).map(sorted),
    prefix=PREFIX,
    ratio=st.floats(0.01, 1),
    seed=packs.seeds,
)
def test_uniform_and_ragged_top_k_agree(images, left, prefix, ratio, seed):
    uniform, ragged = (make_layout([left] * images, prefix, uniform=u) for u in (True, False))
    score_T = scores(uniform, seed)
    one, two = TopK(ratio)(score_T, uniform), TopK(ratio)(score_T, ragged)
    assert torch.equal(one.index_S, two.index_S) and torch.equal(one.cu_B1, two.cu_B1)
    assert one.uniform == prefix + min(share_of(ratio, PLACES), len(left)) and two.uniform is None


def test_ties_go_to_the_earlier_place():
    layout = make_layout([list(range(PLACES))] * 2, 1)  # ragged; static shapes go through torch.topk, which chooses freely
    score_T = torch.ones(len(layout.image_T))
    assert kept_patches(TopK(0.25), score_T, layout) == [[1, 2, 3], [14, 15, 16]]


@given(kept=packs.images, prefix=PREFIX, ratio=st.floats(0.01, 1), spare=st.booleans(), seed=packs.seeds)
def test_batch_budget_keeps_a_constant_total(kept, prefix, ratio, spare, seed):
    layout = make_layout(kept, prefix)
    score_T, images, everything = scores(layout, seed), patches(layout), [r for rows in patches(layout) for r in rows]
    budget = min(math.ceil(ratio * PLACES * len(kept) - 1e-9), len(everything))
    first = [r for rows in images for r in best(rows, score_T, 1)] if spare else []
    budget = min(max(budget, len(kept)), len(everything)) if spare else budget
    others = [r for r in everything if r not in first]
    wanted = set(first + best(others, score_T, budget - len(first)))
    got = kept_patches(BatchBudget(ratio, spare), score_T, layout)
    assert sum(map(len, got)) == budget
    assert {r for rows in got for r in rows} == wanted
    if spare:
        assert all(g or not rows for g, rows in zip(got, images, strict=True))


def test_batch_budget_totals_do_not_depend_on_scores():
    layout = make_layout([list(range(PLACES))] * 4, 1)
    totals = {sum(map(len, kept_patches(BatchBudget(0.37), scores(layout, s), layout))) for s in range(20)}
    ragged = {tuple(map(len, kept_patches(BatchBudget(0.37), scores(layout, s), layout))) for s in range(20)}
    assert totals == {share_of(0.37, 48)} and len(ragged) > 10


def test_sampled_keeps_as_often_as_the_score_says():
    layout = make_layout([[0, 1, 2], [5, 6]], 1)
    score_T = torch.tensor([0.0, 0.0, 0.2, 1.0, 0.0, 0.5, 0.9])
    count = torch.zeros(7)
    for _ in range(2000):
        count[Sampled()(score_T, layout).index_S] += 1
    wanted = torch.tensor([1.0, 0.0, 0.2, 1.0, 1.0, 0.5, 0.9])
    assert ((count / 2000) - wanted).abs().max() < 0.045  # four standard deviations


@given(kept=st.lists(packs.some_places, min_size=1, max_size=4), seed=packs.seeds)
def test_sampling_nothing_spares_the_best_where_one_is_needed(kept, seed):
    layout = make_layout(kept, 0)
    score_T = scores(layout, seed) * 1e-9
    assert kept_patches(Sampled(spare_best=True), score_T, layout) == [best(rows, score_T, 1) for rows in patches(layout)]
    assert kept_patches(Sampled(), score_T, layout) == [[]] * len(kept)


@given(kept=packs.images, prefix=PREFIX, seed=packs.seeds)
def test_given_replays_a_mask(kept, prefix, seed):
    layout = make_layout(kept, prefix)
    keep_BN = torch.rand(len(kept), PLACES, generator=torch.Generator().manual_seed(seed)) < 0.5
    wanted = [[r for r in rows if keep_BN[b, layout.origin_T[r]]] for b, rows in enumerate(patches(layout))]
    assert kept_patches(Given(keep_BN), scores(layout, seed), layout) == wanted


@pytest.mark.parametrize("rule", [TopK, BatchBudget])
@pytest.mark.parametrize("ratio", [0, -0.5, 1.01, float("nan")])
def test_a_ratio_is_a_share(rule, ratio):
    with pytest.raises(ConfigError, match=r"got a ratio of .*, wanted a number above 0 and at most 1"):
        rule(ratio)


@pytest.mark.parametrize(
    ("ratio", "count", "wanted"), [(0.1, 30, 3), (0.7, 10, 7), (0.3, 10, 3), (0.31, 10, 4), (1, 196, 196), (1e-6, 196, 1)]
)
def test_shares_are_rounded_up_whatever_floating_point_says(ratio, count, wanted):
    assert share_of(ratio, count) == wanted


def test_selecting_by_mask_and_by_place_agree_on_nothing_at_all():
    layout = make_layout([[], []], 1, uniform=True)
    none = torch.zeros(2, 0, dtype=torch.int64)
    assert torch.equal(select_places(none, layout).index_S, select(~layout.is_patch_T, layout).index_S)
