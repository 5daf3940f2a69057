"""`iared2 reproduce`: tables are made once, resumed, and say what they need. The figures themselves are in docs/results."""

import json
import math
import re
from pathlib import Path

import pytest

from iared2.cli import main
from iared2.errors import IARED2Error
from iared2.reproduce import bench as bench_module
from iared2.reproduce import runs, variance
from iared2.reproduce.bench import RATIOS, Bench
from iared2.reproduce.command import run_reproduction
from iared2.reproduce.intervals import half_width, paired, student
from iared2.reproduce.runs import Configuration, figures
from iared2.reproduce.tables import DENSE, NAMES, OURS, TABLES
from reproduce_run import pictures

TINY = Path("tiny")


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """The small scale on eight pictures of noise, interpreters only."""
    for name, value in {"reduction.block_epochs": 0, "reduction.warm_start_epochs": 0, "data.batch_size": 8}.items():
        monkeypatch.setitem(bench_module._SMALL, name, value)
    monkeypatch.setattr(Bench, "check", lambda _: None)
    bench = Bench(TINY, tmp_path, images=8, val_images=6)
    bench.__dict__["pictures"] = (pictures(8, boxes=False), pictures(6, boxes=True))
    return bench


def test_intervals_by_hand() -> None:
    assert half_width([1.0]) is None
    assert half_width([78.4, 78.3, 78.5, 78.3]) == pytest.approx(3.182 * 0.0957427 / 2, rel=1e-4)  # the paper's random baseline
    # Any table of Student's t; 9 degrees of freedom are the last that is looked up here.
    assert [round(student(degrees), 3) for degrees in (2, 9, 10, 12, 30, 120)] == [4.303, 2.262, 2.228, 2.179, 2.042, 1.98]
    mean, half = paired(["1100", "1000"], ["0101"])
    assert mean == pytest.approx(100 * (1 + -0.5 + 0 - 1) / 4)
    assert half == pytest.approx(1.96 * 100 * math.sqrt(sum((x + 0.125) ** 2 for x in (1, -0.5, 0, -1)) / 3) / 2)


def test_other_weights_to_start_from_are_other_runs(tmp_path: Path) -> None:
    """The embedded model's backbone, one that was embedded before, or the same file with other weights in it."""
    file, embedded = tmp_path / "before.safetensors", Bench(TINY, tmp_path)
    hashes = [embedded.start_hash]
    for content in (b"one", b"two"):
        file.write_bytes(content)
        before = Bench(TINY, tmp_path, weights=file)
        assert before.recipe({}, 0).backbone.weights == str(file) != embedded.recipe({}, 0).backbone.weights
        hashes.append(before.start_hash)
    assert len(set(hashes)) == 3


@pytest.mark.parametrize(("scale", "message"), [("small", "no such weights file"), ("paper", "the paper's scale starts from the hub's")])
def test_weights_that_cannot_be_started_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: str, message: str) -> None:
    monkeypatch.setattr(bench_module, "is_tiny_imagenet", lambda _: True)
    with pytest.raises(IARED2Error, match=message):
        Bench(TINY, tmp_path, scale=scale, weights=tmp_path / "gone").check()


def test_the_papers_choice_is_one_run_for_all_tables(tmp_path: Path) -> None:
    bench = Bench(TINY, tmp_path)
    ours = bench.recipe({}, 0)
    shared = {
        "groups": ["3 groups"],
        "gumbel": ["REINFORCE"],
        "table6": ["ours at the same budget"],
        "table7": ["threshold 0.48"],
    }
    for name, wanted in shared.items():
        found = [line.what.name for line in TABLES[name]().lines if bench.recipe(line.what.changes, 0) == ours]
        assert set(wanted) <= set(found), name
    rewards = [bench.recipe(line.what.changes, 0, start=line.what.start).reduction for line in TABLES["table8"]().lines]
    assert len({one.reward.model_dump_json() for one in rewards}) == 6
    assert {(one.warm_start_epochs, one.interpreter.start) for one in rewards} == {(0, "small")}
    assert (ours.reduction.warm_start_epochs, ours.reduction.interpreter.start) == (0.25, "attention")
    reduction = ours.reduction
    assert (reduction.reward.target, reduction.reward.soft, reduction.on_drop, reduction.reward.error_penalty) == (
        "label",
        False,
        "discard",
        1.5,
    )
    for line, count in zip(TABLES["groups"]().lines, (2, 3, 4), strict=True):
        chosen = bench.recipe(line.what.changes, 0).reduction
        assert chosen.groups == count and chosen.warm_start_ratios == RATIOS[count]
        assert sum(RATIOS[count]) / count == pytest.approx(0.68, abs=0.01)


