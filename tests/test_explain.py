"""From photos to heatmaps: exact maps, names that never collide, a page that stands alone, a manifest that is true."""

import base64
import json
import re
import socket
from html.parser import HTMLParser
from pathlib import Path

import iared2  # first: makes timm importable beside a CPU-only torch

# isort: split
import numpy as np
import pytest
import timm
import torch
from PIL import Image

from iared2 import output
from iared2.data.pictures import Failure
from iared2.explain import class_names, explain, interpreter_maps, measure
from iared2.explain.ours import trace_with_heads
from iared2.reducers.baselines import RandomReducer
from iared2.report import colours, files, page, pictures
from iared2.report.gallery import Gallery, GallerySettings, Preparation
from iared2.saving import load_reduced, save_reduced, sha256
from iared2.worth import WorthConfig

GROUPS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model folder with random weights, whose scores spread around 0.5."""
    torch.manual_seed(0)
    model = iared2.reduce(
        timm.create_model("iared2_mini_patch8_64", num_classes=10), GROUPS, interpreter=iared2.InterpreterConfig(init_score=0.5)
    )
    for reducer in model.reducers:
        for parameter in reducer.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.labels = [f"<kind & {i}>" for i in range(10)]
    target = tmp_path_factory.mktemp("model") / "small"
    save_reduced(model, target, with_backbone=True)
    return target


@pytest.fixture
def model(folder):
    return load_reduced(str(folder))


@pytest.fixture
def photos(tmp_path) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = []
    for name, size in (("tall.png", (90, 50)), ("wide.jpg", (40, 300)), ("square.png", (64, 64))):
        coarse = Image.fromarray(rng.integers(0, 255, (6, 6, 3), np.uint8))
        path = tmp_path / "in" / name
        path.parent.mkdir(exist_ok=True)
        coarse.resize(size[::-1], Image.Resampling.BICUBIC).save(path)
        paths.append(path)
    return paths


def run(model, paths, out, **settings):
    out.mkdir(exist_ok=True)
    return Gallery(model, out, GallerySettings("small", **settings)).run(paths)


class Page(HTMLParser):
    """Collects tags and their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


# ---- the maps --------------------------------------------------------------------------------------------------


def test_maps_come_from_the_trace_and_dropped_patches_count_as_zero(model):
    images = torch.randn(3, 3, 64, 64)
    maps = interpreter_maps(model, images)
    explanations = explain(model, images)
    assert maps.shape == (3, GROUPS, 8, 8)
    for image, explanation in enumerate(explanations):
        trace = explanation.trace
        assert torch.equal(maps[image], torch.stack([trace.heatmap(g)[0] for g in range(GROUPS)]))
        for group in range(1, GROUPS):
            gone = ~trace.keep_GBN[group - 1, 0]
            assert gone.any()
            assert (trace.score_GBN[group, 0][gone] == 0).all()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"on_drop": "merge", "place": "between", "worth": WorthConfig()},
        {"on_drop": "fuse"},
        {"interpreter": iared2.InterpreterConfig(policy="class", context=True), "groups": (1, 3), "on_drop": "merge"},
    ],
    ids=["paper", "between", "fuse", "context"],
)
def test_heads_are_those_whose_mean_is_the_score_and_the_walk_is_the_models_own(settings):
    interpreter = iared2.InterpreterConfig(init_score=0.5)
    reduced = iared2.reduce(timm.create_model("iared2_mini_patch8_64"), **{"groups": GROUPS, "interpreter": interpreter} | settings).eval()
    for parameter in reduced.reducers.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    images = torch.randn(3, 3, 64, 64)
    with torch.inference_mode():
        logits, trace, heads = trace_with_heads(reduced, images)
        own_logits, own = reduced.trace(images)
    assert torch.equal(logits, own_logits) and torch.equal(trace.keep_GBN, own.keep_GBN) and trace.macs == own.macs
    assert torch.equal(trace.score_GBN, own.score_GBN) and trace.keep_ratio.min() < 1
    assert heads.shape == (trace.groups, 3, reduced.reducers[0].interpreter.heads, 64)
    assert torch.allclose(heads.mean(2), own.score_GBN, atol=1e-6)
    assert heads.std(2).max() > 0.01  # heads do differ


