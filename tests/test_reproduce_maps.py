"""`iared2 reproduce` on trained models: tables 1 and 5, figures 3, 4, 6 and 7, and what groups keep of objects that are known."""

import json
import math
import re

import iared2  # first: makes timm importable beside a CPU-only torch

# isort: split
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from doubles import labelled_folder, masked_folder, save
from iared2 import cli, cost
from iared2.data.cluster import fingerprint
from iared2.data.masks import open_masks
from iared2.data.raw import raw_images
from iared2.data.sources import open_data
from iared2.errors import ConfigError
from iared2.evaluate.kept import OURS, Kept, KeptRow
from iared2.evaluate.policies import Policies, asking_macs, count_for, paper_count, policy_share
from iared2.evaluate.segment import MapRow, SegmentOptions
from iared2.explain.memorability import MemNet
from iared2.explain.methods import find_explainer
from iared2.keep import Given
from iared2.report.methods import tell_rows
from iared2.report.sheet import HEAD, SIDE, contact_sheet, heat_panels, kept_panels, square
from iared2.report.tables import without_name
from iared2.reproduce import hierarchy
from iared2.reproduce.intervals import half_width
from iared2.reproduce.maps import over_seeds
from iared2.reproduce.options import NEEDS, TAKES, TRAINED
from iared2.reproduce.runs import write_json
from iared2.reproduce.trend import trend
from iared2.saving import load_reduced, save_reduced
from iared2.trace import Trace

SIZE = 64  # pixels: a grid of 8 x 8 patches


