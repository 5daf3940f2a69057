"""Hand-over: who carries whom, against explicit loops; all ways of matching agree."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import iared2
import oracle
import packs
from families import FAMILIES
from iared2.handover import Judged, Merging, carriers, comparing_macs, hand_over
from iared2.similarity import compare
from iared2.tokens.packed import GONE, PackedTokens, Selection, gone_rows, select, select_places
from iared2.tokens.padded import one_bucket
from packs import PLACES, make_pack, rows_of

PREFIX = st.integers(0, 2)


def merged(tokens: PackedTokens, chosen: Selection, how: str = "merge", features_TF: torch.Tensor | None = None, **options) -> PackedTokens:
    """The hand-over by cosines of features, or of the tokens themselves."""
    one_T = torch.ones(len(tokens.x_TD))
    cosines = compare(tokens.x_TD if features_TF is None else features_TF, tokens.layout)
    return hand_over(tokens, chosen, how, Judged(one_T, one_T, cosines), **options)


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
    gone_G, layout = gone_rows(chosen, len(tokens.x_TD)), tokens.layout
    loops = by_loops(tokens, chosen, features_TF)
    wanted = [loops[row] for row in gone_G.tolist()]
    assert sorted(gone_G.tolist() + chosen.index_S.tolist()) == list(range(len(tokens.x_TD)))
    assert carriers(compare(features_TF, layout), chosen, gone_G).tolist() == wanted
    ordered = compare(features_TF, layout, torch.rand(len(features_TF), dtype=torch.float64, generator=draw))
    assert carriers(ordered, chosen, gone_G).tolist() == wanted  # the order of comparison is nobody's business
    for longest in (layout.longest, layout.longest + 3):  # accelerators know an upper bound only
        layout.__dict__["_padding"] = one_bucket(layout.cu_B1, layout.image_T, longest)
        assert carriers(compare(features_TF, layout), chosen, gone_G).tolist() == wanted


@given(images=st.integers(1, 3), prefix=PREFIX, k=st.integers(0, PLACES), seed=packs.seeds)
def test_equal_lengths_match_the_same_way(images, prefix, k, seed):
    tokens = make_pack([list(range(PLACES))] * images, prefix, seed=seed, uniform=True)
    draw = torch.Generator().manual_seed(seed)
    row_BK = torch.stack([torch.randperm(PLACES, generator=draw)[:k] for _ in range(images)]) + prefix
    chosen = select_places(row_BK, tokens.layout)
    features_TF = torch.randn(len(tokens.x_TD), 6, dtype=torch.float64, generator=draw)
    gone_G, loops = gone_rows(chosen, len(tokens.x_TD)), by_loops(tokens, chosen, features_TF)
    assert carriers(compare(features_TF, tokens.layout), chosen, gone_G).tolist() == [loops[row] for row in gone_G.tolist()]


def test_without_features_tokens_themselves_are_compared():
    tokens = make_pack([[0, 1, 2, 3]] * 2, 1)
    chosen = select(torch.tensor([True, True, False, True, False] * 2), tokens.layout)
    after = merged(tokens, chosen)
    goal = by_loops(tokens, chosen, tokens.x_TD)
    assert after.mass_T.tolist() == [goal.count(r) for r in chosen.index_S.tolist()]


def test_where_no_patch_is_kept_nothing_is_handed_over():
    tokens = make_pack([[0, 1, 2], [4, 5]], 1)
    keep_T = torch.tensor([True, False, False, False, True, True, False])
    after = merged(tokens, select(keep_T, tokens.layout))
    assert torch.equal(after.x_TD[0], tokens.x_TD[0]) and after.mass_T.tolist() == [1, 1, 2]
    assert after.carrier_BN[0].tolist() == [GONE] * PLACES
    assert {p: c for p, c in enumerate(after.carrier_BN[1].tolist()) if c != GONE} == {4: 4, 5: 4}


def test_prefix_tokens_never_receive_however_similar():
    tokens = make_pack([[0, 1]], 1)
    x_TD = torch.tensor([[1.0, 0, 0, 0], [1.0, 0, 0, 0], [-1.0, 1, 0, 0]], dtype=torch.float64)
    after = merged(tokens.with_x(x_TD), select(torch.tensor([True, False, True]), tokens.layout))
    assert torch.equal(after.x_TD[0], x_TD[0]) and after.mass_T.tolist() == [1, 2]


def test_discard_forgets():
    tokens = make_pack([[0, 1, 2]], 1)
    chosen = select(torch.tensor([True, False, True, False]), tokens.layout)
    after = hand_over(tokens, chosen, "discard")
    assert after.mass_T is None and torch.equal(after.x_TD, tokens.x_TD[[0, 2]])
    assert [p for p in after.carrier_BN[0].tolist() if p != GONE] == [1]


def test_discard_after_merge_keeps_what_the_kept_carry():
    tokens = make_pack([[0, 1, 2, 3]], 0)
    x_TD = torch.tensor([[1.0, 0, 0, 0], [1, 0.1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0.1]], dtype=torch.float64)
    first = merged(tokens.with_x(x_TD), select(torch.tensor([True, False, True, False]), tokens.layout))
    after = hand_over(first, select(torch.tensor([False, True]), first.layout), "discard")
    assert after.mass_T.tolist() == [2] and after.carrier_BN[0].tolist()[:4] == [GONE, GONE, 2, 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(dtype):
    """Means are formed in fp32 and rounded at the end; masses stay whole numbers."""
    tokens = make_pack([list(range(PLACES))] * 3, 1, width=16, dtype=dtype)
    chosen = select(packs.keep_mask(tokens.layout, torch.Generator().manual_seed(1), 0.3), tokens.layout)
    features_TF = torch.randn(len(tokens.x_TD), 8)
    after = merged(tokens, chosen, features_TF=features_TF)
    exact = merged(tokens.with_x(tokens.x_TD.double()), chosen, features_TF=features_TF)
    assert after.x_TD.dtype == dtype and after.mass_T.dtype == torch.float32
    assert after.mass_T.tolist() == exact.mass_T.tolist() and float(exact.mass_T.max()) > 2
    assert torch.equal(after.x_TD, exact.x_TD.float().to(dtype))


def test_no_gradient_flows_through_the_choice_but_through_the_mean():
    tokens = make_pack([[0, 1, 2]], 0)
    x_TD, features_TF = tokens.x_TD.requires_grad_(), torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    after = merged(tokens, select(torch.tensor([True, False, False]), tokens.layout), features_TF=features_TF)
    after.x_TD.sum().backward()
    assert features_TF.grad is None and torch.allclose(x_TD.grad, torch.full((3, 4), 1 / 3).double())


@given(kept=packs.images, prefix=PREFIX, share=st.sampled_from([0.0, 0.3, 0.7, 1.0]), seed=packs.seeds)
def test_fusing_makes_one_token_of_all_that_are_dropped(kept, prefix, share, seed):
    tokens = make_pack(kept, prefix, seed=seed)
    assume(len(tokens.x_TD))
    draw = torch.Generator().manual_seed(seed)
    score_T = torch.randint(3, (len(tokens.x_TD),), generator=draw) / 2  # with ties
    chosen, layout = select(packs.keep_mask(tokens.layout, draw, share), tokens.layout), tokens.layout
    after = hand_over(tokens, chosen, "fuse", Judged(score_T, score_T))
    stays, rows = set(chosen.index_S.tolist()), []
    for image in rows_of(layout):
        gone = [r for r in image if r not in stays]
        best = max(gone, key=lambda r: (score_T[r], -r), default=None)
        rows += [gone if row == best else [row] for row in image if row in stays or row == best]
    assert after.mass_T.tolist() == [len(parts) for parts in rows]
    for found_D, parts in zip(after.x_TD, rows, strict=True):
        torch.testing.assert_close(found_D, tokens.x_TD[parts].mean(0))
    assert (after.carrier_BN >= 0).sum() == layout.is_patch_T.sum()  # nobody is lost, even where no patch is kept


@given(images=st.integers(1, 3), prefix=PREFIX, k=st.integers(0, PLACES), seed=packs.seeds)
def test_fusing_keeps_equal_lengths_equal(images, prefix, k, seed):
    draw = torch.Generator().manual_seed(seed)
    uniform, ragged = (make_pack([list(range(PLACES))] * images, prefix, seed=seed, uniform=known) for known in (True, False))
    row_BK = torch.stack([torch.randperm(PLACES, generator=draw)[:k] for _ in range(images)]) + prefix
    chosen = select_places(row_BK, uniform.layout)
    score_T = torch.rand(len(uniform.x_TD), generator=draw)
    after = hand_over(uniform, chosen, "fuse", Judged(score_T, score_T))
    wanted = hand_over(ragged, Selection(chosen.index_S, chosen.cu_B1), "fuse", Judged(score_T, score_T))
    assert after.layout.uniform == prefix + min(k + 1, PLACES)
    assert torch.equal(after.x_TD, wanted.x_TD) and torch.equal(after.layout.origin_T, wanted.layout.origin_T)
    assert torch.equal(after.layout.cu_B1, wanted.layout.cu_B1) and torch.equal(after.carrier_BN, wanted.carrier_BN)


@given(kept=packs.images, prefix=PREFIX, share=st.sampled_from([0.0, 0.3, 0.7]), seed=packs.seeds)
def test_where_the_kept_alone_count_the_best_that_is_dropped_stands_for_all_others(kept, prefix, share, seed):
    tokens = make_pack(kept, prefix, seed=seed)
    assume(len(tokens.x_TD))
    draw = torch.Generator().manual_seed(seed)
    score_T = torch.rand(len(tokens.x_TD), generator=draw)
    chosen = select(packs.keep_mask(tokens.layout, draw, share), tokens.layout)
    after = hand_over(tokens, chosen, "fuse", Judged(score_T, score_T), Merging(weights="kept"))
    assert torch.equal(after.x_TD, tokens.x_TD[[row for row in range(len(tokens.x_TD)) if row in goes_on(tokens, chosen, score_T)]])
    averaged = hand_over(tokens, chosen, "fuse", Judged(score_T, score_T))
    assert torch.equal(after.mass_T, averaged.mass_T) and torch.equal(after.carrier_BN, averaged.carrier_BN)


def goes_on(tokens: PackedTokens, chosen: Selection, score_T: torch.Tensor) -> set[int]:
    """The chosen rows and the best of every image's others."""
    stays = set(chosen.index_S.tolist())
    gone = [[r for r in image if r not in stays] for image in rows_of(tokens.layout)]
    return stays | {max(rows, key=lambda r: score_T[r]) for rows in gone if rows}


