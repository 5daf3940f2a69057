"""Accuracy against multiply-adds on labelled photos: ours (one model per seed) beside ToMe, class attention and chance.

python benchmarks/trade_off.py PHOTOS --weights FILE --calibrate PHOTOS2 --models RUN0 RUN1 RUN2 [--budgets 0.67 0.60]
    [--configure weights=kept] [--dtype float32]

PHOTOS is looked at once per row, for the published figure; thresholds are calibrated on pictures held out of PHOTOS2, which were
trained on by nobody. Differences are paired with the dense model on the same photos; over seeds means and their 95 % intervals
(Student's t). Peers have no seed: there the interval is the (paired) standard error over photos times 1.96.
"""

import argparse
import json
import math
import re
import statistics
import time
from pathlib import Path

import iared2  # first: see iared2/_compat.py

# isort: split
import matplotlib as mpl
import timm
import torch
from matplotlib import pyplot as plt
from torch.nn import functional as F

from iared2.data.arrays import Preprocess
from iared2.data.batches import make_batches
from iared2.data.sources import open_data
from iared2.evaluate.calibrate import Calibrator, margin_for
from iared2.evaluate.classify import eval_preprocess
from iared2.evaluate.machine import describe_machine, versions
from iared2.keep import TopK
from iared2.reducers.baselines import AttentionReducer, RandomReducer, ToMeReducer, with_reducers
from iared2.reproduce.intervals import half_width
from iared2.saving import load_tensors
from iared2.seeds import generator

SPEED_ON, SPEED_BATCH = 128, 32  # photos that speed is measured on, and how many at a time


def pictures(folder, how: Preprocess, held_out: int | None = None, limit: int | None = None):
    """Batches of a folder, or of the pictures that training holds out of it; with labels and sources."""
    data = open_data(folder, "val")
    if held_out is not None:
        order = torch.randperm(len(data), generator=generator(0)).tolist()
        data = data.select(sorted(order[:held_out]))
    if limit is not None:
        data = data.select(list(range(min(limit, len(data)))))
    batches = list(make_batches(data, how, 50, train=False, workers=2).epoch(0))
    return [b["images"] for b in batches], torch.cat([b["labels"] for b in batches]), getattr(data, "sources", None)


@torch.inference_mode()
def answers(backbone, images):
    """Logits of a backbone with nothing dropped."""
    return torch.cat([backbone(batch).float() for batch in images])


@torch.inference_mode()
def measure(model, images):
    """Logits and mean share of the dense multiply-adds."""
    logits, share = [], 0.0
    for batch in images:
        found, trace = model.trace(batch)
        logits.append(found.float())
        share += trace.share_of_dense() * len(batch)
    return torch.cat(logits), share / sum(map(len, images))


def row(name: str, found, dense, labels, share: float, sources) -> dict:
    """One line of the table, in percent."""
    right, was = (found.argmax(1) == labels).double(), (dense.argmax(1) == labels).double()
    difference = right - was
    agree = (found.argmax(1) == dense.argmax(1)).double()
    kl = F.kl_div(found.log_softmax(1), dense.log_softmax(1), reduction="none", log_target=True).sum(1).double()
    parts = {}
    for source in sorted(set(sources or ())):
        mine = torch.tensor([other == source for other in sources])
        parts[source] = round(100 * difference[mine].mean().item(), 2)
    errors = {
        key: value.std().item() / math.sqrt(len(labels)) for key, value in (("difference", difference), ("agreement", agree), ("kl", kl))
    }
    return {
        "method": name,
        "saved": round(100 * (1 - share), 2),
        "top1": round(100 * right.mean().item(), 2),
        "difference": round(100 * difference.mean().item(), 3),
        "agreement": round(100 * agree.mean().item(), 2),
        "kl": round(kl.mean().item(), 4),
        "intervals": {key: round((1 if key == "kl" else 100) * 1.96 * error, 4) for key, error in errors.items()},
        "sources": parts,
    }


