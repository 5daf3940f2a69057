"""How noisy estimators of the policy gradient are, and what reward a forward pass buys with each. Not in the paper.

The middle group's interpreter, as it stands before REINFORCE, on fixed pictures. A forward pass is one from the group's block to
the end: the frozen prefix is shared, and the greedy baseline costs one pass more.
"""

import copy
import logging
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from iared2.keep import Threshold
from iared2.model import reduce
from iared2.reproduce.bench import Bench
from iared2.reproduce.intervals import half_width
from iared2.reproduce.runs import Row, digest, read_json, write_json
from iared2.reproduce.write import command, machine_words, setting
from iared2.reward import EstimatorConfig
from iared2.runtime import pick_device, precision
from iared2.seeds import seed_all
from iared2.train.optim import OptimSettings, build_optimizer, schedule_factor, set_rate
from iared2.train.recipes import Recipe, ReductionSettings
from iared2.train.run import build_backbone
from iared2.train.tasks import InterpreterTask
from iared2.train.warm_start import WarmStartTask

logger = logging.getLogger("iared2.reproduce")

GROUP = 1  # counted from 0: the one whose maps the paper shows
DRAWS = 48  # gradients per estimator, on one batch
PASSES = 480  # forward passes of a batch behind the prefix that learning may use, over all batches
PICTURES = 128  # at most this many pictures to learn on
ENTROPY_BONUSES = (1.0, 10.0)  # reward per nat of a patch's chance
_COLOURS = {1: "C0", 2: "C1", 4: "C2", 8: "C3"}  # by samples
_MARKS = {(False, 0.0): ("-", "o"), (True, 0.0): ("--", "x")} | {
    (False, bonus): look for bonus, look in zip(ENTROPY_BONUSES, ((":", "^"), ("-.", "v")), strict=True)
}
BATCH = {"data.batch_size": 8}  # small, so that there is noise to see


@dataclass(frozen=True)
class Estimator:
    """One way to estimate the policy gradient, and what is added to the reward for chances that stay open."""

    name: str
    config: EstimatorConfig
    entropy_bonus: float = 0.0

    @property
    def passes(self) -> int:
        """Forward passes behind the prefix per step."""
        return self.config.samples + (self.config.baseline == "greedy")

    def use(self, task: InterpreterTask) -> None:
        """Has the task learn this way from now on."""
        task.estimator, task.entropy_bonus = self.config, self.entropy_bonus


def estimators() -> list[Estimator]:
    """The paper's, and leave-one-out with 2, 4 and 8 samples; plain, with normalised advantages, and some with an entropy bonus."""
    kinds = [("greedy, K=1", "greedy", 1)] + [(f"leave-one-out, K={k}", "leave_one_out", k) for k in (2, 4, 8)]
    plain = [Estimator(name, EstimatorConfig.model_validate({"samples": k, "baseline": kind})) for name, kind, k in kinds]
    normal = {"normalise_advantage": True}
    normalised = [Estimator(f"{way.name}, normalised", way.config.model_copy(update=normal)) for way in plain]
    open_chances = [
        Estimator(f"{way.name}, entropy {bonus:g}", way.config, bonus) for bonus in ENTROPY_BONUSES for way in (plain[0], plain[-1])
    ]
    return plain + normalised + open_chances


def run_variance(bench: Bench) -> int:
    """Measures every estimator with every seed, and writes OUT/variance.json, .md and .png."""
    rows: list[Row] = []
    for seed in range(bench.seeds):
        how = digest(bench.recipe(BATCH, seed), bench.start_hash, DRAWS, PASSES, PICTURES, estimators())
        path = bench.output / "runs" / f"variance-{bench.scale}-{how}-{seed}.json"
        known = read_json(path)
        if known is None:
            start = time.perf_counter()
            known = _study(bench, seed)
            write_json(path, known)
            logger.info("variance, seed %d: %d estimators, %.0f s", seed, len(known), time.perf_counter() - start)
        rows += known
        _write(rows, bench)
    return 0