def make(seed: int, backbone=None):
    """A model with random weights, whose scores spread around its threshold."""
    torch.manual_seed(7)
    backbone = backbone or timm.create_model("iared2_mini_patch8_64", num_classes=10)
    torch.manual_seed(seed)
    model = iared2.reduce(backbone, 3, interpreter=iared2.InterpreterConfig(init_score=0.5)).eval()
    for parameter in model.reducers.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two seeds of interpreters on one backbone."""
    folder = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        save_reduced(make(seed), folder / f"run{seed}", with_backbone=True)
    return folder


@pytest.fixture
def masks(tmp_path):
    return masked_folder(tmp_path / "masks_here")


@pytest.fixture
def photos(tmp_path):
    return labelled_folder(tmp_path / "photos_here")


@pytest.fixture
def run(saved, capfd, tmp_path):
    def run(*arguments, model=("--model", saved / "run0"), out=tmp_path / "out"):
        code = cli.main(["reproduce", *map(str, arguments), *map(str, model), "--workers", "0", "-o", str(out)])
        captured = capfd.readouterr()
        return code, captured.out, captured.err.splitlines()

    return run


# ---- what groups keep --------------------------------------------------------------------------------------------


def object_folder(folder, sides):
    """Pictures whose object is a square of so many patches, in the upper left corner."""
    for number, side in enumerate(sides):
        mask = np.zeros((SIZE, SIZE), np.uint8)
        mask[: 8 * side, : 8 * side] = 255
        save(folder / f"images/{number}.png", np.full((SIZE, SIZE, 3), 90, np.uint8))
        save(folder / f"masks/{number}.png", mask)
    return folder


def given(model, keeps):
    """The model with reducers that keep exactly these places, one mask (B, N) per group."""
    for reducer, keep_BN in zip(model.reducers, keeps, strict=True):
        reducer.rule = Given(keep_BN)
    return model


def objects_of(sides):
    keep_Bhw = torch.zeros(len(sides), 8, 8, dtype=torch.bool)
    for row, side in enumerate(sides):
        keep_Bhw[row, :side, :side] = True
    return keep_Bhw.flatten(1)


@pytest.mark.parametrize("on_drop", ["discard", "merge"])
def test_groups_that_keep_all_then_the_object_then_a_part(tmp_path, on_drop):
    sides = (2, 4, 5, 8)
    model, object_BN = make(0), objects_of(sides)
    model.configure(on_drop=on_drop)
    part_BN = objects_of([side // 2 for side in sides])
    given(model, (torch.ones_like(object_BN), object_BN, part_BN))
    row = Kept(model, open_masks(object_folder(tmp_path / "data", sides)), SegmentOptions(batch_size=4)).run([OURS])[0]
    areas = [side**2 / 64 for side in sides]
    assert row.area_N.tolist() == pytest.approx(areas)
    assert row.part_NG["kept"].T.tolist() == [
        pytest.approx([1] * 4),
        pytest.approx(areas),
        pytest.approx([1 / 64, 4 / 64, 4 / 64, 16 / 64]),
    ]
    assert row.part_NG["inside"].T.tolist() == [pytest.approx(areas), pytest.approx([1] * 4), pytest.approx([1] * 4)]
    assert row.part_NG["of_object"][:, 1].tolist() == pytest.approx([1] * 4)
    assert row.part_NG["of_rest"][:3, 1].tolist() == pytest.approx([0] * 3) and row.part_NG["of_rest"][3].isnan().all()
    means = row.means()
    assert means["inside"][1:] == pytest.approx([100, 100]) and means["of_rest"][0] == pytest.approx(100)  # 0 / 0 takes no part
    flat, follows, _ = row.correlations().tolist()
    assert math.isnan(flat) and follows == pytest.approx(1)
    drawn = row.drawn_correlations()[1]
    assert drawn[~drawn.isnan()].tolist() == pytest.approx([1] * int((~drawn.isnan()).sum()))


def test_pixels_to_ignore_and_half_patches():
    from iared2.evaluate.kept import kept_on_objects

    keep = torch.tensor([[[True, False, True, False]]])
    trace = Trace(torch.zeros(1, 1, 4), keep, torch.zeros(1, 1, 4, dtype=torch.int64), (2, 2), (0,), (1,), 1)
    mask, ignore = torch.zeros(1, 8, 8, dtype=torch.bool), torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[0, :, :2] = True  # half of the patches on the left, places 0 and 2
    ignore[0, :4, :2] = True  # of place 0, what is on the object
    area, parts = kept_on_objects(trace, mask, ignore)
    assert area.tolist() == pytest.approx([8 / 56])
    assert parts["kept"].tolist() == [[0.5]]
    assert parts["inside"].tolist() == [[pytest.approx(8 / 24)]]
    assert parts["of_object"].tolist() == [[1]] and parts["of_rest"].tolist() == [[pytest.approx(16 / 48)]]


def test_merged_patches_count_by_their_own_place():
    from iared2.evaluate.kept import kept_on_objects

    keep = torch.tensor([[[True, False, False, False]]])
    carrier = torch.zeros(1, 1, 4, dtype=torch.int64)  # place 0 carries all
    mask = torch.zeros(1, 2, 2, dtype=torch.bool)
    mask[0, 0, 0] = True
    trace = Trace(torch.zeros(1, 1, 4), keep, carrier, (2, 2), (0,), (1,), 1)
    _, parts = kept_on_objects(trace, mask, torch.zeros_like(mask))
    assert parts["kept"].tolist() == [[0.25]] and parts["inside"].tolist() == [[1]] and parts["of_rest"].tolist() == [[0]]


def known_row(areas, kept):
    kept_NG = torch.tensor(kept, dtype=torch.float64)
    return KeptRow(OURS, torch.tensor(areas, dtype=torch.float64), dict.fromkeys(("kept", "inside", "of_object", "of_rest"), kept_NG))


def test_bins_hold_as_many_pictures_and_seeds_are_averaged():
    areas = [0.1, 0.5, 0.2, 0.4, 0.3]
    one, two = known_row(areas, [[area] for area in areas]), known_row(areas, [[2 * area] for area in areas])
    found = hierarchy.binned([one, two])
    assert [bins.area for bins, _ in found] == pytest.approx([10, 20, 30, 40, 50])
    assert [kept[0] for _, kept in found] == pytest.approx([15, 30, 45, 60, 75])
    assert hierarchy.correlations_of([one, two])[0].value == pytest.approx(1)
    assert [len(bins.area_N) for bins, _ in hierarchy.binned([known_row(areas[:2], [[1], [1]])])] == [1, 1, 0, 0, 0][:2]


def test_the_interval_of_a_rank_correlation_is_as_wide_as_it_is_uncertain():
    torch.manual_seed(0)
    area, noise = torch.rand(200).tolist(), torch.rand(200).tolist()
    low, high = hierarchy.correlations_of([known_row(area, [[value] for value in noise])])[0].interval
    assert high - low == pytest.approx(2 * 1.96 / math.sqrt(200), rel=0.2)


def test_kept_numbers_are_remembered(tmp_path, monkeypatch):
    data, model = open_masks(object_folder(tmp_path / "data", (2, 4))), make(0)
    first = Kept(model, data, SegmentOptions(batch_size=1), tmp_path / "records").run([OURS])[0]
    monkeypatch.setattr(Kept, "score", lambda *_: pytest.fail("measured again"))
    again = Kept(model, data, SegmentOptions(batch_size=1), tmp_path / "records").run([OURS])[0]
    assert torch.equal(first.part_NG["kept"], again.part_NG["kept"])


# ---- policies ----------------------------------------------------------------------------------------------------


def test_what_attention_costs():
    adapter, size = make(0).adapter, (SIZE, SIZE)
    dense, block = cost.dense_macs(adapter, *size), adapter.block_cost(0).macs(64 + adapter.prefix)
    assert asking_macs(adapter, size, "random") == 0 and policy_share(adapter, size, "random", 64) == 1
    found = [asking_macs(adapter, size, f"attention:{number}") for number in range(3)]
    assert found[2] - found[1] == found[1] - found[0] == block and 0 < found[0] < block
    fewer = cost.reduced_macs(adapter, {}, size, 40, [])
    assert policy_share(adapter, size, "attention:1", 40) == pytest.approx((found[1] + fewer) / dense)
    for stem in ("random", "attention:0", "attention:2"):
        count = count_for(adapter, size, stem, 0.7)
        assert policy_share(adapter, size, stem, count) <= 0.7 < policy_share(adapter, size, stem, count + 1)
    assert count_for(adapter, size, "attention:2", 0.1) is None
    assert paper_count(196) == 138
    with pytest.raises(ConfigError, match="wanted random or attention:BLOCK"):
        asking_macs(adapter, size, "lime")


def test_a_policy_drops_what_attention_ranks_last(photos):
    model = make(0)
    task = Policies(model, raw_images(open_data(photos), photos), find_explainer, SegmentOptions(batch_size=4))
    whole, part = task.run(["attention:1@64", "attention:1@20"])
    assert whole.kept == 1 and part.kept == 20 / 64
    assert whole.figures["top1"] == whole.figures["dense_top1"] and whole.figures["difference"] == 0
    batch = raw_images(open_data(photos), photos).batch(range(4), task.how)
    images = task.judge.normalised(batch.image_BCHW)
    best_BK = find_explainer("attention:1", model)(images).flatten(1).topk(20, dim=1).indices
    reduced = given(make(0), [torch.zeros(4, 64, dtype=torch.bool).scatter_(1, best_BK, True)] * 3)
    with torch.no_grad():
        hits = (reduced(images).argmax(1) == batch.label_B).double().mean()
    assert part.figures["top1"] == pytest.approx(100 * float(hits))


# ---- words made of numbers ---------------------------------------------------------------------------------------


def test_trends_are_read_off_the_numbers():
    paper = {"ours:1": {"miou": 49.0}, "attention:1": {"miou": 46.0}, "lrp": {"miou": 32.0}, "memnet": {"miou": 34.0}}
    first = trend(paper, {"ours:1": {"miou": 60.0}, "attention:1": {"miou": 40.0}, "lrp": {"miou": 30.0}}, "ours:1")
    assert first.holds and first.ranks == {"miou": (1, 3)} and first.same == {"miou": 3} and first.pairs == 3
    here = {"ours:1": {"miou": 35.0}, "attention:1": {"miou": 40.0}, "lrp": {"miou": 30.0}, "ours": {"miou": 80.0}}
    second = trend(paper, here, "ours:1")
    assert not second.holds and second.ranks == {"miou": (2, 3)} and second.same == {"miou": 2}
    assert trend(paper, here, "ours:1", "ours").holds
    alone = trend(paper, {"ours:1": {"miou": 35.0}, "ours": {"miou": 80.0}}, "ours:1")
    assert alone.holds is None and alone.record()["holds"] is None


def test_without_the_papers_other_rows_table1_claims_nothing(run, masks, tmp_path, monkeypatch):
    few(monkeypatch, "ours:1", "ours", "random")
    assert run("table1", "--data", masks)[0] == 0
    text = (tmp_path / "out/table1.md").read_text()
    assert "Nothing to compare with the paper" in text and "the trend is" not in text


def test_intervals_are_over_pictures_or_over_seeds():
    assert over_seeds([50.0], (48.0, 53.0)).text() == "50.0 (48.0 to 53.0)"
    values = [50.0, 51.0, 52.5]
    several = over_seeds(values, (48.0, 53.0))
    assert several.text() == f"51.2 ± {half_width(values):.1f}"
    assert over_seeds([50.0, 50.0], None).text() == "50.0 ± 0.0"
    assert over_seeds([math.nan], None).text() == "-" and over_seeds([math.nan], None).record()["value"] is None


# ---- sheets ------------------------------------------------------------------------------------------------------


def test_sheets_show_every_photo_under_its_titles():
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 90, 3), np.uint8))
    assert square(photo).size == (SIDE, SIDE)
    heat = heat_panels(photo, {"a": np.arange(4.0).reshape(2, 2), "b": np.zeros((8, 8))})
    kept = kept_panels(photo, [np.ones((4, 4), bool), np.zeros((4, 4), bool)])
    assert len(heat) == len(kept) == 3 and {panel.size for panel in heat + kept} == {(SIDE, SIDE)}
    assert np.array_equal(np.asarray(kept[1])[SIDE // 2 :], np.asarray(kept[0])[SIDE // 2 :])  # all kept: the photo, and a badge above
    sheet = contact_sheet([heat] * 5, ["photo", "a", "b"])
    assert sheet.height == HEAD + 3 * (SIDE + 6)
    narrow = contact_sheet([heat * 3] * 2, list("abcdefghi"))
    assert narrow.height == HEAD + 2 * (SIDE + 6)  # too wide for two columns
    first = np.asarray(sheet.crop((34, HEAD, 34 + SIDE, HEAD + SIDE)))
    assert np.array_equal(first, np.asarray(heat[0]))


# ---- the commands ------------------------------------------------------------------------------------------------


def test_table1(run, masks, tmp_path, monkeypatch):
    out = tmp_path / "out"
    code, printed, errors = run("table1", "--data", masks, "--slow-limit", 1)
    assert (code, errors) == (0, [])
    text = (out / "table1.md").read_text()
    assert text.strip() in printed and "70.36 / 64.86 / 49.42" in text and "LIME: on fewer pictures" in text
    assert "--memnet FILE" in text and "the trend is" in text and "`" not in text.split("##")[0]
    assert f"iared2 reproduce table1 --data {masks.name} --model run0 --slow-limit 1 --seed 0 -o OUT" in text
    content = json.loads((out / "table1.json").read_text())
    table = content["tables"][masks.name]
    rows = {row["id"]: row for row in table["rows"]}
    assert rows["ours:1"]["paper"] == {"pixel_accuracy": 70.36, "macc": 64.86, "miou": 49.42}
    for name, row in rows.items():
        if name != "memorability":
            low, high = row["figures"]["miou"]["interval"]
            assert low <= row["figures"]["miou"]["value"] <= high, name
    mine = rows["ours:1"]["figures"]["miou"]["value"]
    paper = [
        row["figures"]["miou"]["value"] for row in rows.values() if row["paper"] and row["figures"] and row["id"] not in ("ours:1", "lime")
    ]
    own = table["trend"]["ours, second group"]
    assert own["ranks"]["miou"] == [1 + sum(value >= mine for value in paper), 4] and own["pairs"] == 6  # LIME saw fewer pictures
    assert "LIME: on fewer pictures, a fixed random subset, since slow; not among the places and pairs" in text
    monkeypatch.setattr("iared2.evaluate.segment.Segmentation.score", lambda *_: pytest.fail("scored again"))
    assert run("table1", "--data", masks, "--slow-limit", 1)[0] == 0
    assert json.loads((out / "table1.json").read_text())["tables"] == content["tables"]


def few(monkeypatch, *names):
    """Only some of Table 1's rows, since LRP and its like take long."""
    from iared2.reproduce import table1

    whole = table1.methods
    monkeypatch.setattr(table1, "methods", lambda *given: [method for method in whole(*given) if method.id.partition(":/")[0] in names])