def test_reducers_without_an_interpreter_have_no_heads(model):
    model.reducers[1] = RandomReducer(0.5)
    _, trace, heads = trace_with_heads(model, torch.randn(1, 3, 64, 64))
    assert heads is None and trace.groups == GROUPS


def test_multiply_adds_add_up_group_by_group(model):
    (explanation,) = explain(model, torch.randn(1, 3, 64, 64))
    trace = explanation.trace
    assert explanation.macs_G[-1] == trace.macs[0]
    kept = [*trace.keep_GBN[:, 0].sum(-1).tolist()]
    first = model.adapter.embed_macs(64, 64) + model.reducers[0].macs(64, kept[0])
    blocks = range(trace.first_blocks[0], trace.first_blocks[1])
    assert explanation.macs_G[0] == first + sum(model.adapter.block_cost(b).macs(model.adapter.prefix + kept[0]) for b in blocks)
    assert explanation.macs_G[0] < explanation.macs_G[1] < explanation.macs_G[2] < trace.dense_macs


def test_predictions_are_the_logits_best_first(model):
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        chances = model(images).softmax(1)
    for row, explanation in zip(chances, explain(model, images), strict=True):
        assert [p.index for p in explanation.predictions] == row.topk(5).indices.tolist()
        assert explanation.predictions[0].label == f"<kind & {int(row.argmax())}>"
        assert explanation.predictions[0].probability == pytest.approx(float(row.max()), abs=1e-5)


def test_measuring_runs_both_models_on_the_same_images(model):
    speed = measure(model, torch.randn(2, 3, 64, 64), rounds=1)
    assert speed.images == 2
    assert speed.reduced_ms > 0
    assert speed.dense_ms > 0


