"""`--ray`: the outputs of one machine, shards that are not done twice, and a worker that dies without loss."""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import iared2  # first: see iared2/_compat.py

# isort: split
import numpy as np
import pytest
import timm
import torch
from PIL import Image

from iared2 import cli
from iared2.data.cluster import Cluster
from iared2.model import reduce
from iared2.report import sharded
from iared2.saving import save_reduced

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A cluster of two CPUs on this machine, whose workers find the library where this process did."""
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    paths = os.pathsep.join([str(HERE), str(Path(iared2.__file__).parents[1])])
    settings = {"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=settings, object_store_memory=100_000_000)
    yield
    ray.shutdown()


def build(folder: Path) -> Callable[[int], int]:
    """Work that notes each shard, and kills its process at the second shard when it first comes by."""
    return partial(_square, folder)


def _square(folder: Path, number: int) -> int:
    with (folder / "begun.txt").open("a") as stream:
        stream.write(f"{number} ")
    if number == 1 and not (folder / "died").exists():
        (folder / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def test_a_killed_worker_loses_nothing_and_finished_shards_are_not_done_again(cluster, tmp_path: Path) -> None:
    def begun() -> list[int]:
        return [int(word) for word in (tmp_path / "begun.txt").read_text().split()]

    here = Cluster(workers=1)
    assert here.run(build, (tmp_path,), 4, tmp_path / "records") == [0, 1, 4, 9]
    assert (tmp_path / "died").exists()
    assert begun().count(1) >= 2  # once in vain
    before = begun()
    (tmp_path / "records" / "shard-000002.pt").unlink()
    assert here.run(build, (tmp_path,), 4, tmp_path / "records") == [0, 1, 4, 9]
    assert begun() == [*before, 2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    save_reduced(reduce(timm.create_model("test_vit", img_size=32, patch_size=8, num_classes=2), 2), folder, with_backbone=True)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten pictures of two classes, and a broken one."""
    folder, draw = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for label in ("ants", "bees"):
        (folder / label).mkdir()
        for number in range(5):
            Image.fromarray(draw.integers(0, 255, (40, 36, 3), dtype=np.uint8)).save(folder / label / f"{label}{number}.png")
    (folder / "ants" / "broken.png").write_bytes(b"no picture")
    return folder


def command(*words: object) -> int:
    return cli.main([*map(str, words), "--device", "cpu", "--workers", "0", "--debug"])


def test_explain_and_eval_give_what_one_machine_gives(cluster, model: Path, photos: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sharded, "SHARD", 2)  # three shards of photos; workers are told their pictures, not this number
    for ray in ([], ["--ray"]):
        out = tmp_path / ("ray" if ray else "alone")
        assert command("explain", "-p", photos, "-o", out, "-m", model, "--batch-size", 2, *ray) == 1  # one is broken
        assert command("eval", "-d", photos, "-m", model, "--json", out / "eval.json", "--batch-size", 1, *ray) == 1
    alone, shared = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("alone", "ray"))
    assert len(shared["photos"]) == 10
    for one, other in zip(alone["photos"], shared["photos"], strict=True):
        for key in ("file", "name", "keep_ratio", "macs", "hierarchy"):
            assert one[key] == other[key]
        for group in one["groups"]:
            assert np.allclose(*(np.load(tmp_path / name / group["scores"]) for name in ("alone", "ray")), atol=1e-5)
    assert alone["failed"] == shared["failed"] and len(shared["failed"]) == 1
    assert (tmp_path / "ray" / "index.html").is_file()
    first, second = (json.loads((tmp_path / name / "eval.json").read_text()) for name in ("alone", "ray"))
    assert first["images"] == second["images"] == 10
    assert first["comparison"] == second["comparison"] and first["skipped"] == second["skipped"]
    for name in ("top1", "agreement", "macs", "keep_ratio"):
        assert first["rows"][1][name] == second["rows"][1][name]
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("shard-*.pt")}
    assert len(kept) == 3 + 2
    assert command("explain", "-p", photos, "-o", tmp_path / "ray", "-m", model, "--batch-size", 2, "--ray") == 1
    assert kept == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("shard-*.pt")}
    again = iared2.load_reduced(model)  # the same weights in the same place, answering otherwise
    again.configure(second_look=1)
    again.save_pretrained(model)
    assert command("explain", "-p", photos, "-o", tmp_path / "ray", "-m", model, "--batch-size", 2, "--ray") == 1
    anew = json.loads((tmp_path / "ray" / "manifest.json").read_text())
    assert anew["model"]["second_look"] == 1 and all(photo["looked_again"] for photo in anew["photos"])
    assert all(now["macs"] > before["macs"] for now, before in zip(anew["photos"], shared["photos"], strict=True))


@pytest.mark.parametrize("missing", ["ray", "ray.data"])
def test_without_ray_one_line_names_the_extra(model: Path, photos: Path, tmp_path: Path, monkeypatch, capfd, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    assert cli.main(["explain", "-p", str(photos), "-o", str(tmp_path), "-m", str(model), "--device", "cpu", "--ray"]) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("iared2: ")]
    assert len(lines) == 1 and "pip install 'iared2[ray]'" in lines[0]
