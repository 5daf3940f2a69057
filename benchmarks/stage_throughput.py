"""How fast is an interpreter stage beside dense inference? REINFORCE steps and dense passes, alternating in one process.

    python benchmarks/stage_throughput.py [--model deit_tiny_patch16_224] [--batch 32] [--rounds 7] [--device cpu] [--dtype bfloat16]

A step of the paper's stage is what it does to a batch: the frozen prefix, a sampled pass, a greedy pass, the policy gradient and
the optimizer. Three groups, interpreters with random weights that keep about 0.9 of the patches; labels are random. "cached" is the stage
on pictures that come again unchanged, whose prefix is remembered. The aim is 0.45 of the dense rate.
"""

import argparse
import statistics
import time

import torch

import iared2

# isort: split
import timm

from iared2.reward import RewardConfig
from iared2.runtime import precision
from iared2.train.tasks import InterpreterTask


def step_of(model: iared2.ReducedTransformer, group: int, batch: dict, cache: bool):
    """One training step as a function."""
    task = InterpreterTask(model, group, RewardConfig(), cache=cache)
    task.begin()
    optimizer = torch.optim.AdamW(model.reducers[group].parameters(), lr=1e-4)

    def step() -> None:
        task.begin()
        task(batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    device = torch.device(options.device)
    backbone = timm.create_model(options.model).eval().to(device)
    images = torch.randn(options.batch, 3, 224, 224, device=device)
    batch = {"images": images, "labels": torch.randint(1000, (options.batch,), device=device), "indices": torch.arange(options.batch)}
    model = iared2.reduce(backbone, 3).eval()

    def dense() -> None:
        with torch.inference_mode():
            backbone(images)

    steps = {f"group {g + 1}{', cached' * c}": step_of(model, g, batch, bool(c)) for g in range(3) for c in (0, 1)}
    times: dict[str, list[float]] = {name: [] for name in ("dense", *steps)}
    for turn in range(options.rounds + 1):
        for name, run in (("dense", dense), *steps.items()):
            with precision(device, options.dtype):
                start = time.perf_counter()
                run()
                if device.type == "cuda":
                    torch.cuda.synchronize()
            if turn:  # the first round warms up, and fills the memory of prefixes
                times[name].append(time.perf_counter() - start)
    print("| step | images/s | x dense |\n|---|---|---|")
    for name, seconds in times.items():
        ratio = statistics.median(d / s for d, s in zip(times["dense"], seconds, strict=True))
        print(f"| {name} | {options.batch / statistics.median(seconds):.1f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