def test_an_answer_that_is_not_finite_is_an_error(model):
    model.backbone.head.bias.data[0] = float("nan")
    with pytest.raises(iared2.IARED2Error, match="not finite"):
        explain(model, torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize("part", ["patch_embed.backbone.conv1.weight", "blocks.3.mlp.fc1.weight"])
def test_damaged_weights_do_not_end_in_a_confident_answer(part, model):
    model.backbone.get_parameter(part).data.fill_(float("nan"))
    with pytest.raises(iared2.IARED2Error, match="not finite"):
        explain(model, torch.randn(1, 3, 64, 64))


def test_class_names_from_the_model_from_imagenet_or_none(model):
    assert class_names(model)[3] == "<kind & 3>"
    model.labels = None
    assert class_names(model) is None
    thousand = iared2.reduce(timm.create_model("iared2_mini_patch8_64", num_classes=1000))
    assert class_names(thousand)[281].startswith("tabby")


def test_labels_survive_saving(model, tmp_path):
    save_reduced(model, tmp_path / "again", with_backbone=True)
    again = load_reduced(str(tmp_path / "again"))
    assert again.labels == model.labels
    assert [path.name for path in again.files] == ["reducers.safetensors", "backbone.safetensors"]
    (tmp_path / "again/labels.json").write_text('{"no": "list"}')
    with pytest.raises(iared2.IARED2Error, match="list of class names"):
        load_reduced(str(tmp_path / "again"))


def test_the_whole_photo_is_squeezed(model):
    photo = Image.new("RGB", (400, 100), "black")
    photo.paste("white", (200, 0, 400, 100))
    prepared = Preparation.of(model)(photo)
    assert prepared.shape == (3, 64, 64)
    assert (prepared[:, :, :30].amax() < -1) and (prepared[:, :, 34:].amin() > 1)


# ---- the pictures ----------------------------------------------------------------------------------------------


def test_overlays_have_the_photos_own_size_and_keep_places():
    scores = np.zeros((4, 4), np.float32)
    scores[0, 3] = 1
    photo = Image.new("RGB", (200, 120), (90, 90, 90))
    heat = pictures.overlay(photo, scores)
    assert heat.size == photo.size
    low, high = (np.asarray(colours.table()[i], float) * pictures.HEAT + 90 * (1 - pictures.HEAT) for i in (0, 255))
    assert np.allclose(heat.getpixel((5, 115)), low, atol=2)
    assert np.allclose(heat.getpixel((195, 5)), high, atol=2)


def test_faded_patches_are_exactly_the_dropped_ones():
    rng = np.random.default_rng(0)
    kept = rng.random((5, 7)) < 0.5
    photo = Image.fromarray(rng.integers(0, 100, (50, 70, 3), np.uint8))
    same = (np.asarray(pictures.faded(photo, kept)) == np.asarray(photo)).all(-1)
    assert np.array_equal(same, np.kron(kept, np.ones((10, 10), bool)))


@pytest.mark.parametrize("size", [(8, 8), (64, 64), (3000, 2000), (8, 5000), (500, 480)])
def test_panels_are_worth_looking_at(size):
    width, height = pictures.panel_size(size)
    assert max(width, height) <= pictures.LARGEST
    assert min(width, height) >= pictures.SMALLEST or max(width, height) == pictures.LARGEST


def test_hierarchy_has_one_panel_more_than_groups():
    sheet = pictures.hierarchy(Image.new("RGB", (320, 320)), [np.ones((4, 4), bool)] * 3)
    assert sheet.size == (4 * 320 + 3 * pictures.GAP, 320)


SIGHT = {  # linear RGB as seen by others: Machado, Oliveira and Fernandes 2009, severity 1
    "all cones": np.eye(3),
    "no red cones": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green cones": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "no blue cones": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


@pytest.mark.parametrize("sight", SIGHT)
def test_the_colour_map_rises_in_lightness_for_every_kind_of_sight(sight):
    rgb = colours.table() / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = (linear @ np.transpose(SIGHT[sight])).clip(0, 1)
    lightness = 116 * np.cbrt(seen @ [0.2126, 0.7152, 0.0722]) - 16
    steps = np.diff(lightness[::15])  # single steps drown in the rounding to 8 bits
    assert (steps > 2).all()
    assert steps.std() < (0.1 if sight == "all cones" else 0.2) * steps.mean()


# ---- names -----------------------------------------------------------------------------------------------------


def test_names_never_collide():
    given = "a.jpg a.png A.JPG x/a.jpg y/a.jpg b.jpg manifest.json.jpg ../c\td.jpg ... [red].jpg"
    paths = [Path(text) for text in given.split(" ")]
    names = files.unique_names(paths)
    assert len({name.casefold() for name in names}) == len(paths)
    assert names[5] == "b"
    assert not {name.casefold() for name in names} & files.RESERVED
    assert all(re.fullmatch(r"\w[\w.-]*", name) for name in names)
    assert len(files.unique_names([Path("é" * 300 + ".jpg")])[0].encode()) < 250


# ---- a run -----------------------------------------------------------------------------------------------------


def test_a_run_writes_what_its_manifest_says(model, folder, photos, tmp_path):
    out = tmp_path / "out"
    outcome = run(model, photos, out, batch_size=2)
    assert outcome.exit_code == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["schema_version"] == 1
    assert manifest["preprocessing"]["resize"] == "squeeze"
    assert {w["file"]: w["sha256"] for w in manifest["weights"]} == {
        f"small/{name}": sha256(folder / name) for name in ("reducers.safetensors", "backbone.safetensors")
    }
    assert manifest["timing"]["photos"] == 3
    assert manifest["timing"]["milliseconds"]["dense"] > 0
    assert [entry["name"] for entry in manifest["photos"]] == ["tall", "wide", "square"]
    for path, entry in zip(photos, manifest["photos"], strict=True):
        image = Preparation.of(model)(Image.open(path).convert("RGB"))[None]
        logits, trace = model.trace(image)
        assert entry["predictions"][0]["index"] == int(logits.argmax())
        assert entry["keep_ratio"] == pytest.approx(trace.keep_ratio[0].tolist(), abs=1e-5)
        assert (entry["macs"], entry["dense_macs"]) == (trace.macs[0], trace.dense_macs)
        for number, group in enumerate(entry["groups"]):
            scores = np.load(out / group["scores"], allow_pickle=False)
            assert np.allclose(scores, trace.heatmap(number)[0].detach().numpy(), atol=1e-5)
            assert Image.open(out / group["overlay"]).size == Image.open(path).size
        assert np.load(out / entry["kept"]).shape == (GROUPS, 8, 8)
        assert min(Image.open(out / entry["hierarchy"]).size) >= 90
    assert not list(out.rglob("*.partial"))


def test_methods_stand_side_by_side_and_their_maps_are_kept(model, photos, tmp_path):
    methods = ("ours", "attention:1", "chefer", "background")
    Gallery(model, tmp_path, GallerySettings("m", device="cpu", workers=0, methods=methods)).run(photos)
    entry = json.loads((tmp_path / "manifest.json").read_text())["photos"][0]
    assert list(entry["methods"]) == list(methods)
    maps = {name: np.load(tmp_path / path) for name, path in entry["methods"].items()}
    assert maps["chefer"].shape == maps["ours"].shape == (8, 8) and not np.array_equal(maps["chefer"], maps["ours"])
    with Image.open(tmp_path / entry["methods_sheet"]) as sheet, Image.open(photos[0]) as photo:
        width, height = pictures.panel_size(photo.size)
        assert sheet.width >= 2 * width and sheet.height >= height
    stretched = pictures.stretched(np.array([[2.0, 4.0], [3.0, 2.0]]))
    assert stretched.tolist() == [[0.0, 1.0], [0.5, 0.0]] and not pictures.stretched(np.ones((2, 2))).any()


def test_the_manifest_is_written_last(model, photos, tmp_path, monkeypatch):
    order = []
    original = output.write
    monkeypatch.setattr(output, "write", lambda path, content: order.append(path.name) or original(path, content))
    run(model, photos, tmp_path / "out")
    assert order[-2:] == ["index.html", "manifest.json"]


def test_the_page_stands_alone_and_can_be_read_without_eyes(model, photos, tmp_path):
    hostile = photos[0].with_name("<img src=x onerror=alert(1)>.png")
    photos[0].rename(hostile)
    run(model, [hostile, photos[1]], tmp_path / "out")
    text = (tmp_path / "out/index.html").read_text()
    parsed = Page(text)
    assert not re.search(r"https?://|//cdn|@import|url\(", text)
    for tag, attributes in parsed.tags:
        assert tag != "link"
        assert not attributes.get("onerror")
        if tag == "img" and attributes.get("src"):
            assert attributes["src"].startswith("data:image/")
            assert attributes["alt"]
        if tag == "button" and "zoom" in attributes.get("class", ""):
            assert attributes["aria-label"]
    shown = [a for tag, a in parsed.tags if tag == "img" and a.get("src")]
    assert len(shown) == 2 * (1 + 2 * GROUPS)
    assert "&lt;kind &amp;" in text  # labels of the model are text, not markup


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"on_drop": "discard"}, "the model goes on without them"),
        ({"on_drop": "merge"}, "averaged into the most similar kept ones"),
        ({"on_drop": "merge", "weights": "kept"}, "the most similar kept ones count for them"),
        ({"on_drop": "fuse"}, "averaged into one token"),
    ],
)
def test_the_page_says_what_becomes_of_dropped_patches(settings, said, model, photos, tmp_path):
    model.configure(**settings)
    run(model, photos[:1], tmp_path / "out")
    assert said in (tmp_path / "out/index.html").read_text()