def peers(backbone):
    """(name, reduced model) of every peer row.

    Like ours, they compute in the last block what the head reads alone. ToMe's merging there would change nothing that is read, and is
    left out.
    """
    depth, width = len(backbone.blocks), backbone.embed_dim
    key_width = width // backbone.blocks[0].attn.num_heads
    for r in (8, 10, 12, 14, 16):
        model = iared2.reduce(backbone, range(depth - 1), place="between", on_drop="merge", skip_unread=True).eval()
        with_reducers(model, [ToMeReducer(r, key_width) for _ in range(depth - 1)])
        yield f"ToMe r={r}", model
    for on_drop in ("merge", "fuse", "discard"):
        for first, second in ((0.6, 0.3), (0.5, 0.25)):
            model = iared2.reduce(backbone, (depth // 3, 2 * depth // 3), on_drop=on_drop, skip_unread=True).eval()
            with_reducers(model, [AttentionReducer(TopK(ratio), on_drop, width) for ratio in (first, second)])
            yield f"class attention {first:.0%}, {second:.0%}, {on_drop}", model
    for ratio in (0.7, 0.6):
        model = iared2.reduce(backbone, (0,), skip_unread=True).eval()
        with_reducers(model, [RandomReducer(ratio)])
        yield f"chance {ratio:.0%} at the input", model


def at_budget(folder: str, budget: float, options: argparse.Namespace, backbone, held):
    """A saved model with thresholds (or counts) for a budget, and what it does on the held-out photos."""
    trained = (Path(folder) / "backbone.safetensors").is_file()
    model = iared2.load_reduced(folder) if trained else iared2.load_reduced(folder, backbone=backbone)
    model.configure(**dict(options.configure))
    calibrator = Calibrator(model, held, dense=[backbone(batch).float() for batch in held], second_look=options.second_look)
    expected = calibrator.to_share(budget)
    if options.top_k:
        model.configure(rule="top_k", ratios=expected.ratios)
        calibrator.choose_margin()
        expected = calibrator.measure()
    return model, expected


def nothing_dropped(folder: Path, images):
    """Answers of a saved model's own, fine-tuned backbone: what fine-tuning alone does."""
    return answers(iared2.load_reduced(folder).backbone.eval(), images)


@torch.inference_mode()
def speeds(models: dict, images, rounds: int = 7) -> dict[str, float]:
    """Images per second of every model, run in turn on the same batches; medians of the ratios to dense times dense's median."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 1):
        for name in list(models) if turn % 2 else list(models)[::-1]:
            start = time.perf_counter()
            for batch in images:
                models[name](batch)
            if turn:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    count = sum(map(len, images))
    dense = statistics.median(times["dense"])
    ratios = {name: statistics.median(t / d for t, d in zip(times[name], times["dense"], strict=True)) for name in models}
    return {name: count / (dense * ratio) for name, ratio in ratios.items()}


def over_seeds(rows: list[dict]) -> dict:
    """Means over seeds, and halves of their 95 % intervals."""
    means = {key: round(statistics.mean(r[key] for r in rows), 4) for key in ("saved", "top1", "difference", "agreement", "kl")}
    halves = {key: half_width([r[key] for r in rows]) for key in ("difference", "agreement", "kl")}
    sources = {s: round(statistics.mean(r["sources"][s] for r in rows), 2) for s in rows[0]["sources"]}
    intervals = {key: float("nan") if half is None else round(half, 4) for key, half in halves.items()}
    return {"method": rows[0]["method"], "seeds": len(rows), **means, "intervals": intervals, "sources": sources}


def pair(text: str) -> tuple[str, str]:
    """KEY=VALUE."""
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted KEY=VALUE")
    return key, value


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--calibrate", required=True)
    parser.add_argument("--held-out", type=int, default=200)
    parser.add_argument("--limit", type=int, help="the first photos only, for a look at speed")
    parser.add_argument("--models", nargs="*", default=[])
    parser.add_argument("--name", default="ours")
    parser.add_argument("--budgets", nargs="*", type=float, default=[0.67, 0.60, 0.54, 0.48])
    parser.add_argument(
        "--configure", nargs="*", type=pair, default=[], metavar="KEY=VALUE", help="settings of all models, as weights=kept"
    )
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="what all models compute in")
    parser.add_argument("--top-k", action="store_true", help="once calibrated, the same share of patches in every image")
    parser.add_argument(
        "--second-look", type=float, default=0.0, metavar="SHARE", help="pictures that every model passes again, as 0.1; budgets count it"
    )
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--speed", action="store_true", help=f"also time every model in turn, on {SPEED_ON} of the photos")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--also", nargs="*", type=Path, default=[], help="--json files of other runs on the same photos, for table and plot"
    )
    parser.add_argument("--plot", type=Path, help="a PNG: KL and top-1 against multiply-adds")
    return parser.parse_args()


def print_table(rows: list[dict]) -> None:
    print("\n| method | multiply-adds saved | top-1 | difference | agreement | KL |\n|---|---|---|---|---|---|")
    for r in rows:
        half = {key: f" ± {value:.{4 if key == 'kl' else 2 if key == 'difference' else 1}f}" for key, value in r["intervals"].items()}
        half = {key: "" if "nan" in text else text for key, text in half.items()}  # of one seed there is none
        near = f"{r['agreement']:.1f}{half['agreement']} % | {r['kl']:.4f}{half['kl']}"
        print(f"| {r['method']} | {r['saved']:.1f} % | {r['top1']:.2f} | {r['difference']:+.2f}{half['difference']} | {near} |")
    if rows[0]["sources"]:
        print(f"\n| difference | {' | '.join(rows[0]['sources'])} |\n|---|{'---|' * len(rows[0]['sources'])}")
        for r in rows[1:]:
            print(f"| {r['method']} | {' | '.join(f'{value:+.2f}' for value in r['sources'].values())} |")


def joined(rows: list[dict], also: list[Path]) -> list[dict]:
    """The rows and those of other runs on the same photos, each method once."""
    known: dict[str, dict] = {}
    for one in [*rows, *(one for path in also for one in json.loads(path.read_text())["rows"])]:
        known.setdefault(one["method"], one)
    return list(known.values())


def family(method: str) -> str:
    """What a row's point is joined with: the method without its rates or budget."""
    head, _, how = method.rpartition(", ")
    name = re.split(r" at | r=| \d+ ?%", head or method)[0]
    return f"{name}, {how}" if head else name


def plot(rows: list[dict], path: Path) -> None:
    """KL and the difference in top-1 against what is saved; bars are 95 % intervals."""
    mpl.use("Agg")
    drawn, (left, right) = plt.subplots(1, 2, figsize=(11.5, 4), dpi=100)
    for number, name in enumerate(dict.fromkeys(family(r["method"]) for r in rows if r["saved"] > 0)):
        mine = sorted((r for r in rows if family(r["method"]) == name and r["saved"] > 0), key=lambda r: r["saved"])
        saved, look = [r["saved"] for r in mine], {"color": f"C{number}", "marker": "o", "markersize": 3, "capsize": 2, "label": name}
        left.errorbar(saved, [r["kl"] for r in mine], yerr=[r["intervals"]["kl"] for r in mine], **look)
        right.errorbar(saved, [r["difference"] for r in mine], yerr=[r["intervals"]["difference"] for r in mine], **look)
    left.set(xlabel="multiply-adds saved, %", ylabel="KL to the dense model, nats", yscale="log")
    right.set(xlabel="multiply-adds saved, %", ylabel="top-1 against dense, points")
    right.axhline(0, color="k", linewidth=0.5)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    right.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))  # beside the bars, not on them
    drawn.tight_layout()
    drawn.savefig(path)


