"""Is the gain in time on a GPU the gain in multiply-adds? Dense and reduced, eager and compiled, alternating in one process.

    python benchmarks/speed_cuda.py [--batch 256] [--rounds 20] [--share 0.63] [--json FILE]

bf16; DeiT-S and DeiT-B at 224 and 384 px. "of the ideal gain" is (dense time / reduced time) x share of MACs, each
reduced variant against the dense model run the same way (eager with eager, compiled with compiled); the aim is 0.9.
Synchronisations are counted in one eager forward, by PyTorch's own warnings; at most one per group is allowed.
"""

import argparse
import json
import random
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import workload

SETTINGS = (
    ("deit_small_patch16_224", 224),
    ("deit_base_patch16_224", 224),
    ("deit_small_patch16_224", 384),
    ("deit_base_patch16_224", 384),
)


def milliseconds(function: Callable[[], Any], calls: int) -> float:
    """Time of one call, averaged over several so that launches overlap as they do in use."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.inference_mode():
        start.record()
        for _ in range(calls):
            function()
        stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / calls


def synchronisations(function: Callable[[], Any]) -> int:
    """How often one call makes the host wait for the GPU."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught, torch.inference_mode():
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def peak_mb(function: Callable[[], Any]) -> float:
    """Peak GPU memory of one call, weights and inputs included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode():
        function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**20


def variants(work: workload.Workload, compiled: bool) -> dict[str, tuple[Callable[[], Any], float]]:
    """What to time: a function and its share of the dense MACs."""
    # One compiled model per hand-over: a shared one would be compiled for the first and guarded against the second.
    chosen: dict[str, tuple[Callable[[], Any], float]] = {}
    for mode in ("eager", "compiled") if compiled else ("eager",):
        dense = torch.compile(work.dense) if mode == "compiled" else work.dense
        chosen[f"dense, {mode}"] = (lambda run=dense: run(work.images), 1.0)
        for on_drop in ("discard", "merge"):
            share = work.use(on_drop).share
            reduced = torch.compile(work.reduced) if mode == "compiled" else work.reduced
            chosen[f"{on_drop}, {mode}"] = (lambda run=reduced, how=on_drop: (work.use_only(how), run(work.images)), share)
    return chosen


def measure(work: workload.Workload, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per variant; the order is shuffled in every round."""
    todo = variants(work, options.compiled)
    for function, _ in todo.values():
        milliseconds(function, 3)
    times: dict[str, list[float]] = {name: [] for name in todo}
    names = list(todo)
    for _ in range(options.rounds):
        random.shuffle(names)
        for name in names:
            times[name].append(milliseconds(todo[name][0], options.calls))
    rows = []
    for name, (function, share) in todo.items():
        dense = times["dense, " + name.split(", ")[1]]
        low, middle, high = workload.quartiles([d / t * share for t, d in zip(times[name], dense, strict=True)])
        ms = workload.quartiles(times[name])[1]
        row = {"variant": name, "share_of_macs": share, "ms": ms, "images_per_second": 1000 * options.batch / ms}
        row |= {"of_ideal": middle, "of_ideal_q1": low, "of_ideal_q3": high, "peak_mb": peak_mb(function)}
        rows.append(row | {"synchronisations": synchronisations(function) if name.endswith("eager") else None})
    return rows


def table(title: str, rows: list[dict[str, Any]]) -> None:
    """Prints rows as markdown."""
    print(f"\n{title}\n")
    print("| variant | share of MACs | ms | images/s | of the ideal gain: median (quartiles) | peak MB | synchronisations |")
    print("|---|---|---|---|---|---|---|")
    for r in rows:
        waits = "" if r["synchronisations"] is None else r["synchronisations"]
        print(
            f"| {r['variant']} | {r['share_of_macs']:.3f} | {r['ms']:.2f} | {r['images_per_second']:.0f} | {r['of_ideal']:.3f} "
            f"({r['of_ideal_q1']:.3f} to {r['of_ideal_q3']:.3f}) | {r['peak_mb']:.0f} | {waits} |"
        )


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--share", type=float, default=0.63, help="MACs of the reduced model (discard) as a share of the dense model's")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--calls", type=int, default=5, help="calls per timing")
    parser.add_argument("--eager-only", dest="compiled", action="store_false")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> int:
    """Measures, prints, and writes JSON if asked to."""
    options = arguments()
    if not torch.cuda.is_available():
        print(
            "speed_cuda: no CUDA device here (torch.cuda.is_available() is false); benchmarks/speed_cpu.py measures on CPU", file=sys.stderr
        )
        return 2
    random.seed(0)
    on = torch.empty(0, device="cuda", dtype=torch.bfloat16)
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "batch": options.batch, "dtype": "bfloat16"}
    print("; ".join(f"{key}: {value}" for key, value in machine.items()))
    result: dict[str, Any] = {**machine, "settings": []}
    for name, size in SETTINGS:
        torch.compiler.reset()
        work = workload.make(name, options.batch, options.share, image_size=size, on=on)
        rows = measure(work, options)
        table(f"{name}, {size} px", rows)
        result["settings"].append({"model": name, "image_size": size, "rows": rows})
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