def test_a_table_is_written_and_never_trained_twice(small: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    assert run_reproduction("gumbel", small) == 0
    record = json.loads((small.output / "gumbel.json").read_text())
    assert [row["name"] for row in record["rows"]] == ["REINFORCE", "Gumbel"]
    assert all(0 < row["macs_share"] <= 1.01 and len(row["correct"]) == 6 for row in record["rows"])
    assert all(0 < row["train_seconds"] < row["seconds"] for row in record["rows"]) and record["dense"]["train_seconds"] is None
    assert runs.figures(small, TABLES["gumbel"]().lines[0].what.at(0.4), 0)["train_seconds"] is None  # the model is there
    assert record["dense"]["uniform_inside"] == pytest.approx(50) and record["dense"]["macs_share"] == pytest.approx(1, abs=0.01)
    text = (small.output / "gumbel.md").read_text()
    assert "79.1 % at 2.9 G" in text and "--images 8 --val-images 6" in text
    assert (small.output / "gumbel.png").stat().st_size < 150_000

    def never(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(runs, "train", never)
    monkeypatch.setattr(runs, "measure", never)
    assert run_reproduction("gumbel", small) == 0
    assert json.loads((small.output / "gumbel.json").read_text())["rows"] == record["rows"]
    with pytest.raises(AssertionError, match="trained again"):
        figures(small, Configuration("other", {"reduction.reward.error_penalty": 0.7}), 0)


def test_one_model_at_many_thresholds(small: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [figures(small, OURS.at(value), 0) for value in (-1.0, 0.5, 2.0)]
    shares = [row["macs_share"] for row in found]
    assert shares[0] > 0.99 and shares == sorted(shares, reverse=True) and shares[2] < 0.3
    assert found[0]["correct"] == figures(small, DENSE, 0)["correct"]
    assert len(list((small.output / "runs").glob("curriculum-*"))) == 1


def test_the_random_baseline_drops_thirty_percent_and_is_tuned_as_long(small: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench_module._SMALL, "reduction.block_epochs", 1)
    epochs = []
    monkeypatch.setattr(runs.Trainer, "fit", lambda _, stages: epochs.append(stages[0].epochs))
    row = figures(small, TABLES["table6"]().lines[0].what, 0)
    assert epochs == [3]
    assert row["keep_ratio"] == [pytest.approx(math.ceil(0.7 * 144) / 144, abs=1e-4)]


def test_variance_counts_passes_and_starts_every_estimator_alike(small: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variance, "DRAWS", 2)
    monkeypatch.setattr(variance, "PASSES", 8)
    monkeypatch.setattr(variance, "PICTURES", 4)
    monkeypatch.setattr(variance, "BATCH", {"data.batch_size": 4})
    monkeypatch.setitem(bench_module._SMALL, "reduction.reward.target", "dense")  # no label of noise is ever right
    assert run_reproduction("variance", small) == 0
    rows = json.loads((small.output / "variance.json").read_text())["rows"]
    assert [row["passes"] for row in rows] == [2, 2, 4, 8] * 2 + [2, 8] * 2
    assert len({row["reward_before"] for row in rows}) == 1
    assert all(row["variance"] > 0 and len(row["curve"]) == 8 // row["passes"] for row in rows)
    assert (small.output / "variance.png").stat().st_size < 150_000
    monkeypatch.setattr(variance, "PASSES", 16)  # another study: what was found before is none of it
    assert run_reproduction("variance", small) == 0
    again = json.loads((small.output / "variance.json").read_text())["rows"]
    assert all(len(row["curve"]) == 16 // row["passes"] for row in again)


@pytest.mark.parametrize("name", ["variance", "table5"])
def test_what_one_process_does_is_refused_to_several(name: str, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(Bench, "check", lambda _: None)
    assert main(["reproduce", name, "--data", str(tmp_path), "-o", str(tmp_path / "out")]) == 2
    assert f"reproduce {name}: got 2 processes, wanted one" in " ".join(capsys.readouterr().err.split())


def test_thresholds_that_end_far_from_a_budget_do_not_meet_it(small: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = TABLES["gumbel"]().lines[0].what
    monkeypatch.setattr(runs, "FAR", -1.0)  # then nothing is near enough
    assert not figures(small, asked, 0)["budget_met"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table6", "--scale", "paper"], r"expects ImageNet-1k .* and CUDA GPUs .*no train/ in .*take --scale small"),
        (["table6"], r"--scale small expects Tiny-ImageNet-200"),
        (["table9"], r"unknown table 'table9'; did you mean 'table[678]'\?"),
        (["table6", "--images", "0"], r"--images: got 0, wanted 1 or more"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["reproduce", *arguments, "--data", str(tmp_path), "-o", str(tmp_path / "out")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(message, said), said
    assert not (tmp_path / "out").exists()


def test_every_table_has_the_papers_numbers() -> None:
    assert NAMES == ("table6", "table7", "table8", "groups", "gumbel", "variance")
    said = {name: [line.paper for line in TABLES[name]().lines] for name in TABLES}
    assert said["table8"][0] == "76.0 % at 2.5 G" and said["table8"][3] == "12.0 % at 0.4 G"
    assert sum(text != "-" for text in said["table7"]) == 5
