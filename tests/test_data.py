"""Sources of labelled pictures: what is recognised, which label each picture gets, and what an error says."""

import io
import logging
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo

from iared2.data import sources
from iared2.data.arrays import ImageArrays, with_views
from iared2.data.images import LabelledImages
from iared2.data.labels import check_labels, match_classes, model_class_ids
from iared2.data.sources import open_data
from iared2.data.tiny_imagenet import COLUMNS, TILE
from iared2.errors import DataError, HubError

IMAGENET = ImageNetInfo().label_names()
GOLDFISH, SHARK = IMAGENET[1], IMAGENET[2]


def colour(number: int) -> tuple[int, int, int]:
    return (20 * number % 256, 255 - 20 * number % 256, 7 * number % 256)


def encoded(number: int, size=(20, 16), kind="PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, colour(number)).save(stream, kind)
    return stream.getvalue()


def fill(folder, classes, per_class=3):
    """A folder per class; the pictures' colours count up class by class. Returns the folder."""
    for place, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            (folder / name / f"{number}.png").write_bytes(encoded(place * per_class + number))
    return folder


def looks_like(image: Image.Image, number: int) -> bool:
    return image.mode == "RGB" and image.getpixel((3, 3)) == colour(number)


def test_a_folder_gives_sorted_labels(tmp_path):
    data = open_data(fill(tmp_path, ["ant", "bee"]))
    assert isinstance(data, LabelledImages)
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert list(data.class_ids) == ["ant", "bee"]
    assert data.name(4) == "bee/1.png"
    assert data.label(4) == 1
    assert data.source(4) is None
    assert all(looks_like(data.open(i), i) for i in range(6))


def test_a_split_is_looked_for_and_loose_pictures_are_left_out(tmp_path, caplog):
    fill(tmp_path / "train", ["ant", "bee"], 4)
    fill(tmp_path / "validation", ["ant", "bee"], 1)
    (tmp_path / "train" / "loose.png").write_bytes(encoded(9))
    assert len(open_data(tmp_path, "val")) == 2
    with caplog.at_level(logging.WARNING):
        data = open_data(tmp_path, "train")
    assert len(data) == 8
    assert data.labels.tolist() == [0] * 4 + [1] * 4
    assert looks_like(data.open(5), 5)
    assert "1 pictures outside class folders" in caplog.text


def test_wordnet_folders_map_by_id(tmp_path, caplog):
    fill(tmp_path, [SHARK, GOLDFISH])
    assert set(open_data(tmp_path, classes=IMAGENET).labels.tolist()) == {1, 2}
    assert open_data(tmp_path, classes=IMAGENET).labels.tolist() == [1, 1, 1, 2, 2, 2]
    assert open_data(tmp_path, classes=["other", SHARK, GOLDFISH]).labels.tolist() == [2, 2, 2, 1, 1, 1]
    with caplog.at_level(logging.INFO):
        assert open_data(tmp_path).labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert "not known by name: labels 0 to 1 in sorted order" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert open_data(tmp_path, classes=["cat", "dog"]).labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert "are not these" in caplog.text


def test_a_model_that_knows_only_some_of_the_ids_is_an_error():
    with pytest.raises(DataError, match=r"n99999999.*not among the model's 1000 classes, but 1 others are"):
        match_classes([GOLDFISH, "n99999999"], IMAGENET, "data")


def test_a_stray_folder_among_wordnet_ids_is_an_error_and_no_other_labelling():
    with pytest.raises(DataError, match=r"'zzz' is not among the model's 1000 classes, but 1 others are; remove those folders"):
        match_classes([GOLDFISH, "zzz"], IMAGENET, "data")
    assert match_classes(["cat", "dog"], IMAGENET, "data") == [0, 1]


def test_a_models_class_ids():
    model = torch.nn.Linear(1, 1)
    assert model_class_ids(model) is None
    model.num_classes = 1000
    assert model_class_ids(model) == IMAGENET
    model.num_classes, model.pretrained_cfg = 2, {"label_names": ["cat", "dog"]}
    assert model_class_ids(model) == ["cat", "dog"]


@pytest.fixture
def table(tmp_path):
    fill(tmp_path, ["pictures"])
    (tmp_path / "labels.csv").write_text("file,class_index,source\npictures/2.png,7,web\npictures/0.png,5,camera\n")
    return tmp_path


def test_a_folder_with_labels(table):
    data = open_data(table)
    assert data.labels.tolist() == [7, 5]
    assert [data.source(i) for i in range(2)] == ["web", "camera"]
    assert looks_like(data.open(0), 2)
    assert data.subset(1, seed=0).names[0] in data.names
    chosen = data.select([1])
    assert (chosen.name(0), chosen.source(0), chosen.label(0)) == ("pictures/0.png", "camera", 5)
    assert looks_like(chosen.open(0), 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no rows"),
        ("file,class_index\n", "no rows"),
        ("file,label\na.png,1\n", "no column class_index"),
        ("file,class_index\na.png,cat\n", r"line 2: class_index is 'cat', wanted a whole number"),
        ("file,class_index\na.png,1\nb.png\n", "line 3: class_index is None, wanted a whole number"),
        ("file,class_index\n,1\n", "line 2: no file named"),
    ],
)
def test_a_bad_table_is_named(tmp_path, text, message):
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        open_data(tmp_path)


