"""Is the gain in time on CPU the gain in multiply-adds? Dense and reduced, alternating in one process.

    python benchmarks/speed_cpu.py [--rounds 30] [--threads 2] [--clock wall|cpu] [--json FILE]

A row's figure is (reduced time / dense time) / share of MACs, per round; 1.00 is the ideal. The bounds are 1.05 at
batch 16 and 1.15 at batch 1. "trace" also builds what a heatmap needs; its bound is one dense forward. "blocks alone" runs the
untouched backbone's blocks on random tokens of the same lengths, without any reduction: what the matrix kernels leave to win. The CPU clock
counts what this process computed and is meant for one thread on a busy machine, where wall-clock time is the
neighbours' too. Peak memory is that of a fresh process per variant (Linux: VmHWM during its second forward, above what it
held before; glibc is told to give every freed block back at once, so that the peak is what was in use together).
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import workload

BOUNDS = {1: 1.15, 16: 1.05}
SINGLES = 6  # images that are measured one at a time for batch 1


def variants(work: workload.Workload) -> dict[str, tuple[Callable[[], Any], float]]:
    """What to time: a function and its share of the dense MACs."""
    chosen: dict[str, tuple[Callable[[], Any], float]] = {"dense": (lambda: work.dense(work.images), 1.0)}
    for on_drop in ("discard", "merge"):
        share = work.use(on_drop).share
        chosen[on_drop] = (lambda how=on_drop: (work.use_only(how), work.reduced(work.images)), share)
        if work.images.shape[0] == 1:
            chosen[f"{on_drop}, trace"] = (lambda how=on_drop: (work.use_only(how), work.reduced.trace(work.images)[1].heatmap(1)), share)
    if work.images.shape[0] == 1:
        tokens = random_tokens(work)
        chosen["blocks alone"] = (lambda: blocks_alone(work, tokens), work.use("discard").share)
    return chosen


def random_tokens(work: workload.Workload) -> list[torch.Tensor]:
    """Tokens of the single image's lengths, one tensor per group."""
    adapter = work.reduced.adapter
    return [torch.randn(1, adapter.prefix + kept, adapter.width) for kept in work.kept[0]]


def blocks_alone(work: workload.Workload, tokens: list[torch.Tensor]) -> torch.Tensor:
    """The dense model's embedding, blocks and head, each group's blocks on its own tokens."""
    dense, first = work.dense, work.reduced.config.first_blocks
    x = dense._pos_embed(dense.patch_embed(work.images))  # noqa: SLF001 - timm's own forward, in parts
    for index, block in enumerate(dense.blocks):
        group = sum(index >= start for start in first) - 1
        x = block(tokens[group] if index in first else x)
    return dense.forward_head(dense.norm(x))


def clocked(function: Callable[[], Any], clock: Callable[[], float]) -> float:
    """Seconds of one call."""
    start = clock()
    with torch.inference_mode():
        function()
    return clock() - start


def measure(works: list[workload.Workload], rounds: int, clock: Callable[[], float]) -> list[dict[str, Any]]:
    """One row per variant over all workloads of one batch size; the order is shuffled in every round."""
    times: dict[str, list[float]] = {}
    shares: dict[str, float] = {}
    for work in works:
        todo = variants(work)
        names = list(todo)
        for name in names:
            clocked(todo[name][0], clock)
        for _ in range(rounds):
            random.shuffle(names)
            for name in names:
                times.setdefault(name, []).append(clocked(todo[name][0], clock))
        for name, (_, share) in todo.items():
            shares[name] = shares.get(name, 0.0) + share / len(works)
    return [
        row(name, shares[name], seconds, times["dense"], works[0].images.shape[0])
        for name, seconds in ((name, times[name]) for name in shares)
    ]