def test_fusing_without_relevance_is_a_mistake_of_the_caller():
    tokens = make_pack([[0, 1, 2]], 1)
    with pytest.raises(ValueError, match="how relevant tokens are"):
        hand_over(tokens, select(torch.tensor([True, False, True, False]), tokens.layout), "fuse")


def test_merging_without_similarities_is_a_mistake_of_the_caller():
    tokens, one_T = make_pack([[0, 1, 2]], 1), torch.ones(4)
    with pytest.raises(ValueError, match="how similar tokens are"):
        hand_over(tokens, select(torch.tensor([True, False, True, False]), tokens.layout), "merge", Judged(one_T, one_T))


def test_comparing_costs_one_product_per_pair_and_one_norm_per_token():
    assert comparing_macs(5, 7) == 5 * 5 * 7 + 5 * 7


@pytest.mark.parametrize("place", ["before", "between"])
@pytest.mark.parametrize("block", [0, 2])
@pytest.mark.parametrize("weights", ["mass", "score", "kept"])
def test_tokens_are_compared_as_the_next_half_of_the_block_reads_them(place, block, weights):
    """Step by step through timm's own modules, in float64: who carries whom, and what comes of it."""
    backbone = FAMILIES["deit"].build().double().eval()
    images = FAMILIES["deit"].images(2).double()
    module, draw = backbone.blocks[block], torch.Generator().manual_seed(0)
    with torch.no_grad():
        for norm in (module.norm1, module.norm2):  # so that the order of similarity is not that of the tokens themselves
            norm.weight.copy_(torch.rand(len(norm.weight), generator=draw, dtype=torch.float64) ** 4)
        x_BSD = backbone._pos_embed(backbone.patch_embed(images))
        for earlier in backbone.blocks[:block]:
            x_BSD = earlier(x_BSD)
        x_BSD = x_BSD if place == "before" else x_BSD + module.attn(module.norm1(x_BSD))
        read_BSD = (module.norm1 if place == "before" else module.norm2)(x_BSD)
    settings = {"similarity": "tokens", "weights": weights, "place": place, "rule": "top_k", "ratios": (0.4,)}
    model = iared2.reduce(backbone, (block,), on_drop="merge", **settings).eval()
    with torch.no_grad():
        state = model.walk_to(model.start(images), 0, reduce=())
        after = model.reduce_with(state, 0)
    (reduction,), prefix, count = after.reductions, backbone.num_prefix_tokens, x_BSD.shape[1]
    chosen, other = reduction.chosen.index_S.tolist(), []
    for image in range(2):
        score_S = reduction.score_T[image * count : (image + 1) * count]
        kept = [row for row in range(prefix, count) if image * count + row in chosen]
        gone = [row for row in range(prefix, count) if row not in kept]
        goal = oracle.nearest(read_BSD[image], gone, kept)
        other.append(goal != oracle.nearest(x_BSD[image], gone, kept))
        for row in kept:
            parts = [row] + [part for part in gone if goal[part] == row]
            counts = {"mass": torch.ones(len(parts)), "score": score_S[parts], "kept": torch.arange(len(parts)) == 0}
            count_P = counts[weights].double()
            wanted_D = (x_BSD[image, parts] * count_P[:, None]).sum(0) / count_P.sum()
            assert torch.allclose(after.tokens.x_TD[chosen.index(image * count + row)], wanted_D, atol=1e-6)
            assert after.tokens.mass_T[chosen.index(image * count + row)] == len(parts)
    assert any(other), "the norm changed nothing, so this test would not see it missing"


