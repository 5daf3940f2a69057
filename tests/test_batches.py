"""Batches: the same whatever the workers, exact after a resume, whole over ranks, and on past broken pictures."""

import io
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from iared2.data import streams
from iared2.data.arrays import ArrayBatches, Preprocess
from iared2.data.batches import FileBatches, make_batches, to_arrays
from iared2.data.images import LabelledImages
from iared2.data.sources import open_data
from iared2.data.streams import StreamBatches, StreamedImages
from iared2.data.views import make_transform
from iared2.errors import DataError

HOW = Preprocess((16, 16), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), min_scale=0.3, crop_pct=0.9)


def noise(index: int, size=(24, 20)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(index).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def encoded(index: int, kind="PNG") -> bytes:
    stream = io.BytesIO()
    noise(index).save(stream, kind)
    return stream.getvalue()


def in_memory(count: int) -> LabelledImages:
    return LabelledImages(noise, torch.arange(count), [f"{i}.png" for i in range(count)])


def same(a, b) -> bool:
    return len(a) == len(b) and all(x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in zip(a, b, strict=True))


@pytest.fixture
def folder(tmp_path):
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        for number in range(5):
            (tmp_path / name / f"{number}.png").write_bytes(encoded(number + 5 * (name == "bee")))
    return tmp_path


@pytest.mark.parametrize("train", [True, False])
def test_workers_change_nothing(folder, train):
    alone, helped = (list(FileBatches(open_data(folder), HOW, 3, 5, train, workers).epoch(1)) for workers in (0, 2))
    assert len(alone) == (3 if train else 4)
    assert same(alone, helped)


@pytest.mark.parametrize("train", [True, False])
def test_a_resumed_epoch_is_the_tail(folder, train):
    batches = FileBatches(open_data(folder), HOW, 3, 5, train)
    whole = list(batches.epoch(2))
    assert same(whole, list(batches.epoch(2)))
    assert same(whole[2:], list(batches.epoch(2, start=2)))


def test_epochs_seeds_and_evaluation_differ(folder):
    data = open_data(folder)
    first, second = (next(FileBatches(data, HOW, 4, 0).epoch(epoch)) for epoch in (0, 1))
    other = next(FileBatches(data, HOW, 4, 1).epoch(0))
    assert not torch.equal(first["indices"], second["indices"]) or not torch.equal(first["images"], second["images"])
    assert not torch.equal(first["indices"], other["indices"]) or not torch.equal(first["images"], other["images"])
    plain = next(FileBatches(data, HOW, 4, train=False).epoch(0))
    transform = make_transform(HOW, train=False)
    assert torch.equal(plain["images"], torch.stack([transform(data.open(i)) for i in range(4)]))
    assert plain["labels"].tolist() == [0, 0, 0, 0]


def test_training_crops_and_flips_only():
    kinds = [type(step).__name__ for step in make_transform(HOW, train=True).transforms]
    assert kinds == ["RandomResizedCropAndInterpolation", "RandomHorizontalFlip", "MaybeToTensor", "Normalize"]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 14), st.integers(1, 4), st.integers(1, 3), st.booleans())
def test_ranks_share_an_epoch(count, batch_size, world, train):
    batches = FileBatches(in_memory(count), HOW, batch_size, 3, train)
    ranks = [[b["indices"].tolist() for b in batches.epoch(0, 0, rank, world)] for rank in range(world)]
    seen = [index for rank in ranks for batch in rank for index in batch]
    assert len(seen) == len(set(seen))
    if train:
        assert len(seen) == min(count, batches.steps(world) * batch_size * world)
        assert all(len(rank) <= batches.steps(world) for rank in ranks)
    else:
        assert sorted(seen) == list(range(count))
        assert len(ranks[0]) == batches.steps(world)


