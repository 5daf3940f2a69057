"""Maps against masks: hand-worked figures, slow oracles, loaders and their hostile files, runs that go on, the command."""

import csv
import json
import math

import iared2  # first: makes timm importable beside a CPU-only torch

# isort: split
import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from doubles import Methods, masked_folder, save
from iared2 import cli
from iared2.data.arrays import ImageArrays
from iared2.data.masks import box_masks, foreground, open_masks
from iared2.errors import ConfigError, DataError
from iared2.evaluate.map_scores import MapScores, average_precision, rank_normalise, score_maps, stretch
from iared2.evaluate.segment import Segmentation, SegmentOptions
from iared2.report.methods import choose_methods
from iared2.report.segment import latex, markdown, table_csv
from iared2.saving import save_reduced

# ---- figures worked by hand --------------------------------------------------------------------------------------

MAP = torch.tensor([[[4.0, 3.0], [2.0, 0.0]]])  # stretched: 1, .75, .5, 0; mean .5625, so the upper row is object
MASK = torch.tensor([[[True, False], [True, False]]])


def test_figures_of_four_pixels():
    found = score_maps(MAP, MASK).figures()
    assert found["pixel_accuracy"] == 50  # upper left and lower right
    assert found["miou"] == pytest.approx(100 / 3)  # 1 of 3, for both classes
    assert found["macc"] == 50
    # Scores of [background, object] from the top: 1 (object, right) and 1 (background, right) together, .75 wrong, .5 object right and
    # .5 background wrong together, .25 background right, 0 and 0 both wrong: 2/4 x 2/2 + 1/4 x 3/5 + 1/4 x 4/6
    assert found["map"] == pytest.approx(100 * (0.5 + 0.25 * 3 / 5 + 0.25 * 4 / 6))
    assert found["pointing"] == 100
    assert found["mass"] == pytest.approx(100 * 6 / 9)


def test_nothing_is_found_where_a_map_is_the_same_everywhere():
    mask = torch.zeros(1, 12, 12, dtype=torch.bool)
    mask[0, :3] = True
    for value in (0.0, 0.3, 7.1):
        found = score_maps(torch.full((1, 5, 5), value), mask).figures()
        assert (found["pixel_accuracy"], found["miou"], found["macc"]) == (75, 37.5, 50)
        assert found["map"] == pytest.approx(100 * (0.75 * 0.75 + 0.25 * 0.5))
        assert found["pointing"] == 25  # every pixel is the highest
        assert found["mass"] == (pytest.approx(25) if value else 0)


def test_the_mask_itself_is_perfect():
    mask = torch.rand(3, 9, 7) > 0.6
    assert set(score_maps(mask.float(), mask).figures().values()) == {100.0}


def test_negative_parts_have_no_mass_and_images_without_object_point_nowhere():
    scores = score_maps(torch.tensor([[[-9.0, 1.0]], [[1.0, 2.0]]]), torch.tensor([[[True, False]], [[False, False]]]))
    assert scores.value_N7[0, 6] == 0
    assert scores.value_N7[1, 5:].isnan().all()
    assert scores.figures()["mass"] == 0


def test_what_is_ignored_does_not_count():
    maps, mask = torch.rand(4, 6, 6), torch.rand(4, 6, 6) > 0.5
    ignore = torch.rand(4, 6, 6) > 0.7
    one, other = score_maps(maps, mask, ignore).value_N7, score_maps(maps, mask ^ ignore, ignore).value_N7
    assert torch.equal(one, other)
    assert one[:, :4].sum() == (~ignore).sum()
    everything = score_maps(maps[:1], mask[:1], torch.ones(1, 6, 6, dtype=torch.bool))
    assert everything.value_N7[0, :4].sum() == 0 and everything.value_N7[0, 4:].isnan().all()


def test_maps_and_masks_must_go_together():
    with pytest.raises(ConfigError, match="one map per mask"):
        score_maps(torch.rand(2, 4, 4), torch.ones(3, 4, 4, dtype=torch.bool))
    with pytest.raises(ConfigError, match="not finite"):
        score_maps(torch.full((1, 4, 4), math.nan), torch.ones(1, 4, 4, dtype=torch.bool))


def test_ranks_share_the_mean_of_ties():
    assert rank_normalise(torch.tensor([[[0.0, 0.0], [5.0, -0.0]]])).flatten().tolist() == [0.5, 0.5, 1.0, 0.5]


# ---- slow oracles ------------------------------------------------------------------------------------------------