def test_the_pages_numbers_are_those_of_the_files(model, photos, tmp_path):
    Gallery(model, tmp_path, GallerySettings("m", device="cpu", workers=0, methods=("rollout", "gaussian"))).run(photos)
    text, entries = (tmp_path / "index.html").read_text(), json.loads((tmp_path / "manifest.json").read_text())["photos"]
    blocks = [json.loads(block) for block in re.findall(r'<script type="application/json" class="numbers">(.*?)</script>', text)]
    for entry, block in zip(entries, blocks, strict=True):
        scores = np.stack([np.load(tmp_path / group["scores"]) for group in entry["groups"]])
        heads, carriers = np.load(tmp_path / entry["heads"]), np.load(tmp_path / entry["carriers"])
        assert np.allclose(heads.mean(1), scores, atol=1e-6)
        assert np.allclose(integers(block["scores"]) / 65535, scores.ravel(), atol=1e-5)
        assert np.allclose(integers(block["heads"]) / 65535, heads.ravel(), atol=1e-5)
        assert np.array_equal(integers(block["carriers"]), np.where(carriers < 0, 65535, carriers).ravel())
        assert block["groups"] == [{key: group[key] for key in ("kept", "keep_ratio", "macs")} for group in entry["groups"]]
        rollout, gaussian = block["methods"]
        values = np.load(tmp_path / entry["methods"]["rollout"]).ravel()
        shown = rollout["low"] + (rollout["high"] - rollout["low"]) * integers(rollout["values"]) / 65535
        assert np.allclose(shown, values, rtol=1e-3) and not rollout["fine"]
        assert gaussian["fine"] and len(integers(gaussian["values"])) == 64
    assert sum(len(json.dumps(block)) for block in blocks) < len(text) / 4  # pictures weigh more


