"""What a token is worth: against pair-by-pair loops in float64, on every path the library takes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import iared2
import oracle
from families import FAMILIES
from iared2.errors import ConfigError
from iared2.interpreter import InterpreterConfig, relative_log
from iared2.similarity import compare, nearest_better
from iared2.tokens.attention import class_logits
from iared2.tokens.padded import LONG, STEP, one_bucket, times_own_matrix
from iared2.train.budget import reduced_for
from iared2.train.together_settings import TogetherSettings
from iared2.worth import Worth, WorthConfig
from packs import make_layout, make_pack, rows_of, seeds, some_places

images = st.lists(some_places, min_size=1, max_size=4)


def worth(redundancy: float = 0.7, offset: float = -0.4, steepness: float = 2.5, **parts: bool | None) -> Worth:
    module = Worth(WorthConfig(redundancy=redundancy, steepness=steepness, **parts)).double()
    module.offset.data.fill_(offset)
    return module


def chances(module: Worth, score_T: torch.Tensor, tokens, feature_TF: torch.Tensor | None = None) -> torch.Tensor:
    """Chances by cosines of features, or of the tokens themselves."""
    features = tokens.x_TD if feature_TF is None else feature_TF
    return module(score_T, tokens, compare(features, tokens.layout, module.relevance(score_T, tokens).detach()))


@given(images, seeds, st.booleans(), st.booleans(), st.booleans())
@settings(deadline=None)
def test_chances_are_the_oracles(kept, seed, weighed, counted, pairs):
    tokens = make_pack(kept, prefix=2, width=5, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    score_T = torch.rand(len(tokens.x_TD), dtype=torch.float64, generator=draw) * 0.9 + 0.05
    feature_TF = torch.randn(len(tokens.x_TD), 6, dtype=torch.float64, generator=draw)
    if weighed:
        tokens = type(tokens)(tokens.x_TD, tokens.layout, torch.randint(1, 9, score_T.shape, generator=draw).double())
    chance_T = chances(worth(mass=counted, pairs=pairs), score_T, tokens, feature_TF)
    for rows in rows_of(tokens.layout):
        patches = rows[2:]
        mass = [1.0] * len(patches) if tokens.mass_T is None or not counted else tokens.mass_T[patches].tolist()
        wanted = oracle.chances(score_T[patches], mass, feature_TF[patches], (0.7, -0.4, 2.5), pairs)
        assert chance_T[patches].tolist() == pytest.approx(wanted, rel=1e-7, abs=1e-9)


@given(images, seeds, st.booleans())
@settings(deadline=None)
def test_the_padded_comparison_of_accelerators_is_that_of_the_host(kept, seed, pairs):
    tokens = make_pack(kept, prefix=1, seed=seed)
    layout, draw = tokens.layout, torch.Generator().manual_seed(seed)
    relevance_T = torch.randint(1, 4, (len(tokens.x_TD),), generator=draw).double()  # ties
    found_T = nearest_better(compare(tokens.x_TD, layout, relevance_T), pairs)
    for longest in (layout.longest, layout.longest + 2):
        layout.__dict__["_padding"] = one_bucket(layout.cu_B1, layout.image_T, longest)
        torch.testing.assert_close(nearest_better(compare(tokens.x_TD, layout, relevance_T), pairs), found_T)
    assert (found_T[~layout.is_patch_T] == -1).all()


@pytest.mark.parametrize("pairs", [False, True])
def test_equal_lengths_take_the_batched_path_to_the_same_answer(pairs):
    kept = [[0, 3, 5], [1, 2, 11]]
    ragged, uniform = make_pack(kept, seed=3), make_pack(kept, seed=3, uniform=True)
    relevance_T = torch.tensor([0.0, 3, 1, 2, 0, 5, 5, 1], dtype=torch.float64)
    found = [nearest_better(compare(tokens.x_TD, tokens.layout, relevance_T), pairs) for tokens in (ragged, uniform)]
    torch.testing.assert_close(*found)


@given(images, seeds, st.integers(0, 3), st.booleans(), st.integers(0, 3))
@settings(deadline=None)
def test_pairs_are_the_loops_whatever_is_level(kept, seed, prefix, apart, padded):
    """Angles of few values, so that cosines and relevance are level in any combination; with prefix tokens and without."""
    tokens = make_pack(kept, prefix=prefix, seed=seed)
    layout, draw = tokens.layout, torch.Generator().manual_seed(seed)
    rows = len(layout.image_T)
    step_T = torch.randint(4, (rows,), generator=draw)
    feature_TF = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 1, 1], [1, -1, 1, 1]], dtype=torch.float64)[step_T]
    score_T = (torch.randperm(rows, generator=draw) + 1 if apart else torch.randint(1, 4, (rows,), generator=draw)).double() / 100
    if padded:
        layout.__dict__["_padding"] = one_bucket(layout.cu_B1, layout.image_T, layout.longest + padded - 1)
    chance_T = chances(worth(pairs=True), score_T, tokens, feature_TF)
    for owned in rows_of(layout):
        patches = owned[prefix:]
        wanted = oracle.chances(score_T[patches], [1.0] * len(patches), feature_TF[patches], (0.7, -0.4, 2.5), pairs=True)
        assert chance_T[patches].tolist() == pytest.approx(wanted, rel=1e-7, abs=1e-9)


def test_half_precision_finds_the_pairs_of_full_precision():
    """Ties that differ by less than bfloat16 can tell, on the path that models take."""
    kept, draw = [list(range(12))] * 3, torch.Generator().manual_seed(0)
    tokens = make_pack(kept, prefix=1, width=6, dtype=torch.float32)
    tokens = tokens.with_x(1 + 0.02 * torch.randn(len(tokens.x_TD), 6, generator=draw))
    reducer = ready(pairs=True).reducers[0]
    score_T = torch.rand(len(tokens.x_TD), generator=draw)
    wanted_T = reducer.judge(score_T, tokens, None).chance_T
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(reducer.judge(score_T, tokens, None).chance_T, wanted_T)
    halved_T = reducer.judge(score_T, tokens.with_x(tokens.x_TD.bfloat16()), None).chance_T
    rounded_T = reducer.judge(score_T, tokens.with_x(tokens.x_TD.bfloat16().float()), None).chance_T
    torch.testing.assert_close(halved_T, rounded_T)


def test_damage_shows_in_pairs_too():
    tokens = make_pack([[0, 1, 2, 3]], prefix=1, seed=0)
    feature_TF = tokens.x_TD.clone()
    feature_TF[2] = float("nan")
    found_T = nearest_better(compare(feature_TF, tokens.layout, torch.tensor([0.0, 4, 3, 2, 1], dtype=torch.float64)), pairs=True)
    assert found_T[1:].isnan().any()


@given(images, seeds, st.integers(1, 3))
@settings(deadline=None)
def test_of_patches_in_pairs_at_most_half_have_a_partner_even_if_all_are_alike(kept, seed, kinds):
    """With few kinds of patches, so that many are equal, as are many ties and much relevance."""
    tokens = make_pack(kept, prefix=1, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    rows = len(tokens.x_TD)
    feature_TF = torch.eye(kinds, dtype=torch.float64)[torch.randint(kinds, (rows,), generator=draw)]
    relevance_T = torch.randint(1, 4, (rows,), generator=draw).double()
    every_T = nearest_better(compare(feature_TF, tokens.layout, relevance_T))
    paired_T = nearest_better(compare(feature_TF, tokens.layout, relevance_T), pairs=True)
    for _, *patches in rows_of(tokens.layout):
        paired = paired_T[patches] > -1
        assert paired.sum() <= len(patches) // 2
        assert (paired_T[patches][paired] == every_T[patches][paired]).all()
        if (every_T[patches] == 1).any():  # somebody has an equal, so somebody has a partner
            assert paired.any()


def test_the_closest_two_are_a_pair_and_a_third_is_not_redundant_for_their_sake():
    """Relevance falls from left to right: the second is nearest to the first, the third nearest to the second, at a greater distance."""
    angle = torch.tensor([0.0, 0.0, 0.1, 0.3, 1.5], dtype=torch.float64)
    feature_TF = torch.stack([angle.cos(), angle.sin()], dim=1)
    tokens = make_pack([[0, 1, 2, 3]], prefix=1)
    relevance_T = torch.tensor([9.0, 4, 3, 2, 1], dtype=torch.float64)
    found_T = nearest_better(compare(feature_TF, tokens.layout, relevance_T), pairs=True)
    assert found_T.tolist() == pytest.approx([-1, -1, float(torch.tensor(0.1).cos()), -1, -1], abs=1e-6)
    every_T = nearest_better(compare(feature_TF, tokens.layout, relevance_T))
    assert every_T[3] == pytest.approx(float(torch.tensor(0.2).cos()), abs=1e-6)


@pytest.mark.parametrize(
    ("parts", "named"),
    [
        ({"pairs": True}, "pairs: got true"),
        ({"comparing": 2}, "comparing: got 2"),
        ({"pairs": True, "comparing": 2}, "pairs: got true, comparing: got 2"),
    ],
)
def test_what_would_do_nothing_without_redundancy_is_refused(parts, named):
    with pytest.raises(ValueError, match=f"{named}, but with redundancy=0 nothing is compared; leave that out, or raise redundancy"):
        WorthConfig(redundancy=0.0, **parts)


GONE = WorthConfig(pairs=True, comparing=2)


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        (WorthConfig(), GONE),
        (WorthConfig(pairs=True), GONE),
        (WorthConfig(comparing=5), WorthConfig(pairs=True, comparing=5)),
        (WorthConfig(pairs=False), WorthConfig(pairs=False)),
        (WorthConfig(redundancy=0.0), WorthConfig(redundancy=0.0)),
        (None, None),
    ],
)
def test_training_chooses_what_nobody_has_set_where_what_is_dropped_is_gone(asked, found):
    build = FAMILIES["deit"].build
    assert reduced_for(TogetherSettings(on_drop="discard", worth=asked), build()).config.worth == found
    for on_drop in ("merge", "fuse"):
        assert reduced_for(TogetherSettings(on_drop=on_drop, worth=asked), build()).config.worth == asked


@pytest.mark.parametrize(("on_drop", "pairs"), [("discard", None), ("discard", True), ("merge", None)])
def test_reductions_behind_those_that_compare_go_by_relevance_alone(on_drop, pairs):
    kinds = ({"comparing": 1, "pairs": pairs}, {"pairs": pairs}, {"redundancy": 0.0})
    model, everywhere, nowhere = (ready(on_drop=on_drop, **parts) for parts in kinds)
    assert [reducer.worth.compares for reducer in model.reducers] == [True, False, False]
    pixels = FAMILIES["deit"].images(4)
    with torch.no_grad():
        state = model.walk_to(model.start(pixels), 0, reduce=())
        for group, one_alike in enumerate((everywhere, nowhere, nowhere)):
            state = model.walk_to(state, group, reduce=())
            score_T = model.reducers[group].interpreter(state.tokens, state.class_TH)
            found, wanted = (some.reducers[group].judge(score_T, state.tokens, state.key_THK) for some in (model, one_alike))
            assert torch.equal(found.chance_T, wanted.chance_T)
            other = (nowhere if group == 0 else everywhere).reducers[group].judge(score_T, state.tokens, state.key_THK)
            assert not torch.equal(found.chance_T, other.chance_T)
            state = model.reduce_with(state, group)


@pytest.mark.parametrize("comparing", [0, -1, True, 2.0, "2"])
def test_how_many_compare_is_a_whole_number_from_one(comparing):
    with pytest.raises(ValueError, match="comparing"):
        WorthConfig(comparing=comparing)


def test_more_that_compare_than_there_are_is_all():
    assert all(reducer.worth.compares for reducer in ready(comparing=9).reducers)


def test_what_is_not_compared_costs_nothing():
    model, everywhere, nowhere = (ready(on_drop="discard", **parts) for parts in ({"comparing": 1}, {}, {"redundancy": 0.0}))
    for group, one_alike in enumerate((everywhere, nowhere, nowhere)):
        assert model.reducers[group].macs(12, 7) == one_alike.reducers[group].macs(12, 7)
    assert everywhere.reducers[1].macs(12, 7) > nowhere.reducers[1].macs(12, 7)


def test_pairs_decide_what_a_model_drops():
    pixels, kept = FAMILIES["deit"].images(4), []
    for pairs in (False, True):
        model = ready(on_drop="discard", pairs=pairs)
        with torch.no_grad():
            kept.append(model.trace(pixels)[1].keep_GBN)
    assert not torch.equal(*kept)


def test_of_two_copies_one_stays():
    """Two equal tokens must not each be dropped because of the other."""
    tokens = make_pack([[0, 1, 2]], prefix=1)
    x_TD = tokens.x_TD.clone()
    x_TD[2] = x_TD[1]
    chance_T = chances(worth(redundancy=1.0, offset=0.0), torch.full((4,), 0.5, dtype=torch.float64), tokens.with_x(x_TD))
    assert chance_T[2] < 1e-6
    assert chance_T[1] > 0.3


def test_without_redundancy_features_do_not_matter_and_nothing_is_compared():
    tokens = make_pack([[0, 4, 7]], prefix=1)
    score_T = torch.tensor([0.5, 0.2, 0.4, 0.6], dtype=torch.float64)
    chance_T = worth(redundancy=0.0, offset=0.0, steepness=1.0)(score_T, tokens, None)
    share_T = score_T[1:] / 0.4
    torch.testing.assert_close(chance_T[1:], share_T / (1 + share_T))
    model = iared2.reduce(FAMILIES["deit"].build(), 2, worth=WorthConfig(redundancy=0.0))
    assert not model.reducers[0].wants_keys


def test_gradients_reach_the_scores_and_both_weights():
    tokens = make_pack([[0, 1, 2, 5], [3, 4]], prefix=1)
    score_T = torch.rand(8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).add_(0.1).requires_grad_()
    module = worth()
    assert torch.autograd.gradcheck(lambda s: chances(module, s, tokens)[tokens.layout.is_patch_T], (score_T,))
    chances(module, score_T, tokens)[tokens.layout.is_patch_T].sum().backward()
    assert module.redundancy.grad.abs() > 1e-3 and module.offset.grad.abs() > 1e-3


def test_class_logits_are_the_first_tokens_attention():
    tokens = make_pack([[0, 1, 2, 5], [3, 4]], prefix=1)
    draw = torch.Generator().manual_seed(1)
    q_THK, k_THK = (torch.randn(8, 2, 3, dtype=torch.float64, generator=draw) for _ in range(2))
    logit_TH = class_logits(q_THK, k_THK, tokens.layout)
    for rows in rows_of(tokens.layout):
        for head in range(2):
            wanted = [float(q_THK[rows[0], head] @ k_THK[row, head]) / 3**0.5 for row in rows]
            assert logit_TH[rows, head].tolist() == pytest.approx(wanted, rel=1e-5)
            a = torch.tensor(wanted[1:]).softmax(0)
            assert relative_log(logit_TH, tokens.layout)[rows[1:], head].tolist() == pytest.approx((a * len(a)).log().tolist(), abs=1e-5)


@given(st.lists(st.integers(0, 60), min_size=1, max_size=4), seeds, st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
@settings(deadline=None)
def test_images_one_by_one_are_images_side_by_side(patches, seed, dtype):
    """What the host does image by image where images are long is what accelerators do in one padded product."""
    layout, draw = make_layout([list(range(count)) for count in patches], 1, (1, 60)), torch.Generator().manual_seed(seed)
    rows = len(layout.image_T)
    x_TD, weight_BDH = torch.randn(rows, 5, generator=draw).to(dtype), torch.randn(len(patches), 5, 2, generator=draw).to(dtype)
    q_THK, k_THK = (torch.randn(rows, 2, 3, generator=draw).to(dtype) for _ in range(2))
    long = sum(layout.lengths) >= LONG * len(patches)
    assert layout.padding.lengths == (tuple(layout.lengths) if long else None)
    for bucket in layout.padding.buckets:
        longest = max(layout.lengths[image] for image in bucket.image_b.tolist())
        assert bucket.row_bL.shape[1] == (longest if longest < LONG else math.ceil(longest / STEP) * STEP)
    found = times_own_matrix(x_TD, weight_BDH, layout.padding), class_logits(q_THK, k_THK, layout)
    layout.__dict__["_padding"] = one_bucket(layout.cu_B1, layout.image_T, layout.longest)
    wanted = times_own_matrix(x_TD, weight_BDH, layout.padding), class_logits(q_THK, k_THK, layout)
    assert found[0].dtype == found[1].dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("place", ["before", "between"])
def test_a_fresh_interpreter_with_context_ranks_as_the_class_attention_does(place):
    """With small random weights the score is class attention, of this block or the one before, squashed."""
    backbone, pixels = FAMILIES["deit"].build(), FAMILIES["deit"].images()
    model = iared2.reduce(backbone, (2,), place=place, interpreter=InterpreterConfig(context=True)).eval()
    for name, parameter in model.reducers.named_parameters():
        if name.endswith("query.weight"):
            torch.nn.init.zeros_(parameter)
    found = []
    block = backbone.blocks[2 if place == "between" else 1]
    block.attn.fused_attn = False  # weights exist only outside of fused kernels
    block.attn.attn_drop.register_forward_hook(lambda _m, x, _y: found.append(x[0]))
    with torch.no_grad():
        x = backbone.norm_pre(backbone._pos_embed(backbone.patch_embed(pixels)))
        for number in range(3):
            x = backbone.blocks[number](x)
        _, trace = model.trace(pixels)
    attention_BHN = found[0][:, :, 0, 1:]
    logit_BHN = (attention_BHN / attention_BHN.mean(-1, keepdim=True)).log() + torch.logit(torch.tensor(0.9))
    torch.testing.assert_close(trace.score_GBN[0], logit_BHN.sigmoid().mean(1), rtol=1e-3, atol=3e-4)


@pytest.mark.parametrize("name", ["siglip", "diff_attention"])
def test_context_without_plain_class_attention_is_refused(name):
    with pytest.raises(ConfigError, match="context=true needs plain attention with a class token"):
        iared2.reduce(FAMILIES[name].build(), 2, interpreter=InterpreterConfig(context=True))


def test_context_with_other_heads_than_attention_has_is_refused():
    with pytest.raises(ConfigError, match=r"got 8 heads, wanted 4"):
        iared2.reduce(FAMILIES["deit"].build(), (2,), interpreter=InterpreterConfig(context=True, heads=8))


def test_context_before_the_first_block_is_refused():
    with pytest.raises(ConfigError, match="reduce from block 1 on, or between"):
        iared2.reduce(FAMILIES["deit"].build(), 2, interpreter=InterpreterConfig(context=True))


@pytest.mark.parametrize("place", ["before", "between"])
def test_an_image_is_answered_the_same_alone_and_in_company(place):
    model = ready(place)
    pixels = FAMILIES["deit"].images(5)
    with torch.no_grad():
        together, trace = model.trace(pixels)
        assert len(set(trace.macs)) > 1
        for index in range(5):
            torch.testing.assert_close(model(pixels[index : index + 1])[0], together[index], rtol=1e-4, atol=1e-5)


def ready(place: str = "between", on_drop: str = "merge", **parts: bool | float | None) -> iared2.ReducedTransformer:
    """A model that drops different patches in different images. `parts` are `WorthConfig`'s."""
    interpreter = InterpreterConfig(policy="class", context=True)
    torch.manual_seed(0)
    worth = WorthConfig(**parts)
    model = iared2.reduce(FAMILIES["deit"].build(), (1, 2, 3), interpreter=interpreter, worth=worth, place=place, on_drop=on_drop)
    for reducer in model.reducers:
        torch.nn.init.normal_(reducer.interpreter.query.weight, std=0.7)
        reducer.worth.offset.data.fill_(-1.0)
    return model.eval()


@pytest.mark.parametrize("parts", [{}, {"pairs": True}, {"pairs": True, "comparing": 1, "redundancy": 0.4}])
def test_saved_and_loaded_it_is_the_same(tmp_path, parts):
    model, pixels = ready(**parts), FAMILIES["deit"].images(3)
    model.save_pretrained(tmp_path)
    again = iared2.load_reduced(tmp_path, backbone=FAMILIES["deit"].build())
    assert again.config == model.config and again.config.place == "between" and again.config.worth is not None
    torch.testing.assert_close(again(pixels), model(pixels))


@pytest.mark.untyped
@pytest.mark.parametrize(("on_drop", "pairs"), [("discard", False), ("discard", True), ("merge", False), ("fuse", False)])
def test_compiled_it_is_the_same_for_all_lengths(on_drop, pairs):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model, counter = ready(on_drop=on_drop, pairs=pairs), CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter)
    with torch.no_grad():
        for step in range(8):
            pixels = torch.randn(2 + step % 4, 3, 32, 32)
            torch.testing.assert_close(compiled(pixels), model(pixels))
            if step == 2:
                warm = counter.frame_count
    assert counter.frame_count == warm
