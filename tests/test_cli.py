"""The command line: what it prints, where, and the exit code; one line for every kind of trouble."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import iared2  # first: makes timm importable beside a CPU-only torch

# isort: split
import numpy as np
import pytest
import timm
import torch
from PIL import Image

from iared2 import assets, cli
from iared2.saving import save_reduced

ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
NOBODY = 65534


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("cli") / "small"
    save_reduced(iared2.reduce(timm.create_model("iared2_mini_patch8_64", num_classes=10), 3), folder, with_backbone=True)
    return folder


@pytest.fixture
def photo(tmp_path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)).save(path)
    return path


@pytest.fixture
def run(capfd, model):
    """Runs a command; gives its exit code, output and error lines."""

    def run(*arguments: object, with_model: bool = True) -> tuple[int, str, list[str]]:
        tokens = [str(argument) for argument in arguments]
        if with_model and tokens[0] == "explain" and "--model" not in tokens:
            tokens += ["--model", str(model)]
        code = cli.main(tokens)
        captured = capfd.readouterr()
        return code, captured.out, captured.err.splitlines()

    return run


def check_one_line(result, *words: str, code: int = 2) -> None:
    got, _, errors = result
    assert got == code
    assert len(errors) == 1, errors
    assert errors[0].startswith("iared2: ")
    assert "Traceback" not in errors[0]
    for word in words:
        assert word in errors[0]


# ---- it works --------------------------------------------------------------------------------------------------


def test_explain_one_photo(run, photo, tmp_path):
    code, out, errors = run("explain", "-p", photo, "-o", tmp_path / "out", "--seed", 1)
    assert (code, errors) == (0, [])
    assert "kept per group" in out
    assert "index.html" in out
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["settings"]["seed"] == 1
    assert len(manifest["photos"][0]["predictions"]) == 5


def test_explainers_are_listed_and_unknown_ones_answered(run, photo, tmp_path):
    code, out, _ = run("explain", "--list-methods")
    assert code == 0 and "transformer_attribution" in out and "[:BLOCK" in out
    check_one_line(run("explain", "-p", photo, "-o", tmp_path / "out", "--method", "ours,chefr"), "did you mean 'chefer'")
    check_one_line(run("explain", "-p", photo), "--output")


def test_explain_takes_several_photos_folders_and_patterns(run, photo, tmp_path):
    (tmp_path / "more").mkdir()
    shutil.copy(photo, tmp_path / "more/photo.png")
    shutil.copy(photo, tmp_path / "more/other.PNG")
    code, _, _ = run("explain", "-p", photo, tmp_path / "more", "-p", tmp_path / "*.png", "-o", tmp_path / "out")
    assert code == 0
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert len({entry["name"].casefold() for entry in manifest["photos"]}) == 3


def test_threshold_and_on_drop_reach_the_model(run, photo, tmp_path):
    run("explain", "-p", photo, "-o", tmp_path / "all", "--threshold=-1")
    run("explain", "-p", photo, "-o", tmp_path / "some", "--threshold", "0.9", "--on-drop", "merge")
    kept, some = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("all", "some"))
    assert kept["photos"][0]["keep_ratio"] == [1, 1, 1]
    assert some["model"]["on_drop"] == "merge"
    assert some["model"]["thresholds"] == [0.9] * 3
    assert some["photos"][0]["keep_ratio"][0] < 1


def test_an_animation_says_which_frame_on_the_screen(run, tmp_path):
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "green", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    _, out, _ = run("explain", "-p", tmp_path / "a.gif", "-o", tmp_path / "out")
    assert "first of" in out
    assert "first of" in json.loads((tmp_path / "out/manifest.json").read_text())["photos"][0]["notes"][0]


def test_bad_files_are_listed_at_the_end_and_the_code_says_so(run, photo, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    code, out, errors = run("explain", "-p", tmp_path, "-o", tmp_path / "out")
    assert code == 1
    assert "index.html" in out
    assert errors[0] == "iared2: 1 could not be used:"
    assert "text.png" in errors[1]


def test_version_help_and_models(run, capfd):
    assert run("--version", with_model=False)[1].strip() == iared2.__version__
    code, out, _ = run("--help", with_model=False)
    assert code == 0
    assert all(command in out for command in ("explain", "eval", "train", "models"))
    _, out, _ = run("explain", "--help", with_model=False)
    assert all(option in out for option in ("-p", "-o", "--model", "--weights", "--threshold", "--on-drop"))
    for command in ("explain", "eval", "train", "models"):
        out = run(command, "--help", with_model=False)[1]
        assert all(option in out for option in ("--device", "--dtype", "--batch-size", "--workers", "--seed"))


def test_models_lists_what_is_embedded(run, model, tmp_path, monkeypatch):
    shutil.copytree(model, tmp_path / "tiny")
    config = json.loads((tmp_path / "tiny/config.json").read_text())
    config["metrics"] = {"top1": 41.5, "macs": 1.7e8, "dense_macs": 2.7e8}
    (tmp_path / "tiny/config.json").write_text(json.dumps(config))
    monkeypatch.setattr(assets, "HERE", tmp_path)
    code, out, _ = run("models", with_model=False)
    assert code == 0
    assert re.search(r"tiny\s+\d+\.\d MB\s+10\s+41\.5 %\s+0\.17 G \(63 %\)\s+included", out)
    assert "--weights" in out


def test_train_without_a_recipe_lists_them(run):
    from iared2.train.recipes import RECIPES

    code, out, _ = run("train", with_model=False)
    assert code == 0
    assert all(name in out for name in RECIPES)


def test_train_passes_overrides_on(run, monkeypatch, tmp_path):
    import iared2.train.run

    seen = {}

    def run_recipe(recipe, overrides, **rest):
        seen.update(rest, recipe=recipe, overrides=overrides)
        return 0

    monkeypatch.setattr(iared2.train.run, "run_recipe", run_recipe)
    tokens = ["train", "mini", "--data.batch_size=64", "reward.error_penalty=1", "-o", tmp_path, "--data", tmp_path, "--batch-size", 8]
    assert run(*tokens, with_model=False)[0] == 0
    assert seen["overrides"] == ["--data.batch_size=64", "reward.error_penalty=1", "data.batch_size=8"]
    assert (seen["recipe"], seen["output"], seen["data"], seen["seed"]) == ("mini", tmp_path, tmp_path, None)


def test_eval_passes_its_options_on(run, monkeypatch, tmp_path):
    import iared2.evaluate.classify

    seen = {}

    def run_eval(model, data, **rest):
        seen.update(rest, model=model, data=data)
        return 1

    monkeypatch.setattr(iared2.evaluate.classify, "run_eval", run_eval)
    code, _, _ = run("eval", "--data", tmp_path, "--json", tmp_path / "r.json", "--limit", 5, "--threshold", "-1", with_model=False)
    assert code == 1
    assert (seen["model"], seen["limit"], seen["threshold"], seen["json_file"]) == (assets.DEFAULT, 5, -1.0, tmp_path / "r.json")


# ---- it fails, in one line -------------------------------------------------------------------------------------


def test_missing_and_empty_sources(run, tmp_path):
    check_one_line(run("explain", "-p", tmp_path / "none.jpg", "-o", tmp_path / "out"), "none.jpg", "no such file")
    (tmp_path / "empty").mkdir()
    check_one_line(run("explain", "-p", tmp_path / "empty", "-o", tmp_path / "out"), "no pictures")
    check_one_line(run("explain", "-p", tmp_path / "*.jpg", "-o", tmp_path / "out"), "no file matches")
    assert not (tmp_path / "out").exists()


def test_one_bad_photo_is_one_line(run, tmp_path):
    (tmp_path / "text.jpg").write_text("hello")
    check_one_line(run("explain", "-p", tmp_path / "text.jpg", "-o", tmp_path / "out"), "not a picture")
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    check_one_line(run("explain", "-p", tmp_path / "dot.png", "-o", tmp_path / "out"), "too small")


def test_an_output_folder_that_is_a_file(run, photo):
    check_one_line(run("explain", "-p", photo, "-o", photo), "must be a folder")
    check_one_line(run("explain", "-p", photo, "-o", photo / "below"), "cannot be written to")


def test_weights_that_are_damaged_or_of_another_shape(run, photo, model, tmp_path):
    where = ("explain", "-p", photo, "-o", tmp_path / "out")
    check_one_line(run(*where, "--weights", tmp_path / "none.safetensors"), "no such weights file")
    (tmp_path / "damaged.safetensors").write_bytes(b"\xff" * 300)
    check_one_line(run(*where, "--weights", tmp_path / "damaged.safetensors"), "not a readable safetensors file")
    whole = (model / "backbone.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    check_one_line(run(*where, "--weights", tmp_path / "cut.safetensors"), "cut.safetensors")
    other = iared2.reduce(timm.create_model("iared2_mini_patch8_64", num_classes=7), 3)
    save_reduced(other, tmp_path / "other", with_backbone=True)
    check_one_line(run(*where, "--weights", tmp_path / "other/backbone.safetensors"), "shape", "(7")
    check_one_line(run(*where, "--weights", model / "reducers.safetensors"), "another model")


def test_models_that_cannot_be_had(run, photo, tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise socket.gaierror("no network")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    where = ("explain", "-p", photo, "-o", tmp_path / "out", "--model")
    check_one_line(run(*where, "no_such_model"), "no_such_model", "Check the name")
    check_one_line(run(*where, "someone/model"), "not to be had from the hub", "connect to the network")
    check_one_line(run(*where, tmp_path), "no config.json")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--batch-size", "0"], ["--batch-size"]),
        (["--workers=-1"], ["--workers"]),
        (["--device", "teapot"], ["device", "teapot"]),
        (["--dtype", "int8"], ["--dtype", "float32"]),
        (["--threshold", "nan"], ["--threshold"]),
        (["--threshhold", "1"], ["Did you mean", "--threshold"]),
        (["--on-drop", "keep"], ["--on-drop", "merge"]),
    ],
)
def test_wrong_options(run, photo, tmp_path, options, words):
    check_one_line(run("explain", "-p", photo, "-o", tmp_path / "out", *options), *words)


def test_unknown_commands_and_missing_options(run, photo):
    check_one_line(run("explian", with_model=False), "explain")
    check_one_line(run("explain", "-p", photo), "--output")


def test_an_interruption_is_one_line(run, photo, tmp_path, monkeypatch):
    from iared2.report.gallery import Gallery

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Gallery, "run", interrupt)
    check_one_line(run("explain", "-p", photo, "-o", tmp_path / "out"), "interrupted", code=130)


def test_a_defect_is_one_line_unless_debugging(run, photo, tmp_path, monkeypatch):
    from iared2.report.gallery import Gallery

    def defect(*_):
        raise ZeroDivisionError("oh\nno")

    monkeypatch.setattr(Gallery, "run", defect)
    check_one_line(run("explain", "-p", photo, "-o", tmp_path / "out"), "ZeroDivisionError", "--debug", code=70)
    with pytest.raises(ZeroDivisionError):
        run("explain", "-p", photo, "-o", tmp_path / "out", "--debug")


# ---- another user, a full disk: real processes -----------------------------------------------------------------

SCRIPT = "import sys; from iared2.cli import main; sys.exit(main(sys.argv[1:]))"


def process(*arguments: object, before: str = "", **options) -> subprocess.CompletedProcess:
    environment = os.environ | {"HOME": tempfile.gettempdir(), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", before + SCRIPT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False, **options)


@pytest.fixture
def shared(model, photo):
    """A folder that every user may enter and write to, with a model and a photo in it."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    shutil.copytree(model, folder / "small")
    (folder / "small").chmod(0o755)
    for path in (folder / "small").iterdir():
        path.chmod(0o644)  # safetensors writes for its owner alone
    shutil.copy(photo, folder / "photo.png")
    yield folder
    shutil.rmtree(folder)