def test_several_seeds_share_the_rows_of_others(run, saved, masks, tmp_path, monkeypatch):
    few(monkeypatch, "attention:1", "ours:1", "ours")
    asked = []
    monkeypatch.setattr(
        "iared2.reproduce.maps.find_explainer", lambda name, model, seed: asked.append(name) or find_explainer(name, model, seed)
    )
    code, _, errors = run("table1", "--data", masks, model=("--models", saved / "run0", saved / "run1"))
    assert (code, errors) == (0, [])
    content = json.loads((tmp_path / "out/table1.json").read_text())
    rows = {row["id"]: row for row in content["tables"][masks.name]["rows"]}
    assert [len(row["seeds"]) for row in rows.values()] == [1, 2, 2]
    values = [seed["miou"] for seed in rows["ours:1"]["seeds"]]
    low, high = rows["ours:1"]["figures"]["miou"]["interval"]
    assert rows["ours:1"]["figures"]["miou"]["value"] == pytest.approx(sum(values) / 2, abs=1e-3)
    assert (high - low) / 2 == pytest.approx(half_width(values), abs=1e-3)
    assert " ± " in (tmp_path / "out/table1.md").read_text() and asked.count("ours") > asked.count("attention:1")


def test_models_of_other_backbones_run_every_row(run, saved, masks, tmp_path, monkeypatch):
    few(monkeypatch, "attention:1", "ours:1")
    other = make(0, timm.create_model("iared2_mini_patch8_64", num_classes=10))
    for value in other.backbone.parameters():
        value.data *= 1.1
    save_reduced(other, tmp_path / "other", with_backbone=True)
    assert run("table1", "--data", masks, model=("--models", saved / "run0", tmp_path / "other"))[0] == 0
    content = json.loads((tmp_path / "out/table1.json").read_text())
    assert [len(row["seeds"]) for row in content["tables"][masks.name]["rows"]] == [2, 2]


