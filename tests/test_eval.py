"""`iared2 eval`: figures against a slow loop, the dense model beside, the JSON file, errors before the work."""

import json
import math

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.nn import functional as F

import iared2
from iared2 import cost
from iared2.cli import main
from iared2.data.arrays import ArrayBatches, ImageArrays, Preprocess
from iared2.data.batches import FileBatches
from iared2.data.sources import open_data
from iared2.errors import ConfigError, DataError, IARED2Error, WeightsError
from iared2.evaluate import classify
from iared2.evaluate.classify import eval_preprocess, evaluate, run_eval
from iared2.runtime import pick_device, precision
from iared2.saving import load_reduced, save_reduced

CLASSES, COUNT = 7, 22


def tiny(classes=CLASSES, seed=0):
    """A random ViT of 16 tokens with two groups whose thresholds split the scores."""
    torch.manual_seed(seed)
    model = iared2.reduce(timm.create_model("test_vit", img_size=64, num_classes=classes), groups=2).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    with torch.no_grad():
        for group in range(2):
            scores = model.trace(torch.randn(8, 3, 64, 64))[1].score_GBN[group]
            thresholds = [0.0, 0.0] if group == 0 else [model.threshold[0], 0.0]
            thresholds[group] = float(scores[scores > 0].median())
            model.threshold = thresholds
    return model