def test_a_tar(tmp_path):
    fill(tmp_path / "x", [SHARK, GOLDFISH])
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(tmp_path / "x", "x")
    data = open_data(tmp_path / "x.tar", classes=IMAGENET)
    assert data.labels.tolist() == [1, 1, 1, 2, 2, 2]
    order = [3, 4, 5, 0, 1, 2]  # colours were given out to SHARK first
    assert all(looks_like(data.open(i), order[i]) for i in (5, 0, 3))
    (tmp_path / "empty.tar").write_bytes(b"no tar at all")
    with pytest.raises(DataError, match="not a tar of pictures"):
        open_data(tmp_path / "empty.tar")


@pytest.mark.parametrize("struct", [False, True])
def test_a_parquet_file(tmp_path, struct):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    raw = [encoded(n) for n in range(5)]
    images = [{"bytes": b, "path": f"p{n}.png"} for n, b in enumerate(raw)] if struct else raw
    table = pa.table({"image": images, "label": [4, 3, 2, 1, 0]})
    parquet.write_table(table, tmp_path / "x.parquet", row_group_size=2)
    data = open_data(tmp_path / "x.parquet")
    assert data.labels.tolist() == [4, 3, 2, 1, 0]
    assert all(looks_like(data.open(n), n) for n in (4, 0, 2))
    assert data.name(3) == ("p3.png" if struct else "x.parquet:3")