@pytest.mark.untyped  # the run-time checks draw random numbers of their own
def test_the_callers_random_numbers_are_left_alone(folder):
    def draws():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    def seed():
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)

    seed()
    expected = draws()
    seed()
    list(FileBatches(open_data(folder), HOW, 3).epoch(0))
    assert draws() == expected


@pytest.fixture
def damaged(folder):
    (folder / "ant" / "0.png").write_text("text, not a picture")
    (folder / "ant" / "1.png").write_bytes(b"")
    (folder / "bee" / "3.png").write_bytes(encoded(3, "JPEG")[:200])
    (folder / "bee" / "4.png").write_bytes(encoded(4)[:-400])
    return folder


BROKEN = {"ant/0.png", "ant/1.png", "bee/3.png", "bee/4.png"}


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_pictures_are_skipped_and_named(damaged, workers, caplog):
    data = open_data(damaged)
    batches = FileBatches(data, HOW, 2, train=False, workers=workers)
    found = list(batches.epoch(0))
    assert [b["indices"].tolist() for b in found] == [[2, 3], [4, 5], [6, 7]]  # two batches had nothing readable
    assert set(batches.skipped) == BROKEN
    assert "skipped ant/0.png: not a picture that Pillow can read" in caplog.text
    list(batches.epoch(0))
    assert caplog.text.count("ant/0.png") == 1
    assert set(data.subset(3, 0).skipped) == BROKEN


def test_training_takes_as_many_steps_as_announced(damaged):
    batches = FileBatches(open_data(damaged), HOW, 1, 0)
    whole = list(batches.epoch(0))
    assert len(whole) == batches.steps() == 10
    assert same(whole[4:], list(batches.epoch(0, start=4)))
    assert {int(i) for b in whole for i in b["indices"]} == {2, 3, 4, 5, 6, 7}


