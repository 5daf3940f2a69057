"""Several processes give what one gives for the same global batch; one that is killed costs time and nothing else."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import ranks_run
from iared2.data.arrays import ArrayBatches, Preprocess
from iared2.keep import Sampled
from iared2.seeds import draws_of_batch, uniform_per_image
from packs import make_layout
from tiny_run import tiny_arrays

SCRIPT = Path(ranks_run.__file__)
LIMIT = 240  # seconds; a process that waits for another must not hold up the tests


def torchrun(*arguments: object, script: Path = SCRIPT, processes: int = 2, restarts: int = 0, dies: bool = False) -> str:
    """Runs a script under torchrun, alone in its process group; gives what it said. `dies`: it must fail."""
    paths = os.pathsep.join([str(SCRIPT.parent), str(SCRIPT.parents[1] / "src"), os.environ.get("PYTHONPATH", "")])
    # torchrun of torch 2.13 offers restarted processes the addresses of dead ones, unless its store is not shared (pytorch issue 135712).
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "CUDA_VISIBLE_DEVICES": ""}
    launcher = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        processes,
        "--max-restarts",
        restarts,
        "--monitor-interval",
        0.1,
    ]
    process = subprocess.Popen(
        [sys.executable, *map(str, launcher), str(script), *map(str, arguments)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert (process.returncode != 0) == dies, said[-3000:]
    return said


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes leave; the last run kills one of them on the way."""
    folder = tmp_path_factory.mktemp("two")
    torchrun(folder, *ranks_run.NAMES, "killed", restarts=1)
    return folder


