"""Hand-over: who carries whom, against explicit loops; all ways of matching agree."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import oracle
import packs
from iared2.handover import _match_padded, carriers, hand_over, matching_macs
from iared2.tokens.packed import GONE, PackedTokens, Selection, select, select_places
from packs import PLACES, make_pack, rows_of

PREFIX = st.integers(0, 2)


def by_loops(tokens: PackedTokens, chosen: Selection, features_TF: torch.Tensor) -> list[int]:
    """The carrier of each row, image by image, pair by pair."""
    stays, goal = set(chosen.index_S.tolist()), {}
    for rows in rows_of(tokens.layout):
        kept = [r for r in rows if r in stays and tokens.layout.is_patch_T[r]]
        goal |= oracle.nearest(features_TF, [r for r in rows if r not in stays], kept)
    return [r if r in stays else goal.get(r, GONE) for r in range(len(tokens.x_TD))]


@given(kept=packs.images, prefix=PREFIX, share=st.sampled_from([0.0, 0.3, 0.7, 1.0]), seed=packs.seeds)
def test_each_dropped_token_goes_to_the_most_similar_kept_patch(kept, prefix, share, seed):
    tokens = make_pack(kept, prefix, seed=seed)
    assume(len(tokens.x_TD))
    draw = torch.Generator().manual_seed(seed)
    features_TF = torch.randn(len(tokens.x_TD), 6, dtype=torch.float64, generator=draw)
    chosen = select(packs.keep_mask(tokens.layout, draw, share), tokens.layout)
    wanted = by_loops(tokens, chosen, features_TF)
    assert carriers(features_TF, tokens, chosen).tolist() == wanted
    unit_TF = features_TF / features_TF.norm(dim=1, keepdim=True)
    stays_T = torch.zeros(len(unit_TF), dtype=torch.bool).index_fill(0, chosen.index_S, True)
    for longest in (tokens.layout.longest, tokens.layout.longest + 3):  # an upper bound is enough
        padded = _match_padded(unit_TF, stays_T & tokens.layout.is_patch_T, tokens.layout.cu_B1, longest)
        assert torch.where(stays_T, torch.arange(len(stays_T)), padded).tolist() == wanted


@given(images=st.integers(1, 3), prefix=PREFIX, k=st.integers(0, PLACES), seed=packs.seeds)
def test_equal_lengths_match_the_same_way(images, prefix, k, seed):
    tokens = make_pack([list(range(PLACES))] * images, prefix, seed=seed, uniform=True)
    draw = torch.Generator().manual_seed(seed)
    row_BK = torch.stack([torch.randperm(PLACES, generator=draw)[:k] for _ in range(images)]) + prefix
    chosen = select_places(row_BK, tokens.layout)
    features_TF = torch.randn(len(tokens.x_TD), 6, dtype=torch.float64, generator=draw)
    assert carriers(features_TF, tokens, chosen).tolist() == by_loops(tokens, chosen, features_TF)


def test_without_features_tokens_themselves_are_compared():
    tokens = make_pack([[0, 1, 2, 3]] * 2, 1)
    chosen = select(torch.tensor([True, True, False, True, False] * 2), tokens.layout)
    after = hand_over(tokens, chosen, "merge", None)
    goal = by_loops(tokens, chosen, tokens.x_TD)
    assert after.mass_T.tolist() == [goal.count(r) for r in chosen.index_S.tolist()]


def test_where_no_patch_is_kept_nothing_is_handed_over():
    tokens = make_pack([[0, 1, 2], [4, 5]], 1)
    keep_T = torch.tensor([True, False, False, False, True, True, False])
    after = hand_over(tokens, select(keep_T, tokens.layout), "merge", None)
    assert torch.equal(after.x_TD[0], tokens.x_TD[0]) and after.mass_T.tolist() == [1, 1, 2]
    assert after.carrier_BN[0].tolist() == [GONE] * PLACES
    assert {p: c for p, c in enumerate(after.carrier_BN[1].tolist()) if c != GONE} == {4: 4, 5: 4}


def test_prefix_tokens_never_receive_however_similar():
    tokens = make_pack([[0, 1]], 1)
    x_TD = torch.tensor([[1.0, 0, 0, 0], [1.0, 0, 0, 0], [-1.0, 1, 0, 0]], dtype=torch.float64)
    after = hand_over(tokens.with_x(x_TD), select(torch.tensor([True, False, True]), tokens.layout), "merge", None)
    assert torch.equal(after.x_TD[0], x_TD[0]) and after.mass_T.tolist() == [1, 2]


def test_discard_forgets():
    tokens = make_pack([[0, 1, 2]], 1)
    chosen = select(torch.tensor([True, False, True, False]), tokens.layout)
    after = hand_over(tokens, chosen, "discard", torch.randn(4, 3))
    assert after.mass_T is None and torch.equal(after.x_TD, tokens.x_TD[[0, 2]])
    assert [p for p in after.carrier_BN[0].tolist() if p != GONE] == [1]


def test_discard_after_merge_keeps_what_the_kept_carry():
    tokens = make_pack([[0, 1, 2, 3]], 0)
    x_TD = torch.tensor([[1.0, 0, 0, 0], [1, 0.1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0.1]], dtype=torch.float64)
    merged = hand_over(tokens.with_x(x_TD), select(torch.tensor([True, False, True, False]), tokens.layout), "merge", None)
    after = hand_over(merged, select(torch.tensor([False, True]), merged.layout), "discard", None)
    assert after.mass_T.tolist() == [2] and after.carrier_BN[0].tolist()[:4] == [GONE, GONE, 2, 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(dtype):
    """Means are formed in fp32 and rounded at the end; masses stay whole numbers."""
    tokens = make_pack([list(range(PLACES))] * 3, 1, width=16, dtype=dtype)
    chosen = select(packs.keep_mask(tokens.layout, torch.Generator().manual_seed(1), 0.3), tokens.layout)
    features_TF = torch.randn(len(tokens.x_TD), 8)
    after = hand_over(tokens, chosen, "merge", features_TF)
    exact = hand_over(tokens.with_x(tokens.x_TD.double()), chosen, "merge", features_TF)
    assert after.x_TD.dtype == dtype and after.mass_T.dtype == torch.float32
    assert after.mass_T.tolist() == exact.mass_T.tolist() and float(exact.mass_T.max()) > 2
    assert torch.equal(after.x_TD, exact.x_TD.float().to(dtype))


def test_no_gradient_flows_through_the_choice_but_through_the_mean():
    tokens = make_pack([[0, 1, 2]], 0)
    x_TD, features_TF = tokens.x_TD.requires_grad_(), torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    after = hand_over(tokens, select(torch.tensor([True, False, False]), tokens.layout), "merge", features_TF)
    after.x_TD.sum().backward()
    assert features_TF.grad is None and torch.allclose(x_TD.grad, torch.full((3, 4), 1 / 3).double())


def test_the_operator_keeps_torchs_contract():
    tokens = make_pack([[0, 1, 2], [3]], 1)
    stays_T = torch.tensor([True, False, True, False, True, True])
    layout = tokens.layout
    torch.library.opcheck(torch.ops.iared2.match.default, (tokens.x_TD, stays_T, layout.is_patch_T, layout.cu_B1, layout.longest))


def test_matching_costs_one_product_per_pair_and_one_norm_per_token():
    assert matching_macs(3, 5, 7) == 3 * 5 * 7 + (3 + 5) * 7
    assert matching_macs(0, 5, 7) == matching_macs(5, 0, 7) == 0