def noise(count, size=64):
    return torch.from_numpy(np.random.default_rng(1).integers(0, 256, (count, size, size, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def arrays():
    return ImageArrays(noise(COUNT), torch.arange(COUNT) % CLASSES)


HOW = Preprocess((64, 64), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def slow(model, batches):
    """Every figure image by image in plain Python."""
    rows = []
    reducers = dict(zip(model.config.first_blocks, model.reducers, strict=True))
    for batch in batches.epoch(0):
        for image, label in zip(batch["images"], batch["labels"].tolist(), strict=True):
            with torch.no_grad():
                dense = model.backbone(image[None])[0].double()
                logits, trace = model.trace(image[None])
                reduced = logits[0].double()
            p, q = dense.softmax(0), reduced.softmax(0)
            kept = trace.keep_GBN[:, 0].sum(1).tolist()
            row = {
                "dense_top1": int(dense.argmax()) == label,
                "reduced_top1": int(reduced.argmax()) == label,
                "dense_top5": label in dense.topk(5).indices,
                "reduced_top5": label in reduced.topk(5).indices,
                "agreement": int(dense.argmax()) == int(reduced.argmax()),
                "kl": float((p * (p.log() - q.log())).sum()),
                "macs": trace.macs[0],
                "linear": cost.reduced_macs(model.adapter, reducers, (64, 64), 16, kept, products=False),
                "keep": trace.keep_ratio[0].tolist(),
            }
            rows.append(row)
    return rows


def mean(rows, name):
    return sum(row[name] for row in rows) / len(rows)


@pytest.mark.parametrize("batch_size", [1, 5, COUNT])
def test_figures_equal_a_slow_loop(model, arrays, batch_size):
    batches = ArrayBatches(arrays, HOW, batch_size, train=False)
    report, rows = evaluate(model, batches), slow(model, batches)
    assert report.images == COUNT
    for name, row in (("dense", report.dense), ("reduced", report.reduced)):
        assert row.name == name
        assert row.top1 == pytest.approx(100 * mean(rows, f"{name}_top1"), abs=1e-3)
        assert row.top5 == pytest.approx(100 * mean(rows, f"{name}_top5"), abs=1e-3)
        assert row.images_per_second > 0
    assert 0.05 < mean(rows, "macs") / report.dense.macs < 0.95
    assert report.reduced.agreement == pytest.approx(100 * mean(rows, "agreement"), abs=1e-3)
    assert report.reduced.kl == pytest.approx(mean(rows, "kl"), rel=1e-3)
    assert report.reduced.macs == round(mean(rows, "macs"))
    assert report.reduced.macs_linear == round(mean(rows, "linear"))
    assert report.reduced.macs_share == pytest.approx(report.reduced.macs / report.dense.macs, rel=1e-6)
    assert report.reduced.keep_ratio == pytest.approx([sum(r["keep"][g] for r in rows) / COUNT for g in range(2)])
    assert report.dense.keep_ratio == (1.0, 1.0)
    differences = np.array([row["reduced_top1"] - float(row["dense_top1"]) for row in rows])
    assert report.comparison.difference == pytest.approx(100 * differences.mean())
    assert report.comparison.standard_error == pytest.approx(100 * differences.std(ddof=1) / math.sqrt(COUNT))


def test_figures_per_source(model, arrays):
    batches = ArrayBatches(arrays, HOW, 5, train=False)
    sources = ["web" if index % 3 else "camera" for index in range(COUNT)]
    report, rows = evaluate(model, batches, sources), slow(model, batches)
    assert [part.source for part in report.sources] == ["camera", "web"]
    for part in report.sources:
        chosen = [row for row, source in zip(rows, sources, strict=True) if source == part.source]
        assert part.images == len(chosen)
        assert part.reduced_top1 == pytest.approx(100 * mean(chosen, "reduced_top1"), abs=1e-3)
        assert part.dense_top5 == pytest.approx(100 * mean(chosen, "dense_top5"), abs=1e-3)
        assert part.agreement == pytest.approx(100 * mean(chosen, "agreement"), abs=1e-3)
    assert "| camera | 8 |" in report.markdown()


def test_keeping_everything_is_the_dense_model(arrays):
    model = tiny()
    model.threshold = -1
    report = evaluate(model, ArrayBatches(arrays, HOW, 4, train=False))
    assert report.reduced.top1 == report.dense.top1
    assert report.reduced.top5 == report.dense.top5
    assert report.reduced.agreement == 100
    assert report.reduced.keep_ratio == (1.0, 1.0)
    assert report.reduced.kl == pytest.approx(0, abs=1e-6)
    assert report.comparison.difference == report.comparison.standard_error == 0


def test_both_models_run_alternately(model, arrays, monkeypatch):
    order = []
    dense, reduced = type(model.backbone).forward, type(model).answer
    monkeypatch.setattr(type(model.backbone), "forward", lambda *a, **k: order.append("d") or dense(*a, **k))
    monkeypatch.setattr(type(model), "answer", lambda *a: order.append("r") or reduced(*a))
    evaluate(model, ArrayBatches(arrays, HOW, 8, train=False))
    assert "".join(order) == "drdr" + "drrddr"  # warm-up, then three batches


def test_train_mode_is_put_back(arrays):
    model = tiny().train()
    evaluate(model, ArrayBatches(arrays, HOW, 8, train=False))
    assert model.training


def test_labels_must_be_the_models(model):
    data = ImageArrays(noise(4), torch.tensor([0, 1, 2, CLASSES]))
    with pytest.raises(DataError, match=f"label {CLASSES} .*outside the model's {CLASSES} classes"):
        evaluate(model, ArrayBatches(data, HOW, 4, train=False))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_answers_that_are_no_numbers_agree_with_nothing(arrays, value):
    """Two models that answer NaN would agree everywhere, at a difference of 0."""
    broken = tiny()
    broken.backbone.head.bias.data[3] = value
    batches = ArrayBatches(arrays, HOW, 8, train=False)
    with pytest.raises(ConfigError, match=r"the dense model answers NaN or infinity; check its weights, or compute in float32"):
        evaluate(broken, batches)
    broken = tiny()
    broken.adapter.head = lambda tokens: torch.full((tokens.layout.images, CLASSES), value)
    with pytest.raises(ConfigError, match="the reduced model answers NaN"):
        evaluate(broken, batches)


def test_a_model_that_answers_nan_ends_in_one_line(pictures, tmp_path, capsys):
    """Finite weights may do so all the same."""
    broken = tiny()
    for block in broken.backbone.blocks:
        block.mlp.fc2.bias.data[:2] = 3e38
    save_reduced(broken, tmp_path / "broken", with_backbone=True)
    arguments = ["eval", "--data", str(pictures), "--model", str(tmp_path / "broken"), "--json", str(tmp_path / "found.json")]
    assert main(arguments) == 2
    words = "the dense model answers NaN or infinity; check its weights, or compute in float32"
    assert capsys.readouterr().err.strip().splitlines() == [f"iared2: {words}"]
    assert not (tmp_path / "found.json").exists()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_reduced(model, folder, with_backbone=True)
    return folder


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines = ["file,class_index,source"]
    for number, pixels in enumerate(noise(9, 80)):
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
        lines.append(f"{number}.png,{number % CLASSES},{'web' if number % 2 else 'camera'}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_the_command(saved, pictures, tmp_path, capsys):
    target = tmp_path / "new" / "report.json"
    assert run_eval(str(saved), pictures, json_file=target, device="cpu", batch_size=4, seed=3) == 0
    screen = capsys.readouterr().out
    assert screen.startswith("| model | top-1 % |")
    assert "\n| dense | " in screen
    assert "\n| camera | 5 |" in screen
    content = json.loads(target.read_text())
    assert [path.name for path in target.parent.iterdir()] == ["report.json"]
    assert [row["name"] for row in content["rows"]] == ["dense", "reduced"]
    for row in content["rows"]:
        assert 0 <= row["top1"] <= row["top5"] <= 100
        assert isinstance(row["macs"], int)
        assert len(row["keep_ratio"]) == 2
        assert row["images_per_second"] > 0
    assert content["rows"][0]["keep_ratio"] == [1.0, 1.0]
    assert content["schema_version"] == 1
    assert content["seed"] == 3
    assert content["skipped"] == {}
    assert content["settings"]["preprocess"]["size"] == [64, 64]
    assert {"torch", "timm", "python"} <= set(content["versions"])
    assert content["machine"]["threads"] >= 1
    assert {part["source"] for part in content["sources"]} == {"web", "camera"}
    loaded = load_reduced(str(saved))
    again = evaluate(loaded, FileBatches(open_data(pictures), eval_preprocess(loaded), 4, train=False))
    assert content["rows"][1]["macs"] == again.reduced.macs


def test_options_of_the_command(saved, pictures, tmp_path):
    target = tmp_path / "report.json"
    assert run_eval(str(saved), pictures, threshold=-1, on_drop="merge", json_file=target, dtype="bfloat16", limit=5, workers=1) == 0
    content = json.loads(target.read_text())
    assert content["images"] == 5
    assert content["rows"][1]["keep_ratio"] == [1.0, 1.0]
    assert content["settings"]["threshold"] == -1
    assert content["settings"]["on_drop"] == "merge"
    assert content["settings"]["dtype"] == "bfloat16"


def test_broken_pictures_give_exit_code_1(saved, pictures, tmp_path, caplog):
    (pictures / "4.png").write_text("text")
    (pictures / "6.png").unlink()
    target = tmp_path / "report.json"
    assert run_eval(str(saved), pictures, json_file=target) == 1
    content = json.loads(target.read_text())
    assert content["images"] == 7
    assert set(content["skipped"]) == {"4.png", "6.png"}
    assert "2 broken pictures were skipped: 4.png, 6.png" in caplog.text


def test_errors_before_the_work(saved, pictures, tmp_path, monkeypatch):
    with pytest.raises(DataError, match="no such folder"):
        run_eval(str(saved), tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no pictures in it"):
        run_eval(str(saved), tmp_path / "empty")
    with pytest.raises(WeightsError, match="no such weights file"):
        run_eval(str(saved), pictures, weights=tmp_path / "none.safetensors")
    with pytest.raises(ConfigError, match="on_drop"):
        run_eval(str(saved), pictures, on_drop="nothing")
    with pytest.raises(ConfigError, match="at least 1"):
        run_eval(str(saved), pictures, batch_size=0)
    (pictures / "labels.csv").write_text("file,class_index\n0.png,999\n")
    with pytest.raises(DataError, match=r"label 999 .*outside the model's 7 classes"):
        run_eval(str(saved), pictures)
    (pictures / "labels.csv").write_text("file,class_index\nnone.png,1\n")
    with pytest.raises(IARED2Error, match="no readable picture"):
        run_eval(str(saved), pictures)


def test_a_report_that_cannot_be_written_stops_at_once(pictures, tmp_path):
    (tmp_path / "file").write_text("")
    for target in (tmp_path, tmp_path / "file" / "report.json"):
        with pytest.raises(ConfigError, match="cannot be written"):
            run_eval("a model that would not be found", pictures, json_file=target)


def test_folders_named_by_wordnet_id_meet_a_model_of_1000_classes(tmp_path):
    names = timm.data.ImageNetInfo().label_names()
    model = tiny(classes=1000)
    save_reduced(model, tmp_path / "model", with_backbone=True)
    for index in (902, 17):
        (tmp_path / "data" / names[index]).mkdir(parents=True)
        Image.fromarray(noise(1, 80)[0].numpy()).save(tmp_path / "data" / names[index] / "0.png")
    run_eval(str(tmp_path / "model"), tmp_path / "data", json_file=tmp_path / "report.json")
    pictures = classify._pictures(model, tmp_path / "data", None, 0)
    assert pictures.labels.tolist() == [17, 902]
    how = eval_preprocess(model)
    images = next(FileBatches(pictures, how, 2, train=False).epoch(0))["images"]
    right = (model.backbone(images).argmax(1) == pictures.labels).float().mean()
    assert json.loads((tmp_path / "report.json").read_text())["rows"][0]["top1"] == pytest.approx(100 * float(right))


def test_a_saved_model_brings_its_own_class_order(tmp_path):
    model = tiny(classes=2)
    model.backbone.class_ids = ["n02000000", "n01000000"]
    save_reduced(model, tmp_path / "model", with_backbone=True)
    for name in sorted(model.backbone.class_ids):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.fromarray(noise(1, 80)[0].numpy()).save(tmp_path / "data" / name / "0.png")
    pictures = classify._pictures(load_reduced(str(tmp_path / "model")), tmp_path / "data", None, 0)
    assert pictures.names == ["n01000000/0.png", "n02000000/0.png"]
    assert pictures.labels.tolist() == [1, 0]


def test_kl_is_dense_against_reduced():
    dense, reduced = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    p = dense.softmax(1)
    expected = float((p * (p.log() - math.log(0.5))).sum())
    found = F.kl_div(reduced.log_softmax(1), dense.log_softmax(1), reduction="none", log_target=True).sum()
    assert float(found) == pytest.approx(expected)


def test_devices_and_precisions():
    assert isinstance(precision(torch.device("cpu"), "bfloat16"), torch.autocast)
    assert pick_device("cpu").type == "cpu"
    with pytest.raises(ConfigError, match="wanted one of"):
        precision(torch.device("cpu"), "float8")
    with pytest.raises(ConfigError, match="cannot be used here"):
        pick_device("nonsense")