def slow_precision(scores: list[float], truth: list[bool]) -> float:
    """Average precision by its definition, threshold by threshold."""
    area, before = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        taken = [true for score, true in zip(scores, truth, strict=True) if score >= threshold]
        recall = sum(taken) / sum(truth)
        area += (recall - before) * sum(taken) / len(taken)
        before = recall
    return area


def slow_up(grid: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear interpolation between centres of cells, edges held."""
    out = np.zeros(size)
    for i in range(size[0]):
        for j in range(size[1]):
            y = max(0.0, (i + 0.5) * grid.shape[0] / size[0] - 0.5)
            x = max(0.0, (j + 0.5) * grid.shape[1] / size[1] - 0.5)
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, grid.shape[0] - 1), min(x0 + 1, grid.shape[1] - 1)
            top = (1 - (x - x0)) * grid[y0, x0] + (x - x0) * grid[y0, x1]
            low = (1 - (x - x0)) * grid[y1, x0] + (x - x0) * grid[y1, x1]
            out[i, j] = (1 - (y - y0)) * top + (y - y0) * low
    return out


def slow_ranks(grid: np.ndarray) -> np.ndarray:
    """Mean rank of each value, as a share."""
    flat = grid.ravel()
    return np.array([((flat < value).sum() + (flat <= value).sum() + 1) / 2 / flat.size for value in flat]).reshape(grid.shape)


@pytest.mark.parametrize("ranked", [False, True])
def test_all_figures_against_loops_in_float64(ranked):
    maps, mask, ignore = torch.randn(5, 3, 4), torch.rand(5, 9, 11) > 0.6, torch.rand(5, 9, 11) > 0.9
    maps[1, :2] = 0  # ties
    used = rank_normalise(maps) if ranked else maps
    inter, union, right, truth = np.zeros(2), np.zeros(2), np.zeros(2), np.zeros(2)
    precisions, points, masses = [], [], []
    ours = stretch(used, (9, 11)).numpy()
    for small, wanted, left_out, stretched in zip(maps.double().numpy(), mask.numpy(), ignore.numpy(), ours, strict=True):
        large = slow_up(slow_ranks(small) if ranked else small, wanted.shape)
        unit = (large - large.min()) / (large.max() - large.min())
        guess, keep = unit > unit.mean(), ~left_out
        for label in (False, True):
            inter[int(label)] += ((guess == label) & (wanted == label) & keep).sum()
            union[int(label)] += (((guess == label) | (wanted == label)) & keep).sum()
            truth[int(label)] += ((wanted == label) & keep).sum()
        right = inter
        assert np.allclose(unit, stretched, atol=1e-6)
        r, w = stretched[keep], wanted[keep]  # rounding decides which of 1 - R and R are equal, and so the average precision
        precisions.append(slow_precision([*(1 - r), *r], [*~w, *w]))
        points.append(w[r == r.max()].mean())
        masses.append(large.clip(0)[keep & wanted].sum() / large.clip(0)[keep].sum())
    expected = {"pixel_accuracy": right.sum() / truth.sum(), "miou": (inter / union).mean(), "macc": (inter / truth).mean()}
    expected |= {"map": np.mean(precisions), "mass": np.mean(masses), "pointing": np.mean(points)}
    found = score_maps(used, mask, ignore).figures()
    for name, value in expected.items():
        assert found[name] == pytest.approx(100 * value, abs=1e-3), name


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_average_precision_by_definition(elements):
    scores, truth, counts = (list(part) for part in zip(*elements, strict=True))
    found = average_precision(torch.tensor([scores], dtype=torch.float32), torch.tensor([truth]), torch.tensor([counts]))
    kept = [(score, true) for score, true, there in elements if there]
    if any(true for _, true in kept):
        assert float(found) == pytest.approx(slow_precision(*(list(part) for part in zip(*kept, strict=True))))
    else:
        assert found.isnan().all()


@pytest.mark.parametrize("steps", [3, 50, 10**6])
def test_average_precision_is_that_of_scikit_learn(steps):
    metrics = pytest.importorskip("sklearn.metrics")
    scores, truth = (torch.rand(4, 500) * steps).round() / steps, torch.rand(4, 500) > 0.7
    found = average_precision(scores, truth, torch.ones_like(truth))
    wanted = [metrics.average_precision_score(true, score) for true, score in zip(truth.numpy(), scores.numpy(), strict=True)]
    assert found.tolist() == pytest.approx(wanted, abs=1e-12)


def test_iou_is_that_of_torchmetrics():
    from torchmetrics.classification import MulticlassJaccardIndex

    maps, mask, ignore = torch.rand(6, 8, 8), torch.rand(6, 8, 8) > 0.7, torch.rand(6, 8, 8) > 0.8
    unit = stretch(maps, (8, 8))
    guess = (unit > unit.mean((1, 2), keepdim=True)).long()
    metric = MulticlassJaccardIndex(2, average="macro", ignore_index=-1)
    assert score_maps(maps, mask, ignore).figures()["miou"] == pytest.approx(
        100 * float(metric(guess, mask.long().masked_fill(ignore, -1)))
    )
    nothing = torch.zeros_like(mask)
    empty = score_maps(torch.zeros(6, 8, 8), nothing).figures()["miou"]  # a class that is nowhere takes no part
    assert empty == pytest.approx(100 * float(MulticlassJaccardIndex(2, average="macro")(nothing.long(), nothing.long())))


def test_intervals_are_drawn_again_alike_and_hold_the_figure():
    scores = score_maps(torch.rand(30, 4, 4), torch.rand(30, 12, 12) > 0.6)
    once, again, other = scores.intervals(3), scores.intervals(3), scores.intervals(4)
    assert once == again != other
    for name, value in scores.figures().items():
        assert once[name][0] <= value <= once[name][1]
        assert once[name][0] < once[name][1]
    one = score_maps(MAP, MASK)
    assert all(low == pytest.approx(one.figures()[name]) == high for name, (low, high) in one.intervals().items())


def test_an_interval_is_as_wide_as_the_mean_is_uncertain():
    value = torch.zeros(400, 7, dtype=torch.float64)
    value[:, 4] = torch.arange(400) % 2
    low, high = MapScores(value).intervals()["map"]
    assert high - low == pytest.approx(2 * 196 * 0.5 / 20, rel=0.1)


# ---- pictures and masks ------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    return masked_folder(tmp_path / "data")


def test_a_folder(folder):
    pictures = open_masks(folder)
    batch = pictures.batch(range(6), (15, 20), workers=2)
    assert batch.names == tuple(f"images/{number}.png" for number in range(6))
    assert batch.pixels_BHW3.shape == (6, 15, 20, 3) and batch.mask_BHW.shape == (6, 15, 20)
    assert batch.mask_BHW.sum((1, 2)).tolist() == [6 * 7 + 3] * 6 or batch.mask_BHW.float().mean() == pytest.approx(0.15, abs=0.03)
    assert batch.ignore_BHW[0, :, :10].all() and not batch.ignore_BHW[0, :, 10:].any() and not batch.ignore_BHW[1:].any()
    raw = Image.open(folder / "images/3.png").resize((20, 15), Image.Resampling.BILINEAR)
    assert np.array_equal(batch.pixels_BHW3[3], np.asarray(raw))


def test_subsets_are_fixed(folder):
    pictures = open_masks(folder)
    some = pictures.subset(3, 1)
    assert some.names == pictures.subset(3, 1).names and len(some) == 3
    row = pictures.names.index(some.names[1])
    assert np.array_equal(some.open(1).mask, pictures.open(row).mask)
    assert some.stamps[1] == pictures.stamps[row]
    assert pictures.subset(99, 1) is pictures


PLANE = np.array([[0, 1], [1, 0]], np.uint8)


@pytest.mark.parametrize(
    "mask",
    [
        PLANE,
        PLANE * 255,
        PLANE * 128 + 20,
        PLANE.astype(bool),
        PLANE.astype(np.float32),
        PLANE.astype(np.uint16) * 65535,
        np.repeat(PLANE[:, :, None] * 255, 3, 2),
        Image.fromarray(PLANE * 255).convert("1"),
        Image.fromarray(PLANE * 255).convert("P"),
        Image.fromarray(PLANE).convert("P"),
        Image.fromarray(np.stack([PLANE * 255, PLANE * 0, PLANE * 0, PLANE * 0 + 9], 2), "RGBA"),
        Image.fromarray(PLANE.astype(np.uint16) * 65535),
        Image.fromarray(PLANE.astype(np.float32)),
    ],
)
def test_what_counts_as_object(mask):
    assert np.array_equal(foreground(mask), PLANE.astype(bool))


def test_grey_below_half_is_background():
    assert not foreground(np.full((2, 2), 127, np.uint8)).any()


def test_missing_masks_are_listed(folder):
    for number in (1, 4):
        (folder / f"masks/{number}.png").unlink()
    with pytest.raises(DataError, match=r"2 of 6 pictures have no mask: 1.png, 4.png; wanted"):
        open_masks(folder)
    for number in range(6, 16):
        save(folder / f"images/{number}.png", np.zeros((9, 9, 3), np.uint8))
    with pytest.raises(DataError, match=r"12 of 16 .* and 7 more"):
        open_masks(folder)


def test_folders_that_are_none(tmp_path, folder):
    with pytest.raises(DataError, match="no such folder"):
        open_masks(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"not a \.mat file"):
        open_masks(folder / "images/0.png")
    with pytest.raises(DataError, match="no folder images/"):
        open_masks(folder / "masks")
    (tmp_path / "void/images").mkdir(parents=True)
    with pytest.raises(DataError, match="no pictures in it"):
        open_masks(tmp_path / "void")
    save(folder / "masks/0.bmp", PLANE)
    with pytest.raises(DataError, match="same stem"):
        open_masks(folder)


def test_masks_without_any_object(folder):
    for number in range(6):
        save(folder / f"masks/{number}.png", np.zeros((4, 4), np.uint8))
    with pytest.raises(DataError, match="all 6 are empty"):
        open_masks(folder).require_foreground((16, 16))
    save(folder / "masks/0.png", 255 * (np.arange(16).reshape(1, 16) < 8).repeat(16, 0).astype(np.uint8))  # all of it is to be ignored
    with pytest.raises(DataError, match="all 6 are empty"):
        open_masks(folder).require_foreground((16, 16))


def test_broken_pictures_and_masks_are_left_out_and_named(folder):
    (folder / "images/1.png").write_bytes(b"not a picture")
    (folder / "masks/2.png").write_bytes((folder / "masks/2.png").read_bytes()[:60])
    pictures = open_masks(folder)
    assert len(pictures.batch(range(6), (16, 16)).names) == 4
    assert pictures.skipped.keys() == {"images/1.png", "images/2.png"}
    assert "masks/2.png" in pictures.skipped["images/2.png"]
    assert pictures.batch([1, 2], (16, 16)) is None


def test_boxes_as_masks():
    arrays = ImageArrays(torch.zeros(1, 8, 8, 3, dtype=torch.uint8), torch.zeros(1, dtype=torch.long), boxes=torch.tensor([[1, 2, 3, 5]]))
    mask = box_masks(arrays).batch([0], (8, 8)).mask_BHW[0]
    assert mask.sum() == 3 * 4 and mask[2:6, 1:4].all()
    with pytest.raises(DataError, match="boxes"):
        box_masks(ImageArrays(arrays.pixels, arrays.labels))


def write_mat(path, pictures, masks, nested=True):
    """As MATLAB 7.3 saves a struct of cells: references to arrays with their axes in reverse order; each mask in a cell of its own."""
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        for name, arrays in (("img", pictures), ("gt", masks)):
            table = file.create_dataset(f"value/{name}", (len(arrays), 1), dtype=h5py.ref_dtype)
            for row, array in enumerate(arrays):
                target = file.create_dataset(f"#refs#/{name}{row}", data=array.T)
                if name == "gt" and nested:
                    cell = file.create_dataset(f"#refs#/cell{row}", (1, 1), dtype=h5py.ref_dtype)
                    cell[0, 0], target = target.ref, cell
                table[row, 0] = target.ref


@pytest.mark.parametrize("nested", [True, False])
def test_the_file_of_imagenet_segmentation(tmp_path, nested):
    draw = np.random.default_rng(0)
    pictures = [draw.integers(0, 255, (6, 9, 3), np.uint8), draw.integers(0, 255, (5, 4), np.uint8)]
    masks = [draw.integers(0, 2, (6, 9), np.uint8), draw.integers(0, 2, (5, 4), np.uint8)]
    write_mat(tmp_path / "gtsegs_ijcv.mat", pictures, masks, nested)
    found = open_masks(tmp_path / "gtsegs_ijcv.mat")
    assert list(found.names) == ["gtsegs_ijcv.mat:0", "gtsegs_ijcv.mat:1"]
    assert np.array_equal(np.asarray(found.open(0).image), pictures[0])
    assert np.array_equal(np.asarray(found.open(1).image)[:, :, 2], pictures[1])
    assert all(np.array_equal(found.open(row).mask, masks[row].astype(bool)) for row in (0, 1))
    assert found.select([1]).open(0).image.size == (4, 5)


def test_files_that_are_not_imagenet_segmentation(tmp_path):
    h5py = pytest.importorskip("h5py")
    (tmp_path / "text.mat").write_text("MATLAB 5.0")
    with h5py.File(tmp_path / "other.mat", "w") as file:
        file["something"] = 1
    for name in ("text", "other"):
        with pytest.raises(DataError, match="/value/img and /value/gt"):
            open_masks(tmp_path / f"{name}.mat")
    write_mat(tmp_path / "short.mat", [np.zeros((4, 4, 3), np.uint8)], [])
    with pytest.raises(DataError, match="1 pictures and 0 masks"):
        open_masks(tmp_path / "short.mat")
    write_mat(tmp_path / "odd.mat", [np.zeros((4, 4, 7), np.uint8)], [np.ones((4, 4), np.uint8)])
    with pytest.raises(DataError, match=r"odd.mat:0: a picture of shape \(4, 4, 7\)"):
        open_masks(tmp_path / "odd.mat").open(0)


# ---- runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return iared2.reduce(timm.create_model("iared2_mini_patch8_64", num_classes=10), 3).eval()


def figures(rows):
    return [(row.method, row.images, row.raw, row.rank, row.raw_intervals) for row in rows]


def test_methods_side_by_side(model, folder):
    methods = Methods()
    task = Segmentation(model, open_masks(folder), methods.find, SegmentOptions(batch_size=4, slow_limit=3, target=7))
    told = []
    rows = task.run(["unfit", "bright", "slow one", "nan", "crash", "chance"], told.append)
    assert [row.method for row in rows] == ["unfit", "bright", "slow one", "nan", "crash", "chance"]
    assert [row.images for row in rows] == [0, 6, 3, 0, 0, 6]
    assert "class token" in rows[0].why and "not finite" in rows[3].why and rows[4].why == "out of luck"
    assert methods.calls.count(("nan", 4)) == 1 and ("nan", 2) not in methods.calls  # no further shard for what failed
    assert rows[1].raw["miou"] > 80 > rows[5].raw["miou"]
    assert rows[1].forwards == 2 and rows[1].milliseconds > 0  # the mean of what was recorded
    assert all(target.tolist() == [7] * len(target) for target in methods.targets)
    assert sum(told) <= task.work([row.method for row in rows])


def test_a_killed_run_goes_on_and_repeats_nothing(model, folder, tmp_path):
    options, names = SegmentOptions(batch_size=2), ["chance", "bright"]
    whole = Segmentation(model, open_masks(folder), Methods().find, options).run(names)
    killed = Methods(stop_after=3)
    with pytest.raises(KeyboardInterrupt):
        Segmentation(model, open_masks(folder), killed.find, options, tmp_path / "records").run(names)
    rest = Methods()
    rows = Segmentation(model, open_masks(folder), rest.find, options, tmp_path / "records").run(names)
    assert figures(rows) == figures(whole)
    assert len(killed.calls) + len(rest.calls) == 6
    again = Methods()
    assert figures(Segmentation(model, open_masks(folder), again.find, options, tmp_path / "records").run(names)) == figures(whole)
    assert not again.calls


def test_other_facts_are_other_records(model, folder, tmp_path):
    def calls(pictures, **changes):
        methods = Methods()
        Segmentation(model, pictures, methods.find, SegmentOptions(**{"batch_size": 6, **changes}), tmp_path / "records").run(["bright"])
        return len(methods.calls)

    assert calls(open_masks(folder)) == 1
    assert calls(open_masks(folder)) == 0
    assert calls(open_masks(folder), target=1) == 1
    assert calls(open_masks(folder), seed=1) == 1
    for record in (tmp_path / "records").rglob("*.json"):
        record.write_text(record.read_text()[:40])
    assert calls(open_masks(folder)) == 1  # damaged records are made anew
    save(folder / "masks/0.png", np.full((7, 7), 255, np.uint8))
    assert calls(open_masks(folder)) == 1


def test_broken_pictures_are_remembered(model, folder, tmp_path):
    (folder / "images/1.png").write_bytes(b"")
    for _ in range(2):
        task = Segmentation(model, open_masks(folder), Methods().find, SegmentOptions(batch_size=1), tmp_path / "records")
        assert task.run(["bright"])[0].images == 5
        assert list(task.skipped) == ["images/1.png"]
    for path in (folder / "images").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match="none of the 6 pictures can be read"):
        Segmentation(model, open_masks(folder), Methods().find).run(["bright"])


@pytest.mark.parametrize("target", [-1, 10])
def test_a_class_outside_of_the_head(model, folder, target):
    with pytest.raises(ConfigError, match=rf"got class {target}, outside the model's 10 classes; wanted 0 to 9"):
        Segmentation(model, open_masks(folder), Methods().find, SegmentOptions(target=target))


# ---- the command -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("segment") / "model"
    save_reduced(model, path, with_backbone=True)
    return path


@pytest.fixture
def run(saved, capfd):
    def run(*arguments):
        code = cli.main(["segment", "--model", str(saved), "--workers", "0", *map(str, arguments)])
        captured = capfd.readouterr()
        return code, captured.out, captured.err.splitlines()

    return run


def test_the_command(run, folder, tmp_path):
    out = tmp_path / "out"
    code, printed, errors = run("-d", folder, "-o", out, "--methods", "background,random,gaussian", "--json", tmp_path / "copy.json")
    assert (code, errors) == (0, [])
    assert "mIoU" in printed
    content = json.loads((out / "segment.json").read_text())
    assert content == json.loads((tmp_path / "copy.json").read_text())
    rows = {row["method"]: row for row in content["rows"]}
    assert list(rows) == ["background", "random", "gaussian"]
    for row in rows.values():
        assert row["images"] == 6 and row["forwards"] == 0 and row["error"] is None
        for part in (row, row["rank"]):
            for name in ("pixel_accuracy", "miou", "map", "macc", "pointing", "mass"):
                low, high = part["intervals"][name]
                assert 0 <= low <= part[name] <= high <= 100
    assert rows["background"]["macc"] == 50
    assert rows["gaussian"]["map"] > rows["random"]["map"]
    table = list(csv.DictReader((out / "segment.csv").open()))
    assert float(table[2]["rank_miou_low"]) == rows["gaussian"]["rank"]["intervals"]["miou"][0]
    assert "gaussian" in (out / "segment.md").read_text() and r"\toprule" in (out / "segment.tex").read_text()
    figures_again = run("-d", folder, "-o", out, "--methods", "background,random,gaussian")
    assert figures_again[0] == 0 and json.loads((out / "segment.json").read_text())["rows"] == content["rows"]


def test_wrong_input_is_one_line(run, folder, tmp_path):
    def refused(*arguments, data=folder):
        code, _, errors = run("-d", data, "-o", tmp_path / "out", *arguments)
        assert code == 2
        assert len(errors) == 1, errors
        assert not (tmp_path / "out").exists()
        return errors[0]

    assert "did you mean 'gaussian'" in refused("--methods", "random,gausian")
    assert "got none" in refused("--methods", ",")
    assert "outside the model's 10 classes" in refused("--methods", "random", "--target", 10)
    assert "--limit: got 0" in refused("--limit", 0)
    assert "no folder images/" in refused(data=tmp_path)
    (folder / "masks/3.png").unlink()
    assert "1 of 6 pictures have no mask: 3.png" in refused()


def test_a_broken_picture_is_told_of(run, folder, tmp_path):
    (folder / "images/2.png").write_bytes(b"?")
    code, _, errors = run("-d", folder, "-o", tmp_path / "out", "--methods", "gaussian")
    assert code == 1 and "images/2.png" in errors[-1]
    assert list(json.loads((tmp_path / "out/segment.json").read_text())["skipped"]) == ["images/2.png"]


def test_methods_are_named_once():
    assert choose_methods("random, gaussian,random") == ["random", "gaussian"]
    assert choose_methods("attention:3:max,ours:1") == ["attention:3:max", "ours:1"]
    assert set(choose_methods("all")) >= {"random", "gaussian", "background"}
    assert choose_methods("all,ours") == choose_methods("all")
    with pytest.raises(ConfigError, match="got 'attention:', with nothing behind the colon"):
        choose_methods("attention:")


def test_tables_say_what_is_missing_and_what_is_smaller(model, folder):
    rows = Segmentation(model, open_masks(folder), Methods().find, SegmentOptions(slow_limit=2)).run(["unfit", "slow_one", "bright"])
    text = markdown(rows)
    assert "slow_one on 2" in text and "- unfit: method 'unfit'" in text
    assert r"slow\_one & 2" in latex(rows) and "% unfit" in latex(rows)
    lines = list(csv.DictReader(table_csv(rows).splitlines()))
    assert lines[0]["miou"] == "" and "class token" in lines[0]["error"] and lines[1]["slow"] == "1"
    assert json.dumps([row.record() for row in rows], allow_nan=False)