def test_what_tokens_are_compared_by_costs_the_same_and_is_asked_for_alone():
    images = FAMILIES["deit"].images(2)
    models = [iared2.reduce(FAMILIES["deit"].build(), (1, 2), on_drop="merge", similarity=by).eval() for by in ("keys", "tokens")]
    for model, width in zip(models, (8, 32), strict=True):
        state = model.walk_to(model.start(images), 0, reduce=())
        assert state.key_THK.shape[-1] == width  # four heads of eight, or the token as one
    first, second = (model.macs((32, 32), 16, (8, 4)) for model in models)
    assert first == second
    models[1].configure(on_drop="discard")  # then nothing is compared
    assert models[1].walk_to(models[1].start(images), 0, reduce=()).key_THK is None


def test_blocks_whose_norms_come_last_are_read_as_they_are():
    model = iared2.reduce(FAMILIES["res_post_norm"].build(), (1,), on_drop="merge", similarity="tokens", place="between").eval()
    tokens = model.start(FAMILIES["res_post_norm"].images(1)).tokens
    assert model.adapter.read(1, tokens, half=True) is tokens.x_TD


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("on_drop", ["merge", "fuse"])
def test_weights_of_next_to_nothing_leave_numbers_in_every_precision(on_drop, dtype):
    settings = {"weights": "kept", "similarity": "tokens", "rule": "top_k", "ratios": (0.3,), "on_drop": on_drop}
    model = iared2.reduce(FAMILIES["deit"].build(), (1,), **settings).eval().to(dtype)
    state = model.reduce_with(model.walk_to(model.start(FAMILIES["deit"].images(2).to(dtype)), 0, reduce=()), 0)
    assert state.tokens.x_TD.isfinite().all() and state.tokens.mass_T.max() > 1