def test_a_table_for_each_data_set_and_memnet(run, masks, tmp_path, monkeypatch):
    torch.manual_seed(0)
    save_file(MemNet().state_dict(), tmp_path / "memnet.safetensors")
    few(monkeypatch, "memorability", "ours:1")
    other = object_folder(tmp_path / "other", (2, 5))
    (other / "images/0.png").write_bytes(b"?")
    code, _, _ = run("table1", "--data", masks, other, "--memnet", tmp_path / "memnet.safetensors")
    text = (tmp_path / "out/table1.md").read_text()
    assert code == 1 and "1 broken pictures were left out" in text  # and a row of the table is there all the same
    content = json.loads((tmp_path / "out/table1.json").read_text())["tables"]
    assert list(content) == [masks.name, "other"]
    assert text.count("| MemNet | 52.81 / 53.70 / 34.66 |") == 2 and "No memorability" not in text


def test_table5(run, saved, masks, photos, tmp_path, monkeypatch):
    code, _, errors = run("table5", "--data", masks, "--photos", photos)
    assert (code, errors) == (0, [])
    text, content = (tmp_path / "out/table5.md").read_text(), json.loads((tmp_path / "out/table5.json").read_text())
    assert "67.9 / 61.8 / 46.4" in text and "Nothing is retrained" in text and text.count("the trend is") == 2
    ids = [row["id"] for row in content["segmentation"][masks.name]["rows"]]
    assert ids == ["attention:0", "attention:1", "attention:2", "ours:1", "ours_gradient"]
    share = content["classification"]["ours"][0]["rows"][1]["macs_share"]
    for row in content["classification"]["policies"]:
        assert row["why"] or row["images"] == 4
        if "@" in row["method"] and row["why"] is None and not row["method"].endswith(f"@{paper_count(64)}"):
            assert share - 0.05 < row["macs_share"] <= share
    monkeypatch.setattr("iared2.reproduce.table5.evaluate", lambda *_, **__: pytest.fail("measured again"))
    monkeypatch.setattr("iared2.evaluate.policies.Policies.score", lambda *_: pytest.fail("measured again"))
    assert run("table5", "--photos", photos)[0] == 0
    assert "segmentation" not in json.loads((tmp_path / "out/table5.json").read_text())


