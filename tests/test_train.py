"""Algorithm 1 moves exactly what it names; runs resume exactly; what goes wrong says where."""

import csv
import math
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

import tiny_run
from iared2.curriculum import StagePlan, algorithm_1
from iared2.errors import ConfigError, TrainingError
from iared2.handover import Judged
from iared2.keep import Threshold
from iared2.model import reduce
from iared2.reward import EstimatorConfig, RewardConfig
from iared2.tokens.grid import smoothed
from iared2.tokens.packed import scatter_places
from iared2.train.checkpoint import Place, latest_checkpoint, save_checkpoint
from iared2.train.feeds import Feeds
from iared2.train.learner import copy_of_trained
from iared2.train.optim import OptimSettings, schedule_factor
from iared2.train.run import _train_reduction, build_stage
from iared2.train.tasks import BlocksTask, InterpreterTask
from iared2.train.together import FineTuneTask, ImitationTask, Memory
from iared2.train.trainer import RunSettings, Stage, Task, Trainer
from iared2.train.warm_start import WarmStartTask, mass_evidence

SCRIPT = Path(tiny_run.__file__)


def moved(before: dict, model: nn.Module) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(before[name], value)}


def snapshot(model: nn.Module) -> dict:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("plan", algorithm_1(2, 1, 1, 1), ids=lambda plan: plan.name)
@pytest.mark.parametrize("train_head", [True, False])
def test_each_stage_moves_exactly_the_named_parameters(plan: StagePlan, train_head: bool, tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    model = reduce(tiny_run.tiny_backbone(), 2, on_drop="merge")
    recipe = tiny_run.tiny_recipe(train_head=train_head)
    stage = build_stage(plan, model, recipe.reduction, tiny_run.tiny_feeds(), accelerator)
    before = snapshot(model)
    Trainer(model, RunSettings(tmp_path, "x"), accelerator).fit([stage])
    if plan.kind == "blocks":
        first = model.config.first_blocks[plan.group]
        wanted = {n for n in before if n.startswith("backbone.blocks.") and int(n.split(".")[2]) >= first}
        wanted |= {n for n in before if n.startswith(("backbone.norm.", "backbone.head."))} if train_head else set()
    else:
        wanted = {n for n in before if n.startswith(f"reducers.{plan.group}.")}
    assert moved(before, model) == wanted


def test_later_interpreters_keep_everything_and_the_frozen_prefix_runs_once() -> None:
    model = reduce(tiny_run.tiny_backbone(), 4)
    task = InterpreterTask(model, 1, RewardConfig())
    task.begin()
    calls = {"embed": 0, "scores": [0] * 4}
    embed = model.adapter.embed

    def counted(images):
        calls["embed"] += 1
        return embed(images)

    model.adapter.embed = counted
    for group, reducer in enumerate(model.reducers):
        reducer.interpreter.register_forward_hook(lambda *_, g=group: calls["scores"].__setitem__(g, calls["scores"][g] + 1))
    batch = next(tiny_run.tiny_feeds().train.epoch(0))
    task(batch)["loss"].backward()
    assert calls == {"embed": 1, "scores": [1, 1, 0, 0]}
    assert all(p.grad is None for p in model.backbone.parameters())
    assert all(p.grad is not None for p in model.reducers[1].parameters())


def test_the_interpreter_loss_is_equation_3_for_the_decisions_taken() -> None:
    model = reduce(tiny_run.tiny_backbone(drop_path_rate=0.0), 2).double()
    task = InterpreterTask(model, 0, RewardConfig(error_penalty=1.0))
    task.begin()
    batch = next(tiny_run.tiny_feeds().train.epoch(0))
    batch["images"] = batch["images"].double()
    torch.manual_seed(5)
    logs = task(batch)
    torch.manual_seed(5)
    with torch.no_grad():
        state = model.start(batch["images"])
        score_T = model.reducers[0].interpreter(state.tokens)
        keep_T = torch.bernoulli(score_T) > 0
    patch_T = state.tokens.layout.is_patch_T
    loss = 0.0
    for image in range(8):
        rows = (state.tokens.layout.image_T == image) & patch_T
        rewards = []
        for decision in (keep_T[rows], score_T[rows] > 0.5):
            chosen = torch.zeros(1, 16, dtype=torch.bool)
            chosen[0, state.tokens.layout.origin_T[rows]] = decision
            from iared2.keep import Given

            model.reducers[0].rule = Given(chosen)
            with torch.no_grad():
                one = model.walk(model.start(batch["images"][image : image + 1]), 4, reduce=[0])
                right = model.adapter.head(one.tokens).argmax(1) == batch["labels"][image]
            rewards.append(1 - (decision.double().mean()) ** 2 if bool(right) else torch.tensor(-1.0))
        log_p = torch.where(keep_T[rows], score_T[rows].log(), (1 - score_T[rows]).log()).sum()
        loss -= (rewards[0] - rewards[1]) * log_p / 8
    assert logs["loss"].item() == pytest.approx(float(loss), abs=1e-6)


def test_evidence_is_the_derivative_by_mass() -> None:
    model = reduce(tiny_run.tiny_backbone(), (3,)).double().eval()
    task = WarmStartTask(model, 0, 0.5)
    task.begin()
    images = next(tiny_run.tiny_feeds().train.epoch(0))["images"].double()[:2]
    state = task.frozen_prefix({"images": images, "indices": torch.arange(2)})
    evidence_BN = scatter_places(mass_evidence(task, state), state.tokens.layout)

    def log_p(place: int, mass: float) -> torch.Tensor:
        mass_T = torch.where(state.tokens.layout.origin_T == place, mass, 1.0).double()
        heavy = replace(state, tokens=replace(state.tokens, mass_T=mass_T))
        return model.adapter.head(model.walk(heavy, 4, reduce=()).tokens).log_softmax(1).amax(1)

    with torch.no_grad():
        slope = (log_p(6, 1 + 1e-3) - log_p(6, 1 - 1e-3)) / 2e-3
    # Evidence is computed in fp32 (scores are), so the derivative agrees to fp32's accuracy.
    assert torch.allclose(evidence_BN[:, 6], slope.abs().to(evidence_BN.dtype), rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("kind", ["warm_start", "interpreter"])
def test_cached_prefixes_change_nothing(kind: str) -> None:
    results = []
    for cache in (False, True):
        model = reduce(tiny_run.tiny_backbone(), 2, on_drop="merge")
        settings = tiny_run.tiny_recipe(cache_prefix=cache).reduction
        feeds = tiny_run.tiny_feeds()
        task = build_stage(StagePlan(kind, 1, 1), model, settings, feeds, Accelerator(cpu=True)).task
        task.begin()
        batches = list(feeds.held_out.epoch(0)) * 2
        torch.manual_seed(0)
        losses = [task(batch)["loss"] for batch in batches]
        torch.stack(losses).sum().backward()
        results.append((losses, model.reducers[1].interpreter.query.weight.grad))
    (plain, slope), (cached, cached_slope) = results
    assert torch.allclose(torch.stack(plain), torch.stack(cached), atol=1e-5)
    assert torch.allclose(slope, cached_slope, atol=1e-5)


def test_warm_start_teaches_the_interpreter_the_wanted_share(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    model = reduce(tiny_run.tiny_backbone(), (2,))
    stage = Stage("warm", WarmStartTask(model, 0, 0.25), tiny_run.tiny_feeds().train, 30, OptimSettings(lr=1e-2, lr_batch=8))
    Trainer(model, RunSettings(tmp_path, "x"), accelerator).fit([stage])
    rows = list(csv.DictReader((tmp_path / "logs" / "warm.csv").open()))
    assert float(rows[-1]["keep_ratio"]) == pytest.approx(0.25, abs=0.15)
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])


def test_sharper_imitation_wants_steeper_scores_of_the_same_mean() -> None:
    """Five times the dot products fit five times the sharpness as well as plain ones fit none, but for the share's pull."""
    model = reduce(tiny_run.tiny_backbone(), (2,))
    batch = next(tiny_run.tiny_feeds().train.epoch(0))
    plain, sharp = WarmStartTask(model, 0, 0.25), WarmStartTask(model, 0, 0.25, sharpness=5.0)
    for task in (plain, sharp):
        task.begin()
    wanted = plain(batch)["loss"]
    for parameter in model.reducers[0].interpreter.query.parameters():
        parameter.data.mul_(5)
    score_BN = model.trace(batch["images"])[1].score_GBN[0]
    pull = (((score_BN - 0.5) * 20).sigmoid().mean() - 0.25).square()
    assert pull > 0.01
    assert sharp(batch)["loss"].item() == pytest.approx((wanted + pull).item(), abs=1e-5)


def test_blurred_evidence_by_hand() -> None:
    one = torch.zeros(1, 25)
    one[0, 12] = 1.0
    soft = smoothed(one, (5, 5), 1.0).view(5, 5)
    weights = torch.exp(-(torch.arange(-3, 4).float() ** 2) / 2)
    weights = (weights / weights.sum())[1:6]
    assert torch.allclose(soft, weights[:, None] * weights[None, :], atol=1e-7)
    flat = smoothed(torch.ones(1, 25), (5, 5), 1.0).view(5, 5)
    assert flat[0, 0] < flat[0, 2] < flat[2, 2] <= 1  # outside of the picture there is no evidence
    assert smoothed(one, (5, 5), 0.0) is one
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(smoothed(one, (5, 5), 1.0).view(5, 5), soft)


def test_a_copy_of_a_task_shares_its_teacher_and_what_it_remembers() -> None:
    model = reduce(tiny_run.tiny_backbone(), 2).eval()
    memory = Memory()
    tasks = [
        BlocksTask(model, 0, True, tiny_run.tiny_backbone()),
        WarmStartTask(model, 0, 0.5, cache=True),
        ImitationTask(model, (0.5, 0.5), memory),
        FineTuneTask(model, tiny_run.tiny_backbone(), memory),
    ]
    for task in tasks:
        task.begin()
        learnt = [name for name, value in task.named_parameters() if value.requires_grad]
        made = copy_of_trained(task, task.shared())
        both = dict(task.named_parameters()), dict(made.named_parameters())
        assert learnt and all((both[0][name] is not both[1][name]) == (name in learnt) for name in both[0])
        for held in ("_teacher", "_memory", "_states", "_goals", "_evidence"):
            assert getattr(made, held, None) is getattr(task, held, None)


def test_a_soft_reward_is_the_degree_of_agreement_with_the_dense_model() -> None:
    model = reduce(tiny_run.tiny_backbone(), (2,)).eval()
    batch = next(tiny_run.tiny_feeds().held_out.epoch(0))
    task = InterpreterTask(model, 0, RewardConfig(target="dense", soft=True, error_penalty=2.0))
    state = task.frozen_prefix(batch)
    scores = torch.rand(len(state.tokens.x_TD))
    for threshold in (-1.0, 0.5, 2.0):
        with torch.no_grad():
            reduction = task.reducer.apply_rule(Threshold(threshold), state.tokens, Judged(scores, scores))
            got = task._reward(state, reduction, task.dense_log_p(batch))
            p, q = model.backbone(batch["images"]).softmax(1), task.finish(state, reduction).softmax(1)
        degree = torch.exp(-(p * (p / q).log()).sum(1))
        kept = reduction.kept_B / 16
        assert torch.allclose(got, degree * (1 - kept**2) - 2 * (1 - degree), atol=1e-5)
    with pytest.raises(ValueError, match="a degree of agreement needs the dense model"):
        RewardConfig(soft=True)


def test_stages_compute_in_the_last_block_what_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the model is set to, which says what is reported; with everything kept the answers are the backbone's."""
    model = reduce(tiny_run.tiny_backbone(), (2,)).eval()
    batch, short, blocks = next(tiny_run.tiny_feeds().held_out.epoch(0)), model.adapter.attend_prefix, []
    monkeypatch.setattr(model.adapter, "attend_prefix", lambda block, tokens: (blocks.append(block), short(block, tokens))[1])
    task = InterpreterTask(model, 0, RewardConfig())
    state = task.frozen_prefix(batch)
    scores = torch.rand(len(state.tokens.x_TD))
    everything = task.reducer.apply_rule(Threshold(-1.0), state.tokens, Judged(scores, scores))
    with torch.no_grad():
        wanted = model.backbone(batch["images"])
        assert torch.allclose(task.finish(state, everything), wanted, atol=1e-5)
        assert torch.allclose(task.dense_logits(batch["images"]), wanted, atol=1e-5)
    assert blocks == 2 * [model.adapter.depth - 1] and not model.skips_unread


def test_blocks_can_be_distilled_from_the_dense_model_as_it_was(tmp_path: Path) -> None:
    """Labels that are wrong throughout do no harm, and the teacher is neither trained nor saved."""
    recipe = tiny_run.tiny_recipe(block_target="dense", block_epochs=2, warm_start_epochs=0)
    backbone = tiny_run.tiny_backbone()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    feeds = tiny_run.tiny_feeds()
    wrong = replace(feeds.train, images=replace(feeds.train.images, labels=(feeds.train.images.labels + 1) % 4))
    run = RunSettings(tmp_path, "x", log_every=1)
    model = _train_reduction(recipe.reduction, backbone, Feeds(wrong, None), run, Accelerator(cpu=True))
    dense = tiny_run.tiny_backbone().eval()
    dense.load_state_dict(before)
    images = torch.cat([batch["images"] for batch in feeds.held_out.epoch(0)])
    with torch.no_grad():
        agree = (model(images).argmax(1) == dense(images).argmax(1)).float().mean()
    assert agree > 0.8
    assert any(not torch.equal(before[name], value) for name, value in model.backbone.state_dict().items())
    assert not any("teacher" in name for name in load_file(latest_checkpoint(tmp_path) / "model.safetensors"))


def test_blocks_task_runs_with_earlier_interpreters_greedy() -> None:
    model = reduce(tiny_run.tiny_backbone(), 2)
    model.reducers[0].rule = Threshold(2.0)  # would drop everything
    task = BlocksTask(model, 1, train_head=True)
    task.begin()
    logs = task(next(tiny_run.tiny_feeds().train.epoch(0)))
    assert logs["keep_ratio"] == 0 and torch.isfinite(logs["loss"])


def finals(folder: Path) -> dict:
    checkpoint = latest_checkpoint(folder)
    assert checkpoint is not None and checkpoint.name.startswith("stage06")
    return load_file(checkpoint / "model.safetensors")


def run_to_the_end(folder: Path) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_killed_at_a_random_step_and_resumed_the_weights_are_identical(tmp_path: Path) -> None:
    run_to_the_end(tmp_path / "undisturbed")
    folder = tmp_path / "killed"
    kill_after = random.randint(2, 40)
    process = subprocess.Popen([sys.executable, str(SCRIPT), str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        rows = sum(max(0, len(path.read_text().splitlines()) - 1) for path in (folder / "logs").glob("*-[12].csv"))
        if rows >= kill_after:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    assert process.wait() == -signal.SIGKILL, "the run ended before it was killed"
    run_to_the_end(folder)
    wanted, got = finals(tmp_path / "undisturbed"), finals(folder)
    different = [name for name in wanted if not torch.equal(wanted[name], got[name])]
    assert not different, f"killed after {kill_after} rows: {different}"
    for path in sorted((tmp_path / "undisturbed" / "logs").glob("*.csv")):
        columns = ("step", "loss") if ".val" not in path.name else ("step", "top1")
        pick = [[row[c] for c in columns] for row in csv.DictReader(path.open())]
        assert pick == [[row[c] for c in columns] for row in csv.DictReader((folder / "logs" / path.name).open())], path.name


class Counting(Task):
    """Remembers which pictures each step saw."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.seen, self.epochs = nn.Parameter(torch.ones(3)), [], []

    def begin_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def forward(self, batch: dict) -> dict:
        self.seen.append(batch["indices"].tolist())
        return {"loss": self.weight.square().sum()}


@pytest.mark.parametrize(("epochs", "steps"), [(0.01, 1), (0.25, 2), (0.5, 3), (1.5, 9), (2, 12)])
def test_a_part_of_an_epoch_is_its_first_batches(epochs: float, steps: int, tmp_path: Path) -> None:
    task, feed, evaluated = Counting(), tiny_run.tiny_feeds().train, []
    stage = Stage("part", task, feed, epochs, OptimSettings(lr=1e-3, lr_batch=8), lambda: evaluated.append(len(task.seen)) or {"top1": 0.0})
    Trainer(task, RunSettings(tmp_path, "x"), Accelerator(cpu=True)).fit([stage])
    whole = [batch["indices"].tolist() for epoch in range(2) for batch in feed.epoch(epoch)]
    assert task.seen == whole[:steps]
    assert task.epochs == list(range(math.ceil(epochs))) and evaluated[-1] == steps
    assert latest_checkpoint(tmp_path).name.startswith("stage01")


class Poisoned(Task):
    """A loss that turns NaN at a given step."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.weight, self.at, self.count = nn.Parameter(torch.ones(3)), at, 0

    def forward(self, batch: dict) -> dict:
        self.count += 1
        bad = float("nan") if self.count > self.at else 1.0
        return {"loss": (self.weight * bad).square().sum()}


def test_nan_stops_with_the_step_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    task = Poisoned(at=7)
    stage = Stage("bad", task, tiny_run.tiny_feeds().train, 3, OptimSettings(lr=1e-3, lr_batch=8))
    with pytest.raises(TrainingError, match=r"stage bad, step 7: the gradient is not finite"):
        Trainer(task, RunSettings(tmp_path, "x", checkpoint_every=5), Accelerator(cpu=True)).fit([stage])
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None and checkpoint.name.endswith("step00000005")
    assert torch.isfinite(load_file(checkpoint / "model.safetensors")["weight"]).all()


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    save_checkpoint(tmp_path, model, None, Place(1, 0), "one")
    with pytest.raises(TrainingError, match="another recipe"):
        Trainer(model, RunSettings(tmp_path, "two"), Accelerator(cpu=True)).fit([])


def test_a_half_written_checkpoint_is_never_taken(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    whole = save_checkpoint(tmp_path, model, None, Place(0, 4), "x")
    for name in (".stage00-step00000009.partial", "stage00-step00000008"):
        (whole.parent / name).mkdir()
        (whole.parent / name / "model.safetensors").write_bytes(b"half")
    assert latest_checkpoint(tmp_path) == whole


def test_curriculum_is_algorithm_1() -> None:
    assert [plan.name for plan in algorithm_1(3, 10, 20)] == [
        "interpreter-1",
        "blocks-1",
        "interpreter-2",
        "blocks-2",
        "interpreter-3",
        "blocks-3",
    ]
    assert sum(plan.epochs for plan in algorithm_1(3, 10, 20)) == 90
    assert {plan.kind for plan in algorithm_1(3, 10, 0)} == {"interpreter"}


def test_schedules() -> None:
    cosine = OptimSettings()
    assert schedule_factor(cosine, 0, 10) == 1 and schedule_factor(cosine, 5, 10) == pytest.approx(0.5)
    flat = OptimSettings(schedule="trapezoid", warmup=0.1, decay=0.2)
    values = [schedule_factor(flat, step, 100) for step in range(100)]
    assert values[0] == pytest.approx(0.1) and values[10:80] == [1.0] * 70 and values[99] == pytest.approx(0.05)
    assert values == sorted(values[:50]) + sorted(values[50:], reverse=True)


def test_unknown_optimizer_is_a_clear_error(tmp_path: Path) -> None:
    stage = Stage("x", Poisoned(9), tiny_run.tiny_feeds().train, 1, OptimSettings(optimizer="adamm"))
    with pytest.raises(ConfigError, match="adam"):
        Trainer(stage.task, RunSettings(tmp_path, "x"), Accelerator(cpu=True)).fit([stage])


@pytest.mark.parametrize("baseline", ["greedy", "leave_one_out"])
def test_several_draws_of_one_image_share_the_frozen_prefix(baseline: str) -> None:
    model = reduce(tiny_run.tiny_backbone(), 2)
    batch = next(iter(tiny_run.tiny_feeds().train.epoch(0)))
    task = InterpreterTask(model, 1, RewardConfig(), estimator=EstimatorConfig(samples=3, baseline=baseline))
    task.begin()
    runs = []
    model.backbone.blocks[0].norm1.register_forward_hook(lambda *_: runs.append(1))
    logs = task(batch)
    logs["loss"].backward()
    assert len(runs) == 1
    assert ("baseline" in logs) == (baseline == "greedy")
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.reducers[1].parameters())


def test_without_a_classifier_the_reward_is_the_cosine_and_labels_are_refused() -> None:
    model = reduce(tiny_run.tiny_backbone(num_classes=0), 2).eval()
    with pytest.raises(ConfigError, match=r"has no classifier; set reward\.target=dense"):
        InterpreterTask(model, 0, RewardConfig())
    task = InterpreterTask(model, 0, RewardConfig(target="dense"))
    task.begin()
    interpreter = model.reducers[0].interpreter
    nn.init.zeros_(interpreter.query.weight)
    interpreter.query.bias.data.mul_(100)  # everything is kept
    logs = task(next(iter(tiny_run.tiny_feeds().train.epoch(0))))
    assert logs["reward"].item() == pytest.approx(0.0, abs=1e-5)  # a cosine of 1, and the cost of all patches is 1