def test_a_photo_that_may_not_be_read(shared, run, tmp_path):
    secret = shared / "secret.png"
    shutil.copy(shared / "photo.png", secret)
    secret.chmod(0)
    if not ROOT:
        check_one_line(run("explain", "-p", secret, "-o", tmp_path / "out"), "secret.png: no permission")
        return
    # Root may read all. A first run as root imports everything (another user may not reach this Python), and so does the line
    # about TypeAdapter, for which cyclopts asks as soon as pydantic is there. Then root's rights go.
    first = ["explain", "-p", str(shared / "photo.png"), "-o", str(shared / "first"), "--model", str(shared / "small")]
    imports = f"import os, pydantic; pydantic.TypeAdapter; from iared2.cli import main; main({first!r}); "
    drop = imports + f"os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY}); "
    result = process("explain", "-p", secret, "-o", shared / "out", "--model", shared / "small", before=drop)
    assert result.returncode == 2
    assert result.stderr.splitlines() == [f"iared2: {secret}: no permission to read it"]


def test_a_limit_on_file_size_ends_in_one_line_and_keeps_what_was_done(shared):
    noise = np.random.default_rng(0).integers(0, 255, (900, 900, 3), np.uint8)
    Image.fromarray(noise).save(shared / "z_large.png")
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (900_000, 900_000)); "
    result = process("explain", "-p", shared, "-o", shared / "out", "--model", shared / "small", before=limit)
    errors = result.stderr.splitlines()
    assert result.returncode == 1
    assert len(errors) == 1, errors
    assert "cannot be written" in errors[0]
    assert "1 of 2 photos were finished" in errors[0]
    assert (shared / "out/photo/hierarchy.png").is_file()
    assert not (shared / "out/z_large").exists()
    assert not list((shared / "out").rglob("*.partial"))


def test_a_full_disk_is_one_line(run, photo, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if not ROOT or not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small disk can only be mounted by root")
    try:
        check_one_line(run("explain", "-p", photo, "-o", disk / "out"), "cannot be written", "space")
        assert not list(disk.rglob("*.partial"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)