def test_table5_gives_ours_no_short_last_block(run, saved, photos, tmp_path):
    """The policies compute all of it; then ours does, too, and costs what it costs without that setting."""
    short = make(0)
    short.configure(skip_unread=True)
    assert short.skips_unread
    save_reduced(short, tmp_path / "short", with_backbone=True)
    shares = []
    for folder in (tmp_path / "short", saved / "run0"):
        assert run("table5", "--photos", photos, model=("--model", folder))[0] == 0
        content = json.loads((tmp_path / "out/table5.json").read_text())["classification"]
        shares.append([content["ours"][0]["rows"][1]["macs_share"], *(row["macs_share"] for row in content["policies"])])
    assert shares[0] == shares[1]


@pytest.mark.parametrize(("name", "panels"), [("figure3", 3), ("figure6", 3), ("figure4", 4), ("figure7", 4)])
def test_figures(run, photos, tmp_path, name, panels):
    code, _, errors = run(name, "--photos", photos, "--count", 3, "--seed", 5)
    assert (code, errors) == (0, [])
    content, text = json.loads((tmp_path / f"out/{name}.json").read_text()), (tmp_path / f"out/{name}.md").read_text()
    assert len(content["photos"]) == 3 and len(content["titles"]) == panels
    assert all(file in text for file in content["photos"]) and f"({name}.png)" in text and f"reproduce {name}" in text
    assert ("No memorability" in text) == (name in ("figure3", "figure6"))
    rule = text[text.index("| photo | file |") :].splitlines()[1]
    assert rule.startswith("| --- | --- |") and "---" not in rule.replace("| --- | --- |", "").replace("---:", "")
    whole = Image.open(tmp_path / f"out/{name}.png").copy()
    again = run(name, "--photos", photos, "--count", 3, "--seed", 5, out=tmp_path / "again")
    assert again[0] == 0 and np.array_equal(np.asarray(whole), np.asarray(Image.open(tmp_path / f"again/{name}.png")))
    assert run(name, "--photos", photos, "--count", 9, "--seed", 5)[0] == 0  # all there are
    assert len(json.loads((tmp_path / f"out/{name}.json").read_text())["photos"]) == 4


def test_the_figures_own_panels(run, saved, photos, tmp_path):
    save_file(MemNet().state_dict(), tmp_path / "memnet.safetensors")
    assert run("figure3", "--photos", photos, "--memnet", tmp_path / "memnet.safetensors")[0] == 0
    content = json.loads((tmp_path / "out/figure3.json").read_text())
    assert content["titles"] == ["photo", "memorability", "attention, block 2", "ours, group 2"]
    assert run("figure4", "--photos", photos)[0] == 0
    text = (tmp_path / "out/figure4.md").read_text()
    model, name = load_reduced(saved / "run0"), json.loads((tmp_path / "out/figure4.json").read_text())["photos"][0]
    from iared2.report.gallery import Preparation
    from iared2.report.sheet import central

    (path,) = photos.rglob(name)
    _, trace = model.trace(Preparation.of(model)(central(Image.open(path)))[None])
    ratios = " | ".join(f"{100 * float(ratio):.0f} %" for ratio in trace.keep_ratio[0])
    assert f"| 1 | {name} | {ratios} |" in text