def row(name: str, share: float, seconds: list[float], dense: list[float], batch: int) -> dict[str, Any]:
    """A variant's figures, from the times of its rounds and those of the dense model in the same rounds."""
    ratios = [t / d for t, d in zip(seconds, dense, strict=True)]
    low, middle, high = workload.quartiles([r / share for r in ratios])
    return {
        "variant": name,
        "batch": batch,
        "share_of_macs": share,
        "ms": 1000 * workload.quartiles(seconds)[1],
        "time_share": workload.quartiles(ratios)[1],
        "over_ideal": middle,
        "over_ideal_q1": low,
        "over_ideal_q3": high,
        "over_ideal_of_totals": sum(seconds) / sum(dense) / share,
    }


def table(rows: list[dict[str, Any]], threads: int, clock: str) -> None:
    """Prints rows as markdown."""
    print(f"\n{threads} thread(s), {clock} clock\n")
    print("| batch | variant | share of MACs | ms | time / dense | over ideal: median (quartiles) | of all rounds together | bound |")
    print("|---|---|---|---|---|---|---|---|")
    for r in rows:
        bound = (
            ""
            if r["variant"] in ("dense", "blocks alone")
            else "1 / share"
            if "trace" in r["variant"]
            else f"{BOUNDS.get(r['batch'], 0):.2f}"
        )
        print(
            f"| {r['batch']} | {r['variant']} | {r['share_of_macs']:.3f} | {r['ms']:.1f} | {r['time_share']:.3f} | {r['over_ideal']:.3f} "
            f"({r['over_ideal_q1']:.3f} to {r['over_ideal_q3']:.3f}) | {r['over_ideal_of_totals']:.3f} | {bound} |"
        )


def peak_of_this_process(variant: str, name: str, batch: int, share: float) -> float:
    """MB that a forward needs above what the process holds before it."""
    work = workload.make(name, batch, share)
    function = variants(work)[variant][0]
    clocked(function, time.perf_counter)  # the first one also fills the libraries' own buffers
    held = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    clocked(function, time.perf_counter)
    return (_status("VmHWM") - held) / 1024


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field + ":")).split()[1])


def peaks(name: str, batch: int, share: float) -> dict[str, float]:
    """Peak memory of each variant, each in its own process."""
    found, environment = {}, os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    for variant in ("dense", "discard", "merge"):
        command = [sys.executable, __file__, "--peak", variant, "--model", name, "--peak-batch", str(batch), "--share", str(share)]
        found[variant] = float(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.splitlines()[-1])  # noqa: S603 - this very script
    return found


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--share", type=float, default=0.63, help="MACs of the reduced model (discard) as a share of the dense model's")
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 1])
    parser.add_argument("--rounds", type=int, default=30, help="at batch 1, for each of several images")
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--peak-batch", type=int, default=16, help=argparse.SUPPRESS)
    return parser.parse_args()


def cpu_name() -> str:
    """The processor, as Linux names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    """Measures, prints, and writes JSON if asked to."""
    options = arguments()
    if options.peak:
        print(peak_of_this_process(options.peak, options.model, options.peak_batch, options.share))
        return
    random.seed(0)
    machine = {"cpu": cpu_name(), "torch": torch.__version__, "model": options.model, "rounds": options.rounds, "clock": options.clock}
    print("; ".join(f"{key}: {value}" for key, value in machine.items()))
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    result: dict[str, Any] = {**machine, "rows": []}
    for threads in options.threads:
        torch.set_num_threads(threads)
        rows = []
        for batch in options.batches:
            seeds = range(SINGLES if batch == 1 else 1)  # one image alone says little: its lengths are one draw
            works = [workload.make(options.model, batch, options.share, seed) for seed in seeds]
            rows += measure(works, options.rounds, clock)
        table(rows, threads, options.clock)
        result["rows"] += [{**row, "threads": threads} for row in rows]
    if not options.no_memory and Path("/proc/self/clear_refs").exists():
        result["peak_mb"] = peaks(options.model, 16, options.share)
        print(
            "\nPeak memory of a forward at batch 16, above weights and inputs: "
            + ", ".join(f"{k} {v:.0f} MB" for k, v in result["peak_mb"].items())
        )
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