def integers(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<u2")


def test_a_page_over_many_photos_stays_one_file():
    assert page.thumbnail_side(10) > page.thumbnail_side(300) > page.thumbnail_side(5000)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (900, 1200, 3), np.uint8))
    assert len(page.thumbnail(noise, page.thumbnail_side(5000))) < 60_000


def test_batches_workers_and_repeats_do_not_change_results(model, photos, tmp_path):
    for name, settings in {"a": {"batch_size": 1, "workers": 0}, "b": {"batch_size": 3, "workers": 3}}.items():
        run(model, photos, tmp_path / name, **settings)
    for scores in (tmp_path / "a").rglob("*.npy"):
        other = np.load(tmp_path / "b" / scores.relative_to(tmp_path / "a"))
        assert np.allclose(np.load(scores), other, atol=1e-5)


def test_unreadable_files_are_noted_and_the_others_go_on(model, photos, tmp_path):
    photos[1].write_text("no picture any more")
    outcome = run(model, photos, tmp_path / "out")
    assert outcome.exit_code == 1
    assert [photo.name for photo in outcome.photos] == ["tall", "square"]
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["failed"][0]["file"].endswith("wide.jpg")
    assert "could not be used" in (tmp_path / "out/index.html").read_text()


def test_a_run_in_which_nothing_works_leaves_earlier_results_alone(model, photos, tmp_path):
    run(model, photos, tmp_path / "out")
    before = (tmp_path / "out/manifest.json").read_bytes()
    (tmp_path / "bad.jpg").write_text("x")
    outcome = run(model, [tmp_path / "bad.jpg"], tmp_path / "out")
    assert outcome.exit_code == 2
    assert (tmp_path / "out/manifest.json").read_bytes() == before


def test_failed_sources_join_the_list(model, photos, tmp_path):
    (tmp_path / "out").mkdir()
    gallery = Gallery(model, tmp_path / "out", GallerySettings("small"))
    seen = []
    outcome = gallery.run(photos, seen.append, [Failure(Path("gone"), "gone: no such file")])
    assert outcome.exit_code == 1
    assert sorted(seen) == sorted(photos)


def test_when_the_disk_is_full_finished_photos_stay_and_the_rest_is_removed(model, photos, tmp_path, monkeypatch):
    original = output.write

    def full(path, content):
        if path.parent.name == "wide" and path.name == "overlay_group2.png":
            raise output.OutputError(f"{path}: cannot be written (No space left on device)")
        return original(path, content)

    monkeypatch.setattr(output, "write", full)
    outcome = run(model, photos, tmp_path / "out", batch_size=2, workers=0)
    assert "No space left" in outcome.stopped
    assert outcome.exit_code == 1
    assert [photo.name for photo in outcome.photos] == ["tall"]
    assert not (tmp_path / "out/wide").exists()
    assert (tmp_path / "out/manifest.json").is_file()


def test_no_network_is_touched(folder, photos, tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert run(load_reduced(str(folder)), photos, tmp_path / "out").exit_code == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_gives_nearly_the_same_maps(model, photos, tmp_path, dtype):
    model.threshold = -1.0
    run(model, photos, tmp_path / "full")
    run(model, photos, tmp_path / "half", dtype=dtype)
    full, half = (np.load(tmp_path / kind / "tall/scores_group1.npy") for kind in ("full", "half"))
    assert np.abs(full - half).max() < 0.05