def test_the_numbers_behind_figure_4(run, saved, masks, tmp_path):
    code, printed, errors = run("figure4", "--data", masks, "--count", 2, model=("--models", saved / "run0", saved / "run1"))
    assert (code, errors) == (0, [])
    assert "What groups keep" in printed and "The paper: all at first" in printed
    content = json.loads((tmp_path / "out/figure4.json").read_text())
    numbers = content["numbers"][masks.name]
    assert numbers["pictures"] == 6 and numbers["seeds"] == 2 and [len(one) for one in (numbers["kept"], numbers["bins"])] == [3, 5]
    assert all(0 <= one["value"] <= 100 for part in ("kept", "inside", "of_object", "of_rest") for one in numbers[part])
    assert (tmp_path / f"out/figure4-{masks.name}.png").stat().st_size < 150_000
    assert {name.partition("/")[0] for name in content["photos"]} == {"images"}  # photos of the data itself


def test_of_a_folder_with_masks_only_the_images_are_photos(run, masks, tmp_path):
    assert run("figure3", "--photos", masks)[0] == 0
    assert sorted(json.loads((tmp_path / "out/figure3.json").read_text())["photos"]) == [f"{number}.png" for number in range(6)]


def test_broken_photos_are_replaced_and_told_of(run, photos, tmp_path):
    (photos / "c0/0.png").write_bytes(b"?")
    code, _, _ = run("figure4", "--photos", photos, "--count", 4)
    assert code == 1
    content = json.loads((tmp_path / "out/figure4.json").read_text())
    assert len(content["photos"]) == 3 and len(content["failed"]) == 1
    assert "- left out: " in (tmp_path / "out/figure4.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("table1",), r"table1: nothing to work on; give --data"),
        (("table5",), r"give --data .* or --photos"),
        (("figure3",), r"figure3: nothing to work on; give --photos"),
        (("figure4", "--count", "0", "--photos", "HERE"), r"--count: got 0, wanted 1 or more"),
        (("figure3", "--photos", "HERE", "--data", "HERE"), r"--data: figure3 does not take it; it takes --photos, "),
        (("table1", "--data", "HERE", "--scale", "small"), r"--scale: table1 does not take it"),
        (("table1", "--data", "HERE", "--seeds", "3"), r"--seeds: table1 does not take it"),
        (("table1", "--data", "HERE", "--limit", "0"), r"--limit: got 0"),
        (("table1", "--data", "HERE", "--models", "x"), r"--models: got it beside --model"),
        (("table1", "--data", "HERE"), r"no folder images/"),
        (("table1", "--data", "HERE/none"), r"no such folder"),
        (("table5", "--photos", "HERE"), r"no pictures in it"),
        (("table5", "--photos", "HERE", "HERE"), r"--photos: got 2 names, but table5 wants one folder"),
        (("figure7", "--photos", "HERE/none"), r"no such file or folder"),
        (("figure7", "--photos", "HERE"), r"no pictures in this folder"),
        (("figure5", "--photos", "HERE"), r"unknown table 'figure5'; did you mean 'figure[3467]'"),
        (("table6", "--data", "HERE"), r"--model: table6 does not take it"),
        (("figure4", "--photos"), r"--photos: got nothing behind it, wanted one or more photos or folders; name them"),
    ],
)
def test_what_cannot_be_done_is_one_line(run, tmp_path, arguments, message):
    (tmp_path / "here").mkdir()
    code, _, errors = run(*(text.replace("HERE", str(tmp_path / "here")) for text in arguments))
    assert code == 2 and len(errors) == 1 and re.search(message, errors[0]), errors
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("table1", "--data", "HERE"), r"--models: got nothing behind it, wanted one or more models"),
        (("figure4", "--data", "HERE"), r"--models: got nothing behind it"),
    ],
)
def test_models_without_a_model(run, masks, tmp_path, arguments, message):
    code, _, errors = run(*(text.replace("HERE", str(masks)) for text in arguments), model=("--models",))
    assert code == 2 and len(errors) == 1 and re.search(message, errors[0]), errors
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", [("--seed", 3), ("--dtype", "float32"), ("--batch-size", 4)])
@pytest.mark.parametrize("name", TRAINED)
def test_what_trained_tables_would_ignore_is_refused(run, tmp_path, name, option):
    code, _, errors = run(name, "--data", tmp_path, *option, model=())
    assert code == 2 and len(errors) == 1 and f"{option[0]}: {name} does not take it; it takes --data, --scale" in errors[0], errors


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Models that are no seeds of those in `saved`, by what they differ in."""
    folder, backbone = tmp_path_factory.mktemp("others"), timm.create_model("iared2_mini_patch8_64", num_classes=10)
    found = {"groups": iared2.reduce(backbone, 1), "first": iared2.reduce(backbone, (1, 4, 8))}
    found["place"] = iared2.reduce(backbone, 3, place="between")
    found["classes"] = iared2.reduce(timm.create_model("iared2_mini_patch8_64", num_classes=7), 3)
    for name, model in found.items():
        save_reduced(model, folder / name, with_backbone=True)
    return folder


@pytest.mark.parametrize("name", [name for name in TAKES if "models" in TAKES[name]])
@pytest.mark.parametrize(
    ("other", "words"),
    [
        ("groups", "with groups 1, but RUN has 3"),
        ("first", "with first blocks 1, 4, 8, but RUN has 0, 4, 8"),
        ("place", "with place 'between', but RUN has 'before'"),
        ("classes", "with classes 7, but RUN has 10"),
    ],
)
def test_models_that_are_not_seeds_of_one_design(run, saved, others, masks, tmp_path, name, other, words):
    code, _, errors = run(name, "--data", masks, model=("--models", saved / "run0", saved / "run1", others / other))
    assert code == 2 and len(errors) == 1, errors
    assert f"--models: got {others / other} {words.replace('RUN', str(saved / 'run0'))}; give seeds of one design" in errors[0]
    assert not (tmp_path / "out").exists()


def numbers_only(path):
    """The file's content, if it is JSON by the letter."""
    return json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{path.name} holds {word}"))