def test_a_parquet_file_of_other_columns(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.table({"picture": [b""], "label": [0]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"wanted the columns image \(bytes\) and label"):
        open_data(tmp_path / "x.parquet")
    (tmp_path / "y.parquet").write_bytes(b"text")
    with pytest.raises(DataError, match="wanted the columns"):
        open_data(tmp_path / "y.parquet")


def test_hub_data_from_a_folder(tmp_path):
    pytest.importorskip("datasets")
    fill(tmp_path / "data" / "train", ["ant", "bee"])
    data = open_data(f"hfds/{tmp_path / 'data'}", "train", root=tmp_path / "cache")
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert looks_like(data.open(4), 4)
    with pytest.raises(DataError, match="no split 'nothing'"):
        open_data(f"hfds/{tmp_path / 'data'}", "nothing", root=tmp_path / "cache")


def test_hub_data_out_of_reach(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setattr(sources, "create_reader", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("no route to the hub")))
    with pytest.raises(HubError, match=r"no route to the hub.*connect to the network"):
        open_data("hfds/nobody/nothing", root=tmp_path)


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(DataError, match=r"needs the package datasets.*pip install 'iared2\[data\]'"):
        open_data("hfds/timm/imagenet")


def test_places_without_pictures(tmp_path):
    with pytest.raises(DataError, match="no such folder or file"):
        open_data(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no pictures in it"):
        open_data(tmp_path)
    (tmp_path / "note.txt").write_text("")
    with pytest.raises(DataError, match=r"not a \.tar or \.parquet file"):
        open_data(tmp_path / "note.txt")
    (tmp_path / "a.png").write_bytes(encoded(0))
    with pytest.raises(DataError, match=r"neither class subfolders nor a labels\.csv"):
        open_data(tmp_path)


def test_labels_outside_the_model():
    check_labels(torch.tensor([0, 9]), 10, "data")
    with pytest.raises(DataError, match=r"label 10 \(and 1 more\) is outside the model's 10 classes"):
        check_labels(torch.tensor([0, 10, -1]), 10, "data")
    with pytest.raises(DataError, match=r"label -1 is outside the model's 10 classes, 0 to 9; use data labelled for this model$"):
        check_labels(torch.tensor([0, -1]), 10, "data")
    with pytest.raises(DataError, match=r"label 12 is outside .*, or a model of 13 classes or more$"):
        check_labels(torch.tensor([0, 12]), 10, "data")


@pytest.fixture(scope="module")
def mosaics(tmp_path_factory):
    """Two classes in an order of their own, 500 grey tiles each; one mosaic of 500 validation pictures."""
    folder = tmp_path_factory.mktemp("tiny")
    for split in ("train", "val"):
        (folder / split).mkdir()
    shades = np.arange(500) % 200 + 20

    def write(path, values):
        tiles = np.broadcast_to(values[:, None, None, None], (500, TILE, TILE, 3)).astype(np.uint8)
        rows = tiles.reshape(20, COLUMNS, TILE, TILE, 3).transpose(0, 2, 1, 3, 4).reshape(20 * TILE, COLUMNS * TILE, 3)
        Image.fromarray(rows).save(path, quality=90, speed=10)

    write(folder / "train" / f"{SHARK}.avif", shades)
    write(folder / "train" / f"{GOLDFISH}.avif", shades[::-1])
    write(folder / "val" / "00.avif", shades)
    (folder / "wnids.txt").write_text(f"{SHARK}\n{GOLDFISH}\n")
    lines = [f"val_{i}.JPEG\t{(SHARK, GOLDFISH)[i % 2]}\t0\t1\t62\t63" for i in range(500)]
    (folder / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    return folder, shades


def test_tiny_imagenet_mosaics(mosaics):
    folder, shades = mosaics
    data = open_data(folder, "validation")
    assert isinstance(data, ImageArrays)
    assert tuple(data.pixels.shape) == (500, 64, 64, 3)
    assert np.abs(data.pixels[:, 32, 32, 0].numpy().astype(int) - shades).max() <= 3
    assert data.labels[:4].tolist() == [0, 1, 0, 1]
    train = open_data(folder, "train")
    assert len(train) == 1000
    assert train.labels.tolist() == [0] * 500 + [1] * 500
    assert train.names[501] == f"{GOLDFISH}_1"


def test_tiny_imagenet_under_other_models(mosaics):
    folder, _ = mosaics
    assert open_data(folder, classes=IMAGENET).labels[:4].tolist() == [2, 1, 2, 1]
    assert open_data(folder, classes=[SHARK, GOLDFISH]).labels[:4].tolist() == [0, 1, 0, 1]
    assert open_data(folder, classes=[GOLDFISH, SHARK]).labels[:4].tolist() == [1, 0, 1, 0]
    with pytest.raises(DataError, match="wanted 'train' or 'val'"):
        open_data(folder, "other")


def test_fixed_views_are_crops_of_their_pictures_and_reproducible():
    draw = torch.Generator().manual_seed(0)
    flat = torch.randint(0, 255, (5, 1, 1, 3), generator=draw, dtype=torch.uint8).expand(5, 16, 16, 3).contiguous()
    ramp = torch.arange(16, dtype=torch.uint8).mul(10)[None, None, :, None].expand(5, 16, 16, 3).contiguous()
    many = with_views(ImageArrays(flat, torch.arange(5), list("abcde")), 3, 0.4, seed=1)
    assert many.labels.tolist() == [0, 1, 2, 3, 4] * 4 and list(many.names) == list("abcde") * 4
    assert (many.pixels.int() - flat.repeat(4, 1, 1, 1).int()).abs().max() <= 1  # a crop of one colour is that colour
    crops = with_views(ImageArrays(ramp, torch.arange(5)), 3, 0.4, seed=1).pixels
    assert torch.equal(crops[:5], ramp)  # the pictures themselves come first
    spans = (crops[5:, 8, :, 0].int().amax(1) - crops[5:, 8, :, 0].int().amin(1)).float()
    assert spans.max() <= 150 and 60 < spans.min() < 130 and spans.std() > 5  # parts of the ramp, of different sizes
    assert torch.equal(crops, with_views(ImageArrays(ramp, torch.arange(5)), 3, 0.4, seed=1).pixels)
    assert not torch.equal(crops, with_views(ImageArrays(ramp, torch.arange(5)), 3, 0.4, seed=2).pixels)