def _study(bench: Bench, seed: int) -> list[Row]:
    recipe = bench.recipe(BATCH, seed)
    settings = recipe.reduction or ReductionSettings()
    device = pick_device(bench.device)
    with precision(device, "bfloat16" if recipe.precision == "bf16" else "float32"):
        task, batches = _prepared(bench, recipe, device)
        start = copy.deepcopy(task.reducer.state_dict())
        rows: list[Row] = [{"name": way.name, "seed": seed, "passes": way.passes} for way in estimators()]
        for row, found in zip(rows, _noise(task, batches[0], seed), strict=True):
            row.update(found)
        for row, way in zip(rows, estimators(), strict=True):
            task.reducer.load_state_dict(start)
            row.update(_learn(task, batches, way, settings.interpreter_optim, seed))
    return rows


def _prepared(bench: Bench, recipe: Recipe, device: torch.device) -> tuple[InterpreterTask, list[dict[str, Tensor]]]:
    """The task with its interpreter at the share that imitation would aim at, and fixed batches of it."""
    settings = recipe.reduction or ReductionSettings()
    seed_all(recipe.seed)
    backbone = build_backbone(recipe)
    model = reduce(backbone, settings.groups, interpreter=settings.interpreter, on_drop=settings.on_drop).to(device).eval()
    for group in range(GROUP):
        model.reducers[group].rule = Threshold(-1.0)
    feed = bench.feeds(recipe, backbone).train
    if settings.warm_start_ratios:
        WarmStartTask(model, GROUP, settings.warm_start_ratios[GROUP], settings.warm_start_sharpness).first_look(feed)
    task = InterpreterTask(model, GROUP, settings.reward_of(GROUP), settings.entropy_bonus, True)
    task.begin()
    batches = []
    for batch in feed.epoch(0):
        batches.append({name: value.to(device) for name, value in batch.items()})
        if len(batches) * recipe.data.batch_size >= PICTURES:
            break
    return task, batches


def _noise(task: InterpreterTask, batch: dict[str, Tensor], seed: int) -> list[Row]:
    """Spread of each estimator's gradient over `DRAWS` draws.

    Returns:
        For each estimator: variance (summed over parameters), and the mean cosine to the mean of the other draws of the eight-sample
        estimator, which also compares estimators of other lengths.
    """
    gradients = []
    for way in estimators():
        way.use(task)
        draws = []
        for draw in range(DRAWS):
            seed_all(seed, draw, way.config.samples)
            draws.append(_gradient(task, batch))
        gradients.append(torch.stack(draws))
    best = gradients[[way.name for way in estimators()].index("leave-one-out, K=8")]
    rows = []
    for found in gradients:
        others = (best.sum(0) - best) / (DRAWS - 1)
        cosine = torch.nn.functional.cosine_similarity(found, others, dim=1).mean()
        rows.append({"variance": float(found.var(0).sum()), "cosine": float(cosine)})
    return rows


def _gradient(task: InterpreterTask, batch: dict[str, Tensor]) -> Float[Tensor, " P"]:
    parameters = [value for value in task.reducer.parameters() if value.requires_grad]
    found = torch.autograd.grad(task(batch)["loss"], parameters, allow_unused=True)
    return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(parameters, found, strict=True)]).double()


