"""A table on a few pictures of noise as a script for several processes: `torchrun --nproc-per-node 2 reproduce_run.py FOLDER`.

Each process leaves the rows that it was told, and notes when it measures, in FOLDER.
"""

import json
import sys
from pathlib import Path

import iared2  # noqa: F401 - first: see iared2/_compat.py

# isort: split
import torch

from iared2.data.arrays import ImageArrays
from iared2.reproduce import bench as bench_module
from iared2.reproduce import command, runs
from iared2.reproduce.bench import Bench


def pictures(count: int, boxes: bool = False) -> ImageArrays:
    """Noise; where boxes are asked for, each is the left half."""
    draw = torch.Generator().manual_seed(count)
    pixels = torch.randint(0, 255, (count, 64, 64, 3), generator=draw, dtype=torch.uint8)
    box = torch.tensor([[0, 0, 31, 63]]).expand(count, 4) if boxes else None
    return ImageArrays(pixels, torch.randint(0, 200, (count,), generator=draw), boxes=box)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    bench_module._SMALL |= {"reduction.block_epochs": 0, "reduction.warm_start_epochs": 0, "data.batch_size": 4}
    Bench.check = lambda _: None
    bench = Bench(Path("tiny"), folder / "out", images=8, val_images=6, device="cpu")
    bench.__dict__["pictures"] = (pictures(8), pictures(6))
    told, measure, figures = [], runs.measure, command.figures

    def noted(*arguments: object) -> object:
        with (folder / f"measured-{torch.distributed.get_rank()}.txt").open("a") as stream:
            stream.write("once\n")
        return measure(*arguments)

    def kept(*arguments: object) -> object:
        told.append(figures(*arguments))
        return told[-1]

    runs.measure, command.figures = noted, kept
    command.run_reproduction("gumbel", bench)
    (folder / f"told-{torch.distributed.get_rank()}.json").write_text(json.dumps(told))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