@pytest.mark.parametrize("names", [("run0",), ("run0", "run1")])
def test_table5_of_one_photo_has_no_intervals(run, saved, photos, tmp_path, names):
    for _ in range(2):  # the second time from what is remembered
        model = ("--models", *(saved / name for name in names))
        assert run("table5", "--photos", photos, "--limit", 1, model=model)[::2] == (0, [])
        content = numbers_only(tmp_path / "out/table5.json")["classification"]
        assert all(row["why"] or row["figures"]["standard_error"] is None for row in content["policies"])
        assert "nan" not in (tmp_path / "out/table5.md").read_text()


def test_what_is_no_number_is_null_in_json(tmp_path):
    write_json(tmp_path / "a.json", {"a": math.nan, "b": [(1.5, math.inf), {"c": -math.inf}], "d": "nan"})
    assert numbers_only(tmp_path / "a.json") == {"a": None, "b": [[1.5, None], {"c": None}], "d": "nan"}


def test_a_model_of_two_blocks_is_compared_with_the_papers_three(run, masks, photos, tmp_path):
    torch.manual_seed(7)
    backbone = timm.create_model("iared2_mini_patch8_64", num_classes=10, depth=2)
    save_reduced(iared2.reduce(backbone, 2), tmp_path / "short", with_backbone=True)
    assert run("table5", "--data", masks, "--photos", photos, model=("--model", tmp_path / "short"))[::2] == (0, [])
    part = json.loads((tmp_path / "out/table5.json").read_text())["segmentation"][masks.name]
    assert part["paper_best_block"] == {"pixel_accuracy": 2, "macc": 1, "miou": 1} and part["lacking_blocks"] == [2]
    text = (tmp_path / "out/table5.md").read_text()
    assert text.count("the trend is not the same") == 2 and text.count("This model has no block 2.") == 2


def test_other_memnet_weights_under_the_same_name_are_other_figures(run, masks, tmp_path, monkeypatch):
    few(monkeypatch, "memorability", "ours:1")
    path, found = tmp_path / "memnet.safetensors", []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        save_file(MemNet().state_dict(), path)
        assert run("table1", "--data", masks, "--memnet", path)[0] == 0
        found.append(json.loads((tmp_path / "out/table1.json").read_text())["tables"][masks.name]["rows"])
    first, again, other = ({row["id"]: row for row in rows} for rows in found)
    assert first == again  # with the time they took, so nothing was scored twice
    assert other["memorability"]["figures"] != first["memorability"]["figures"] and other["ours:1"] == first["ours:1"]


def test_only_a_file_behind_the_colon_changes_a_key(tmp_path):
    data, model = open_masks(object_folder(tmp_path / "data", (2, 4))), make(0)
    task = Kept(model, data)
    how = (task.options.batch_size, task.options.seed, task.options.dtype, "what groups keep")
    for name in ("ours", "attention:1", f"memorability:{tmp_path / 'none'}", "attention:1@20", "attention:"):
        assert task._key(name, data).endswith("-" + fingerprint(name, task._facts, how, data.names, data.stamps)), name


