"""Packing, selecting, merging and going back to the grid, against loops."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import packs
from iared2.tokens.grid import to_map, to_pixels
from iared2.tokens.packed import GONE, Selection, gone_rows, merge, pack, scatter_places, select, select_places, take, to_grid
from packs import PLACES, make_layout, make_pack, rows_of

PREFIX = st.integers(0, 3)


@given(images=st.integers(1, 4), prefix=PREFIX)
def test_pack_lays_images_one_after_the_other(images, prefix):
    x_BSD = torch.randn(images, prefix + PLACES, 5)
    tokens = pack(x_BSD, prefix, packs.GRID)
    layout = tokens.layout
    assert torch.equal(tokens.x_TD, x_BSD.reshape(-1, 5)) and tokens.mass_T is None
    assert layout.cu_B1.dtype == torch.int32 and layout.offsets == layout.cu_B1.tolist()
    assert layout.uniform == layout.longest == prefix + PLACES and layout.lengths == layout.length_B.tolist()
    assert layout.image_T.tolist() == [b for b in range(images) for _ in range(prefix + PLACES)]
    assert layout.origin_T.tolist() == [*[-1] * prefix, *range(PLACES)] * images
    assert (layout.images, layout.places) == (images, PLACES)
    assert tokens.carrier_BN.tolist() == [list(range(PLACES))] * images


def test_pack_remembers_where_patches_are_missing():
    origin_BP = torch.tensor([[2, 7, 11], [0, 1, 2]])
    tokens = pack(torch.randn(2, 4, 5), 1, packs.GRID, origin_BP)
    assert tokens.layout.origin_T.tolist() == [-1, 2, 7, 11, -1, 0, 1, 2]
    for image, places in enumerate(origin_BP.tolist()):
        assert tokens.carrier_BN[image].tolist() == [p if p in places else GONE for p in range(PLACES)]


@given(kept=packs.images, prefix=PREFIX, seed=packs.seeds)
def test_select_and_take(kept, prefix, seed):
    tokens = make_pack(kept, prefix)
    keep_T = packs.keep_mask(tokens.layout, torch.Generator().manual_seed(seed))
    chosen = select(keep_T, tokens.layout)
    rows = [r for r in range(len(keep_T)) if keep_T[r]]
    assert chosen.index_S.tolist() == rows and chosen.uniform is None and chosen.cu_B1.dtype == torch.int32
    after = take(tokens, chosen)
    lengths = [sum(bool(keep_T[r]) for r in image) for image in rows_of(tokens.layout)]
    assert after.layout.lengths == lengths and after.layout.longest >= max(lengths)
    assert torch.equal(after.x_TD, tokens.x_TD[rows])
    assert after.layout.image_T.tolist() == tokens.layout.image_T[rows].tolist()
    assert after.layout.origin_T.tolist() == tokens.layout.origin_T[rows].tolist()
    for image, image_rows in enumerate(rows_of(tokens.layout)):
        left = {int(tokens.layout.origin_T[r]) for r in image_rows if keep_T[r]}
        assert after.carrier_BN[image].tolist() == [p if p in left else GONE for p in range(PLACES)]


@given(prefix=PREFIX, images=st.integers(1, 4), k=st.integers(0, PLACES), seed=packs.seeds)
def test_select_places_equals_select(prefix, images, k, seed):
    tokens = pack(torch.randn(images, prefix + PLACES, 4), prefix, packs.GRID)
    draw = torch.Generator().manual_seed(seed)
    row_BK = torch.stack([torch.randperm(PLACES, generator=draw)[:k] for _ in range(images)]) + prefix
    keep_T = ~tokens.layout.is_patch_T
    for image in range(images):
        keep_T[image * (prefix + PLACES) + row_BK[image]] = True
    one, two = select_places(row_BK, tokens.layout), select(keep_T, tokens.layout)
    assert one.uniform == prefix + k
    assert torch.equal(one.index_S, two.index_S) and torch.equal(one.cu_B1, two.cu_B1)
    assert one.cu_B1.dtype == torch.int32


def merged(tokens, chosen: Selection, carrier_T: torch.Tensor, **options):
    """`merge`, told who carries every row."""
    gone_G = gone_rows(chosen, len(carrier_T))
    return merge(tokens, chosen, gone_G, carrier_T[gone_G], **options)


def random_carriers(tokens, chosen: Selection, draw: torch.Generator) -> torch.Tensor:
    """Each row goes to itself if chosen, else to any chosen patch of its image, or is lost."""
    carrier_T, stays = torch.full((len(tokens.x_TD),), GONE), set(chosen.index_S.tolist())
    for rows in rows_of(tokens.layout):
        goals = [r for r in rows if r in stays and tokens.layout.is_patch_T[r]]
        for row in rows:
            if row in stays:
                carrier_T[row] = row
            elif goals:
                carrier_T[row] = goals[int(torch.randint(len(goals), (1,), generator=draw))]
    return carrier_T


@given(kept=packs.images, prefix=PREFIX, steps=st.integers(1, 4), seed=packs.seeds)
def test_repeated_merges_are_means_over_patches(kept, prefix, steps, seed):
    """Whatever the order of merges, a token is the plain mean of all patches that it carries."""
    first = tokens = make_pack(kept, prefix)
    draw = torch.Generator().manual_seed(seed)
    truth = [{p: p for p in places} for places in kept]
    for _ in range(steps):
        chosen = select(packs.keep_mask(tokens.layout, draw, 0.6), tokens.layout)
        carrier_T = random_carriers(tokens, chosen, draw)
        for image, rows in enumerate(rows_of(tokens.layout)):
            origin = {int(tokens.layout.origin_T[r]): r for r in rows}
            for place, at in list(truth[image].items()):
                goal = int(carrier_T[origin[at]])
                if goal == GONE:
                    del truth[image][place]
                else:
                    truth[image][place] = int(tokens.layout.origin_T[goal])
        tokens = merged(tokens, chosen, carrier_T)
    start = {(int(i), int(o)): x for i, o, x in zip(first.layout.image_T, first.layout.origin_T, first.x_TD, strict=True)}
    for image, rows in enumerate(rows_of(tokens.layout)):
        assert tokens.carrier_BN[image].tolist() == [truth[image].get(p, GONE) for p in range(PLACES)]
        for row in rows[prefix:]:
            own = [p for p, at in truth[image].items() if at == int(tokens.layout.origin_T[row])]
            assert tokens.mass_T[row] == len(own)
            assert torch.allclose(tokens.x_TD[row], torch.stack([start[image, p] for p in own]).mean(0), atol=1e-12)
        assert torch.equal(tokens.x_TD[rows[:prefix]], first.x_TD[rows_of(first.layout)[image][:prefix]])
        assert (tokens.mass_T[rows[:prefix]] == 1).all()
        assert tokens.mass_T[rows[prefix:]].sum() == len(truth[image])


@given(kept=packs.images, prefix=PREFIX, seed=packs.seeds)
def test_to_grid_fills_every_place_by_its_carrier(kept, prefix, seed):
    tokens = make_pack(kept, prefix)
    draw = torch.Generator().manual_seed(seed)
    chosen = select(packs.keep_mask(tokens.layout, draw), tokens.layout)
    tokens = merged(tokens, chosen, random_carriers(tokens, chosen, draw))
    prefix_BLD, patch_BND = to_grid(tokens)
    for image, rows in enumerate(rows_of(tokens.layout)):
        assert torch.equal(prefix_BLD[image], tokens.x_TD[rows[:prefix]])
        own = {int(tokens.layout.origin_T[r]): tokens.x_TD[r] for r in rows}
        for place, at in enumerate(tokens.carrier_BN[image].tolist()):
            assert torch.equal(patch_BND[image, place], own[at] if at != GONE else torch.zeros(4).double())


@given(kept=packs.images, prefix=PREFIX, keep_length=st.booleans(), seed=packs.seeds)
def test_weights_and_lengths_of_averages(kept, prefix, keep_length, seed):
    """By loops: a part counts its mass times its weight; masses know no weights, and lengths are averaged like tokens."""
    tokens, draw = make_pack(kept, prefix, seed=seed), torch.Generator().manual_seed(seed)
    weight_T = torch.rand(len(tokens.x_TD), dtype=torch.float64, generator=draw) + 0.1
    for _ in range(2):  # masses differ the second time
        chosen = select(packs.keep_mask(tokens.layout, draw, 0.5), tokens.layout)
        carrier_T = random_carriers(tokens, chosen, draw)
        after = merged(tokens, chosen, carrier_T, weight_T=weight_T, keep_length=keep_length)
        mass_T = torch.ones_like(weight_T) if tokens.mass_T is None else tokens.mass_T
        for row, own in enumerate(chosen.index_S.tolist()):
            parts = [other for other, goal in enumerate(carrier_T.tolist()) if goal == own]
            counts = torch.stack([mass_T[part] * weight_T[part] for part in parts])
            wanted = sum(c * tokens.x_TD[part] for c, part in zip(counts, parts, strict=True)) / counts.sum()
            if keep_length and len(parts) > 1:
                length = sum(c * tokens.x_TD[part].norm() for c, part in zip(counts, parts, strict=True)) / counts.sum()
                wanted = wanted * length / wanted.norm()
            assert torch.allclose(after.x_TD[row], wanted, atol=1e-9)
            assert after.mass_T[row] == sum(mass_T[part] for part in parts)
        tokens, weight_T = after, weight_T[chosen.index_S]


def test_a_token_that_receives_nothing_keeps_its_bits():
    tokens = make_pack([[0, 1, 2]], 0, dtype=torch.float32)
    tokens = merged(tokens, select(torch.tensor([True, True, False]), tokens.layout), torch.tensor([0, 1, 0]))
    after = merged(tokens, select(torch.tensor([True, True]), tokens.layout), torch.tensor([0, 1]))
    assert torch.equal(after.x_TD, tokens.x_TD)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_masses_are_counted_exactly_in_half_precision(dtype):
    """bf16 knows no 257: masses and sums must not be kept in it."""
    patches = 24 * 24
    tokens = pack(torch.ones(1, patches, 2, dtype=dtype), 0, (24, 24))
    keep_T = torch.arange(patches) == 5
    tokens = merged(tokens, select(keep_T, tokens.layout), torch.full((patches,), 5))
    assert tokens.mass_T.tolist() == [patches] and tokens.x_TD.dtype == dtype
    assert (tokens.x_TD == 1).all()


@given(kept=packs.images, prefix=PREFIX)
def test_scatter_places(kept, prefix):
    layout = make_layout(kept, prefix)
    value_T = torch.arange(1, len(layout.image_T) + 1)
    wanted = torch.zeros(len(kept), PLACES, dtype=torch.int64)
    for row, (image, place) in enumerate(zip(layout.image_T.tolist(), layout.origin_T.tolist(), strict=True)):
        if place >= 0:
            wanted[image, place] = row + 1
    assert torch.equal(scatter_places(value_T, layout), wanted)
    assert torch.equal(scatter_places(value_T[:, None].expand(-1, 2), layout), wanted[..., None].expand(-1, -1, 2))


def test_gradients_pass_through_merge_to_all_that_was_averaged():
    tokens = make_pack([[0, 1, 2, 3]], 1)
    x_TD = tokens.x_TD.requires_grad_()
    after = merged(tokens, select(torch.tensor([True, True, False, False, True]), tokens.layout), torch.tensor([0, 1, 1, 1, 4]))
    after.x_TD[1].sum().backward()
    assert torch.allclose(x_TD.grad, torch.tensor([0, 1 / 3, 1 / 3, 1 / 3, 0]).double()[:, None].expand(-1, 4))


def test_maps_and_pixels():
    score_BN = torch.arange(12.0)[None].expand(2, -1)
    assert torch.equal(to_map(score_BN, (3, 4))[1], torch.tensor([[0.0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]))
    pixels = to_pixels(torch.tensor([[[0.0, 1.0]]]), (2, 4))
    assert torch.allclose(pixels, torch.tensor([[[0, 0.25, 0.75, 1]]]).expand(1, 2, 4))