@pytest.fixture(scope="module")
def divided(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes leave that each hold a part of what is trained (FSDP); the last run kills one of them on the way."""
    folder = tmp_path_factory.mktemp("divided")
    torchrun(folder, "--fsdp", *ranks_run.NAMES, "killed", restarts=1)
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What this process leaves."""
    AcceleratorState._reset_state(True)
    folder, threads = tmp_path_factory.mktemp("one"), torch.get_num_threads()
    ranks_run.main(folder, list(ranks_run.NAMES))
    torch.set_num_threads(threads)
    yield folder
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize("several", ["two", "divided"])
@pytest.mark.parametrize("name", ranks_run.NAMES)
def test_two_processes_train_what_one_trains(name: str, several: str, one: Path, request: pytest.FixtureRequest) -> None:
    first = ranks_run.fresh(name).state_dict()
    alone, shared = (load_file(folder / name / "model.safetensors") for folder in (one, request.getfixturevalue(several)))
    moved = max(float((alone[key] - first[key]).abs().max()) for key in alone)
    apart = max(float((alone[key] - shared[key]).abs().max()) for key in alone)
    assert moved > 0.02
    assert apart < 1e-5, f"{apart:.2g} apart after moving {moved:.2g}"


@pytest.mark.parametrize(("several", "least", "most"), [("two", 1, 1), ("divided", 0.3, 0.7)])
@pytest.mark.parametrize("name", ranks_run.NAMES)
def test_processes_hold_all_or_a_part_of_what_is_trained(
    name: str, several: str, least: float, most: float, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(several) / name
    shares = [[float(line) for line in (folder / f"share-{rank}.txt").read_text().splitlines()] for rank in (0, 1)]
    assert all(least <= share <= most for rank in shares for share in rank)
    assert [sum(both) for both in zip(*shares, strict=True)] == pytest.approx([2.0 if least == 1 else 1.0] * len(shares[0]))


@pytest.mark.parametrize("several", ["two", "divided"])
def test_a_killed_process_resumes_mid_epoch_and_changes_no_bit(several: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(several)
    undisturbed, killed = (load_file(folder / name / "model.safetensors") for name in ("interpreter", "killed"))
    passes = set((folder / "passes.txt").read_text().splitlines())
    assert {"rank 0 epoch 1 from 2", "rank 1 epoch 1 from 2"} <= passes, passes  # the checkpoint of step 8
    assert all(torch.equal(undisturbed[key], killed[key]) for key in undisturbed)


def test_one_process_goes_on_where_two_with_a_part_each_stopped(one: Path, tmp_path: Path) -> None:
    torchrun(tmp_path, "--fsdp", "killed", dies=True)
    ranks_run.main(tmp_path, ["killed"])
    assert (tmp_path / "passes.txt").read_text().splitlines()[-1] == "rank 0 epoch 1 from 2"
    alone, shared = load_file(one / "interpreter" / "model.safetensors"), load_file(tmp_path / "killed" / "model.safetensors")
    assert max(float((alone[key] - shared[key]).abs().max()) for key in alone) < 1e-5


def test_bfloat16_with_a_part_each_is_bfloat16_with_the_whole_on_each(tmp_path: Path) -> None:
    for folder, options in (("two", ["--bf16"]), ("divided", ["--bf16", "--fsdp"])):
        (tmp_path / folder).mkdir()
        torchrun(tmp_path / folder, *options, "blocks")
    whole, parts = (load_file(tmp_path / folder / "blocks" / "model.safetensors") for folder in ("two", "divided"))
    assert max(float((whole[key] - parts[key]).abs().max()) for key in whole) < 1e-5


def test_a_table_is_trained_by_all_processes_and_measured_by_one(tmp_path: Path) -> None:
    torchrun(tmp_path, script=SCRIPT.parent / "reproduce_run.py")
    told = [json.loads((tmp_path / f"told-{rank}.json").read_text()) for rank in (0, 1)]
    assert [row["name"] for row in told[0]] == ["dense", "REINFORCE", "Gumbel"] and told[0] == told[1]
    assert (tmp_path / "measured-0.txt").read_text().split() == ["once"] * 3
    assert not (tmp_path / "measured-1.txt").exists()
    assert "Gumbel" in (tmp_path / "out" / "gumbel.md").read_text()


@pytest.mark.parametrize("world", [2, 3])
def test_what_a_picture_draws_does_not_depend_on_the_number_of_ranks(world: int) -> None:
    kept = [[0, 1, 2], [5, 6], [3], [0, 4, 7, 9], [], [1, 2]]
    chances = [torch.rand(1 + len(places), generator=torch.Generator().manual_seed(number)) for number, places in enumerate(kept)]
    device = torch.device("cpu")

    def drawn(rank: int, world: int, times: int) -> list[set[int]]:
        mine = [number for number in range(len(kept)) if number % world == rank] * times
        layout = make_layout([kept[number] for number in mine], 1)
        with draws_of_batch(7, 0, 3, rank=rank, world=world, device=device):
            uniform_per_image(layout.images, 1, device)  # stochastic depth of a block before it
            chosen = Sampled()(torch.cat([chances[number] for number in mine]), layout)
        bounds = layout.cu_B1.tolist()
        rows = chosen.index_S.tolist()
        return [{row - a for row in rows if a <= row < b} for a, b in zip(bounds, bounds[1:], strict=False)]

    for times in (1, 2):  # walks draw several times for the same picture
        alone = drawn(0, 1, times)
        parts = [drawn(rank, world, times) for rank in range(world)]
        assert [parts[n % world][n // world] for n in range(len(alone))] == alone
    assert uniform_per_image(3, 1, device) is None
    with draws_of_batch(7, 0, 4, rank=0, world=1, device=device):
        assert uniform_per_image(6, 16, device)[0, 0] != torch.rand(1)


@pytest.mark.parametrize(("batch_size", "world"), [(4, 2), (2, 3), (12, 1)])
def test_views_depend_on_the_place_in_the_epoch_alone(batch_size: int, world: int) -> None:
    how = Preprocess((16, 16), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), min_scale=0.4)
    alone = next(ArrayBatches(tiny_arrays(24), how, 24).epoch(1))
    views = {}
    for rank in range(world):
        for batch in ArrayBatches(tiny_arrays(24), how, batch_size).epoch(1, 0, rank, world):
            views |= dict(zip(batch["indices"].tolist(), batch["images"], strict=True))
    assert len(views) == 24
    for index, view in zip(alone["indices"].tolist(), alone["images"], strict=True):
        assert torch.equal(views[index], view)