class Table:
    """Rows on one set of photos, printed as they come, and the models behind them."""

    def __init__(self, backbone, photos) -> None:
        self.images, self.labels, self.sources = photos
        self.dense = answers(backbone, self.images)
        self.rows: list[dict] = []
        self.timed = {"dense": backbone}
        self.add(self.row("dense", self.dense))

    def row(self, name: str, found, share: float = 1.0) -> dict:
        return row(name, found, self.dense, self.labels, share, self.sources)

    def add(self, one: dict) -> None:
        self.rows.append(one)
        print(json.dumps(one), flush=True)

    def measured(self, name: str, model) -> dict:
        """A row of a model, which is also one of those that speed is measured of (over seeds: the first)."""
        self.timed.setdefault(name, model)
        return self.row(name, *measure(model, self.images))

    def time(self) -> None:
        found = speeds(self.timed, torch.cat(self.images)[:SPEED_ON].split(SPEED_BATCH))
        for name, rate in found.items():
            print(f"{name}: {rate:.1f} images/s, {rate / found['dense']:.2f} x dense", flush=True)
        for one in self.rows:
            one["images_per_second"] = round(found.get(one["method"], float("nan")), 1)


def fill(table: Table, options: argparse.Namespace, backbone, held) -> None:
    """All rows that were asked for."""
    if options.dtype == "float32":  # what rounding alone does
        with torch.autocast("cpu", torch.bfloat16):
            table.add(table.row("dense, in bfloat16", answers(backbone, table.images)))
    again = ", second look" if options.second_look else ""
    for name, model in peers(backbone) if options.peers else ():
        if again:  # as ours
            model.configure(second_look=margin_for(model, held, options.second_look))
        table.add(table.measured(name + again, model))
    own = [Path(folder) for folder in options.models if (Path(folder) / "backbone.safetensors").is_file()]
    if own and len(own) == len(options.models):
        alone = [nothing_dropped(folder, table.images) for folder in own]
        table.add(over_seeds([table.row(f"{options.name}, nothing dropped", found) for found in alone]))
    for budget in options.budgets if options.models else ():
        seeds = []
        for folder in options.models:
            model, expected = at_budget(folder, budget, options, backbone, held)
            seeds.append(table.measured(f"{options.name} at {budget:g}x{again}", model))
            print(json.dumps(seeds[-1] | {"model": folder, "expected": expected.line()}), flush=True)
        table.add(over_seeds(seeds))


def main() -> None:
    options = arguments()
    backbone = timm.create_model("deit_tiny_patch16_224.fb_in1k").eval()
    load_tensors(backbone, Path(options.weights))
    how = eval_preprocess(iared2.reduce(backbone, 3))
    photos = pictures(options.photos, how, limit=options.limit)
    held, _, _ = pictures(options.calibrate, how, options.held_out)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=options.dtype == "bfloat16"):
        table = Table(backbone, photos)
        fill(table, options, backbone, held)
        if options.speed:
            table.time()
    rows = joined(table.rows, options.also)
    print_table(rows)
    if options.plot:
        plot(rows, options.plot)
    if options.json:
        about = {"photos": len(table.labels), "machine": describe_machine(torch.device("cpu")), "versions": versions()}
        options.json.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