@pytest.mark.parametrize(
    ("method", "why", "said"),
    [
        ("memorability", "memorability: no weights", "no weights"),
        ("attention:99", "attention:99: got block '99'", "got block '99'"),
        ("attention:1", "attention: no rows", "no rows"),
        ("ours", "ours_gradient: other", "ours_gradient: other"),
        ("lrp", "a batch does not fit", "a batch does not fit"),
    ],
)
def test_a_methods_name_is_said_once(method, why, said, capfd):
    assert without_name(method, why) == said
    assert tell_rows("", "", [MapRow(method, why=why)], {}) == 2
    assert capfd.readouterr().err.split() == f"iared2: {method}: {said}".split()


def test_tables_say_a_methods_name_once(run, masks, tmp_path, monkeypatch):
    def broken(name, model, seed):
        if name in ("attention:1", "ours_gradient"):
            raise ConfigError(f"{name}: got nothing")
        return find_explainer(name, model, seed)

    monkeypatch.setattr("iared2.reproduce.maps.find_explainer", broken)
    few(monkeypatch, "attention:1", "ours:1")
    assert run("table1", "--data", masks)[0] == 1 and run("table5", "--data", masks)[0] == 1
    assert "- raw attention, second block: got nothing\n" in (tmp_path / "out/table1.md").read_text()
    assert "- attention:1: no figures; got nothing\n" in (tmp_path / "out/table5.md").read_text()


def test_memnet_weights_that_are_none(run, photos, tmp_path):
    (tmp_path / "none.safetensors").write_bytes(b"no")
    code, _, errors = run("figure3", "--photos", photos, "--memnet", tmp_path / "none.safetensors")
    assert code == 2 and len(errors) == 1 and "does not hold MemNet's weights" in errors[0]


def test_photos_without_the_models_labels(run, photos, tmp_path):
    (photos / "labels.csv").write_text("file,class_index\nc0/0.png,11\n")
    code, _, errors = run("table5", "--photos", photos)
    assert code == 2 and len(errors) == 1 and "label 11" in errors[0]
    assert not (tmp_path / "out").exists()


def test_every_table_says_what_it_takes_and_needs():
    assert TAKES.keys() == NEEDS.keys()
    assert all({option for group in NEEDS[name] for option in group} <= set(TAKES[name]) for name in TAKES)


def test_the_sentences_on_figure_4_follow_the_numbers():
    def figures(*values):
        return [over_seeds([value], (value - 1, value + 1)) for value in values]

    area, follow = figures(20)[0], [over_seeds([0.5], (0.2, 0.7)), over_seeds([-0.5], (-0.7, -0.2)), over_seeds([0.1], (-0.2, 0.4))]
    said = " ".join(hierarchy.sentences({"kept": figures(99, 50, 20), "inside": figures(20, 40, 60)}, follow, area))
    assert "first group keeps nearly all" in said and "the trend is the same" in said
    assert "larger after group 1, less after group 2." in said
    said = " ".join(hierarchy.sentences({"kept": figures(99, 50, 20), "inside": figures(20, 40, 20)}, follow[2:], area))
    assert "the trend is not the same" in said and "larger after no group." in said
    said = " ".join(hierarchy.sentences({"kept": figures(100, 100, 100), "inside": figures(20, 40, 60)}, follow, area))
    assert "(not fewer from group to group)" in said and "the trend is not the same" in said


@pytest.mark.parametrize(
    ("ends", "words"), [((0.2, 0.7), "more is kept"), ((-0.7, -0.2), "less is kept"), ((-0.1, 0.2), "neither more nor")]
)
def test_of_one_group_nothing_is_said_about_an_order(ends, words):
    one = {"kept": [over_seeds([100.0], (99, 100))], "inside": [over_seeds([20.0], (19, 21))]}
    said = " ".join(hierarchy.sentences(one, [over_seeds([sum(ends) / 2], ends)], over_seeds([20.0], None)))
    assert "Here nearly all is kept; of that, 20.0 % lies" in said and f"Here {words}" in said
    assert "group" not in said and "the trend is" not in said


@pytest.mark.parametrize("name", ["table1", "table5", "figure4"])
def test_masks_without_any_object_leave_nothing_behind(run, masks, tmp_path, name):
    for path in (masks / "masks").iterdir():
        save(path, np.zeros((4, 4), np.uint8))
    code, _, errors = run(name, "--data", masks)
    assert code == 2 and len(errors) == 1 and "all 6 are empty" in errors[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "option"), [("table1", "--data"), ("table5", "--photos"), ("figure3", "--photos"), ("figure7", "--data")])
def test_an_output_that_is_a_file(run, masks, photos, tmp_path, name, option):
    (tmp_path / "out").write_text("here")
    code, _, errors = run(name, option, photos if option == "--photos" else masks)
    assert code == 2 and len(errors) == 1 and "the output must be a folder" in errors[0]
