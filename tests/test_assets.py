"""Embedded models prove themselves, stay small, and say where they come from; the box score on maps whose answer is known."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from iared2 import assets
from iared2.data.arrays import ImageArrays, Preprocess
from iared2.errors import DataError, WeightsError
from iared2.evaluate.boxes import gaussian, inside, score_boxes
from iared2.golden import FILE, check_golden, golden_images
from iared2.saving import load_reduced, sha256

LIMITS = {"iared2_mini_patch8_96": 12_000_000, "deit_tiny_patch16_224": 1_000_000}


@pytest.mark.parametrize("name", assets.embedded())
def test_embedded_models_are_small_and_carry_a_card(name):
    folder = assets.HERE / name
    assert sum(path.stat().st_size for path in folder.iterdir()) <= LIMITS[name]
    card, config = (folder / "README.md").read_text(), json.loads((folder / "config.json").read_text())
    assert f"{config['metrics']['top1']:.2f} %" in card and f"{config['metrics']['dense_top1']:.2f} %" in card
    for word in (f"`{name}`", "## Training", "## Limits", "SHA-256", '"seed"'):
        assert word in card
    for path in folder.glob("*.safetensors"):
        assert f"| {path.name} | {path.stat().st_size} | `{sha256(path)}` |" in card


def test_the_default_model_agrees_with_its_golden_tensors():
    folder = assets.find(assets.DEFAULT)
    assert check_golden(load_reduced(assets.DEFAULT), folder) < 1e-3


@pytest.mark.parametrize("part", ["logits", "scores", "kept"])
def test_golden_tensors_of_other_answers_are_refused(part, tmp_path):
    folder = shutil.copytree(assets.find(assets.DEFAULT), tmp_path / "model")
    model = load_reduced(str(folder))
    golden = load_file(folder / FILE)
    golden[part] = golden[part] + 1
    save_file(golden, folder / FILE)
    with pytest.raises(WeightsError, match="do not belong together"):
        check_golden(model, folder)
    (folder / FILE).write_bytes(b"damaged")
    with pytest.raises(WeightsError, match="not a readable safetensors file"):
        check_golden(model, folder)
    (folder / FILE).unlink()
    with pytest.raises(WeightsError, match="no such weights file"):
        check_golden(model, folder)


def test_golden_images_differ_from_each_other_and_from_place_to_place():
    images = golden_images((64, 64))
    assert not torch.equal(images[0], images[1]) and images.std() > 0.3


def test_shares_inside_boxes_by_hand():
    maps = torch.zeros(2, 8, 8)
    maps[0, 2:4, 2:4] = 1.0  # all of it inside
    maps[1] = 1.0  # uniform: the box's share of the area
    boxes = torch.tensor([[2, 2, 3, 3], [0, 0, 3, 7]])
    assert inside(maps, boxes).tolist() == [1.0, 0.5]


def test_the_gaussian_is_centred_and_falls_to_the_edge():
    bell = gaussian(9, 9)
    assert bell.argmax() == 40 and torch.allclose(bell, bell.flip(0)) and bell[4, 0] < bell[4, 2] < bell[4, 4]


def test_a_report_on_boxes_counts_pictures_and_compares_in_pairs():
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 255, (6, 64, 64, 3), generator=draw, dtype=torch.uint8)
    boxes = torch.tensor([[0, 0, 63, 31]] * 6)
    model = load_reduced(assets.DEFAULT)
    how = Preprocess((64, 64), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    report = score_boxes(model, ImageArrays(pixels, torch.zeros(6, dtype=torch.int64), boxes=boxes), how)
    assert report.pictures == 6
    assert report.share["uniform"] == pytest.approx(50) and report.share["gaussian"] == pytest.approx(50)
    assert report.ahead["uniform"][0] == pytest.approx(report.share["model"] - 50)
    with pytest.raises(DataError, match="boxes"):
        score_boxes(model, ImageArrays(pixels, torch.zeros(6, dtype=torch.int64)), how)