def _learn(task: InterpreterTask, batches: Sequence[dict[str, Tensor]], way: Estimator, optim: OptimSettings, seed: int) -> Row:
    """Greedy reward before and after learning for `PASSES` forward passes.

    And on the way: after how many passes a batch's sampled reward stood by how much above its greedy reward before learning, since batches
    differ by more than learning changes.
    """
    before, _ = _greedy(task, batches)
    way.use(task)
    optimizer = build_optimizer(task, optim, len(batches[0]["labels"]))
    steps, curve = PASSES // way.passes, []
    for step in range(steps):
        set_rate(optimizer.param_groups, schedule_factor(optim, step, steps))
        seed_all(seed, 1, step)
        number = step % len(batches)
        logs = task(batches[number])
        logs["loss"].backward()
        torch.nn.utils.clip_grad_norm_(task.reducer.parameters(), optim.clip_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        curve.append(((step + 1) * way.passes, float(logs["reward"]) - before[number]))
    after, entropies = _greedy(task, batches)
    means = {"reward_before": statistics.mean(before), "reward_after": statistics.mean(after), "entropy": statistics.mean(entropies)}
    return {**means, "curve": curve}


@torch.no_grad()
def _greedy(task: InterpreterTask, batches: Sequence[dict[str, Tensor]]) -> tuple[list[float], list[float]]:
    """The greedy reward of each batch, and the mean entropy of a patch's chance in nats."""
    task.estimator = EstimatorConfig()
    seed_all(0)
    logs = [task(batch) for batch in batches]
    return [float(found["baseline"]) for found in logs], [float(found["entropy"]) for found in logs]


def _write(rows: list[Row], bench: Bench) -> None:
    write_json(bench.output / "variance.json", {"command": command("variance", bench), **setting(bench), "rows": rows})
    out = ["# Variance of the policy gradient, and reward per forward pass", "", f"    {command('variance', bench)}", ""]
    head = [
        "estimator",
        "passes per step",
        "variance",
        "variance x passes",
        "cosine to the mean gradient",
        "reward before",
        "gained",
        "entropy after",
        "seeds",
    ]
    out += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for way in estimators():
        mine = [row for row in rows if row["name"] == way.name]
        costly = [{**row, "costly": row["variance"] * row["passes"], "gained": _gained(row)} for row in mine]
        cells = [way.name, str(mine[0]["passes"]), _cell(mine, "variance"), _cell(costly, "costly")]
        cells += [_cell(mine, "cosine"), _cell(mine, "reward_before"), _cell(costly, "gained"), _cell(mine, "entropy")]
        out.append("| " + " | ".join([*cells, str(len(mine))]) + " |")
    out += ["", f"{bench.images} training pictures, of which at most {PICTURES} are learnt on; {DRAWS} gradients per estimator and seed on"]
    out += [
        f"one batch; learning with {PASSES} forward passes of a batch for every estimator, so that more samples per step mean fewer steps,"
    ]
    out += [
        f"all at one learning rate; {machine_words(bench)}. ± is the half-width of the 95 % interval over seeds. Variances of normalised"
    ]
    out += ["estimators are those of longer or shorter gradients: compare cosines. Entropy: of a patch's chance to stay, in nats; 0.69"]
    most = f"{max(ENTROPY_BONUSES):g}"
    out += [
        f"is a coin's. With entropy {most}, {most} times its mean over patches is added to the reward: the mean gradient that cosines are"
    ]
    out += ["taken to is one without it, so that the cosines of those rows say nothing about noise."]
    (bench.output / "variance.md").write_text("\n".join(out) + "\n")
    _plot(rows, bench)


def _gained(row: Row) -> float:
    """Reward after learning minus before: seeds start at different rewards."""
    return row["reward_after"] - row["reward_before"]


def _cell(rows: Sequence[Row], key: str) -> str:
    half = half_width([row[key] for row in rows])
    return f"{statistics.mean(row[key] for row in rows):.3g}" + ("" if half is None else f" ± {half:.2g}")


def _plot(rows: list[Row], bench: Bench) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    made: Any = plt.subplots(1, 2, figsize=(9, 4.4), dpi=90, layout="constrained")
    canvas, (left, right) = made
    for way in estimators():
        mine = [row for row in rows if row["name"] == way.name]
        style, mark = _MARKS[way.config.normalise_advantage, way.entropy_bonus]
        colour = _COLOURS[way.config.samples]
        gained = [_gained(row) for row in mine]
        place = (statistics.mean(row["cosine"] for row in mine), statistics.mean(gained))
        left.errorbar(*place, yerr=half_width(gained) or 0.0, color=colour, fmt=mark, capsize=2)
        curve = [(points[0][0], statistics.mean(y for _, y in points)) for points in zip(*(r["curve"] for r in mine), strict=True)]
        smooth = [(curve[i][0], statistics.mean(y for _, y in curve[max(0, i - 15) : i + 1])) for i in range(len(curve))]
        right.plot(*zip(*smooth, strict=True), style, color=colour, marker=mark, markevery=[-1], label=way.name)
    left.set_xlabel("cosine of one gradient to the mean gradient")
    left.set_ylabel("greedy reward gained by learning")
    right.set_xlabel("forward passes of a batch, over all batches")
    right.set_ylabel("sampled reward, above greedy before learning")
    canvas.legend(loc="outside lower center", ncols=4, fontsize=6, handlelength=4)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    canvas.savefig(bench.output / "variance.png")
    plt.close(canvas)