def test_nothing_readable_ends_training(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.png").write_text("no")
    data = open_data(tmp_path)
    assert list(FileBatches(data, HOW, 1, train=False).epoch(0)) == []
    with pytest.raises(DataError, match=r"none of the 1 pictures.*a/0\.png"):
        list(FileBatches(data, HOW, 1).epoch(0))
    with pytest.raises(DataError, match="none of the 1 pictures"):
        to_arrays(data, (8, 8))


@pytest.mark.parametrize("workers", [0, 2])
def test_decoded_once_into_memory(damaged, workers):
    data = open_data(damaged)
    arrays = to_arrays(data, (20, 24), workers=workers)
    assert len(arrays) == 6
    assert set(data.skipped) == BROKEN
    assert arrays.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert arrays.names[0] == "ant/2.png"
    assert np.array_equal(arrays.pixels[0].numpy(), np.asarray(noise(2)))  # the pictures' own size
    assert tuple(to_arrays(data, (8, 8), crop=False).pixels.shape) == (6, 8, 8, 3)
    middle = to_arrays(in_memory(1), (20, 20)).pixels[0].numpy()
    assert np.array_equal(middle, np.asarray(noise(0))[:, 2:22])
    assert isinstance(make_batches(arrays, HOW, 2), ArrayBatches)


@pytest.fixture
def shards(tmp_path):
    pytest.importorskip("webdataset")
    for shard in range(2):
        with tarfile.open(tmp_path / f"x-{shard:04d}.tar", "w") as archive:
            for number in range(6):
                key = shard * 6 + number
                content = {"png": b"broken" if key == 4 else encoded(key), "cls": str(key % 3).encode()}
                for extension, raw in content.items():
                    entry = tarfile.TarInfo(f"k{key:03d}.{extension}")
                    entry.size = len(raw)
                    archive.addfile(entry, io.BytesIO(raw))
    return tmp_path


@pytest.mark.parametrize("name", ["", "x-{0000..0001}.tar"])
def test_webdataset_shards(shards, name):
    data = open_data(f"wds/{shards / name}")
    assert isinstance(data, StreamedImages)
    assert len(data) == 12
    for _ in range(2):
        found = list(data)
        assert [(key, label) for key, _, label in found] == [(f"k{i:03d}", i % 3) for i in range(12) if i != 4]
        assert np.array_equal(np.asarray(found[0][1]), np.asarray(noise(0)))
    assert list(data.skipped) == ["k004"]
    assert [key for key, _, _ in data.subset(2)] == ["k000", "k001"]


@pytest.mark.parametrize("train", [True, False])
def test_streamed_batches(shards, train):
    batches = make_batches(open_data(f"wds/{shards}"), HOW, 2, 1, train)
    assert isinstance(batches, StreamBatches)
    whole = list(batches.epoch(1))
    assert len(whole) == batches.steps() == 6
    assert same(whole, list(batches.epoch(1)))
    assert same(whole[2:], list(batches.epoch(1, start=2)))
    ranks = [list(batches.epoch(1, 0, rank, 2)) for rank in range(2)]
    together = torch.cat([torch.cat([b["labels"] for b in rank]) for rank in ranks])
    assert len(together) == (12 if train else 11)
    assert set(batches.skipped) == {"k004"}


def write_shards(folder: Path, sizes: list[int]) -> None:
    """Shards of the given sizes; sample i is of class i."""
    for shard, size in enumerate(sizes):
        with tarfile.open(folder / f"y-{shard:04d}.tar", "w") as archive:
            for key in range(sum(sizes[:shard]), sum(sizes[:shard]) + size):
                for extension, raw in {"png": encoded(key), "cls": str(key).encode()}.items():
                    entry = tarfile.TarInfo(f"k{key:03d}.{extension}")
                    entry.size = len(raw)
                    archive.addfile(entry, io.BytesIO(raw))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("sizes", [[13], [4, 5], [3, 3, 7], [1, 1, 9, 2, 4], [2, 0, 5, 1, 1, 1, 2]], ids=len)
def test_ranks_share_out_every_sample_once(tmp_path, monkeypatch, sizes, world, train):
    """In a process group, which timm's readers heed by themselves, and for shards that do not divide evenly."""
    pytest.importorskip("webdataset")
    write_shards(tmp_path, sizes)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: world)
    opened, begin = [], streams.create_reader
    monkeypatch.setattr(streams, "create_reader", lambda *args, **kwargs: opened.append(kwargs["split"]) or begin(*args, **kwargs))
    shares, seen = [], {0: [], 1: []}
    for rank in range(world):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda *_, rank=rank: rank)
        batches = make_batches(open_data(f"wds/{tmp_path}"), HOW, 1, 1, train)
        assert batches.steps(world) == (sum(sizes) // world if train else -(-sum(sizes) // world))
        shares.append([key for _, (key, _, _) in batches.images.share(rank, world)])
        for epoch, labels in seen.items():
            found = list(batches.epoch(epoch, 0, rank, world))
            labels += [int(batch["labels"]) for batch in found]
            assert [int(batch["indices"]) for batch in found] == [int(batch["labels"]) for batch in found]
    assert sorted(key for share in shares for key in share) == [f"k{i:03d}" for i in range(sum(sizes))]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    for labels in seen.values():  # training leaves out what does not fill a step of every rank
        assert len(set(labels)) == len(labels) == (sum(sizes) // world * world if train else sum(sizes))
    if world == 3 and len(sizes) == 5:
        assert all(split.count("::") < 4 for split in opened), "a rank opens its own shards only"
    if train and sum(sizes) > 2:
        assert seen[0] != seen[1]


def test_shards_that_are_not_there(tmp_path):
    pytest.importorskip("webdataset")
    with pytest.raises(DataError, match=r"no \.tar shards"):
        open_data(f"wds/{tmp_path}")
    with pytest.raises(DataError, match=r"no shard .*x-1\.tar"):
        open_data(f"wds/{tmp_path}/x-{{1..2}}.tar")
