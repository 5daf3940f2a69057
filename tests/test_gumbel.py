"""Other ways to train an interpreter than the paper's: straight-through Gumbel, several samples, models without a classifier."""

from pathlib import Path

import pytest
import timm
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch.nn import functional as F

import tiny_run
from iared2.curriculum import StagePlan
from iared2.errors import ConfigError
from iared2.handover import Judged
from iared2.keep import Given
from iared2.model import reduce
from iared2.reward import EstimatorConfig, RewardConfig
from iared2.seeds import draws_of_batch
from iared2.tokens.packed import pack, scatter_places
from iared2.train.gumbel import NOTHING, GumbelTask, straight_through
from iared2.train.gumbel_settings import GumbelSettings
from iared2.train.recipes import Recipe
from iared2.train.run import RunOptions, build_stage, train
from iared2.train.tasks import BlocksTask, InterpreterTask
from iared2.train.trainer import RunSettings, Trainer


def batch() -> dict:
    return next(tiny_run.tiny_feeds().train.epoch(0))


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_the_masked_pass_is_the_really_dropped_pass(pool: str) -> None:
    arguments = {"global_pool": pool, "class_token": pool == "token"}
    model = reduce(tiny_run.tiny_backbone(drop_path_rate=0.0, **arguments), 2).eval()
    task = GumbelTask(model, 1, GumbelSettings())
    with torch.no_grad():
        state = task.frozen_prefix(batch())
        score_T = torch.rand(len(state.tokens.x_TD))
        keep_T = straight_through(score_T, state.tokens.layout, 1.0)
        keep_BN = scatter_places((keep_T > 0.5).long(), state.tokens.layout) > 0
        assert 0.2 < keep_BN.float().mean() < 0.8
        reduction = model.reducers[1].apply_rule(Given(keep_BN), state.tokens, Judged(score_T, score_T))
        dropped, masked = task.finish(state, reduction), task.masked(state, keep_T)
        dense = task.masked(state, torch.ones_like(keep_T))
    assert torch.allclose(masked, dropped, atol=1e-6)
    assert not torch.allclose(masked, dense, atol=1e-4)


def test_straight_through_draws_hard_and_learns_soft() -> None:
    layout = pack(torch.zeros(4, 5001, 1), 1, (5000,)).layout
    score_T = torch.full((20004,), 0.3, requires_grad=True)
    keep_T = straight_through(score_T, layout, 0.5)
    assert set(keep_T.tolist()) == {1.0, torch.tensor(NOTHING).item()}
    assert (keep_T > 0.5).float().mean().item() == pytest.approx(0.3, abs=0.01)
    keep_T.sum().backward()
    assert (score_T.grad >= 0).all() and score_T.grad.mean() > 0.5  # none where the draw was far from the other side


def test_a_picture_draws_the_same_whichever_rank_holds_it() -> None:
    score_T = torch.full((4 * 101,), 0.5)
    whole, half = (pack(torch.zeros(images, 101, 1), 1, (100,)).layout for images in (4, 2))
    with draws_of_batch(7, rank=0, world=1, device=torch.device("cpu")):
        alone = straight_through(score_T, whole, 1.0).view(4, 101)
    for rank in (0, 1):
        with draws_of_batch(7, rank=rank, world=2, device=torch.device("cpu")):
            assert torch.equal(straight_through(score_T[:202], half, 1.0).view(2, 101)[:, 1:], alone[rank::2, 1:])


@pytest.mark.parametrize("target", ["label", "dense"])
def test_gradients_reach_the_interpreter_alone(target: str) -> None:
    model = reduce(tiny_run.tiny_backbone(), 2)
    task = GumbelTask(model, 1, GumbelSettings(kept_weight=0.0), target)
    task.begin()
    logs = task(batch())
    logs["loss"].backward()
    assert all(p.grad is None for p in model.backbone.parameters())
    gradient = model.reducers[1].interpreter.query.weight.grad
    assert gradient.isfinite().all() and gradient.abs().max() > 1e-7
    assert logs["loss"].item() == pytest.approx(logs["error"].item())


def test_a_price_on_patches_lowers_their_number(tmp_path: Path) -> None:
    model = reduce(tiny_run.tiny_backbone(), (2,))
    changes = {"groups": (2,), "warm_start_epochs": 0, "interpreter_method": "gumbel", "gumbel": {"kept_weight": 20.0}}
    settings = tiny_run.tiny_recipe(**changes).reduction
    stage = build_stage(StagePlan("interpreter", 0, 6), model, settings, tiny_run.tiny_feeds(), Accelerator(cpu=True))
    assert isinstance(stage.task, GumbelTask)
    before = model.eval().trace(batch()["images"])[1].keep_ratio.mean().item()
    Trainer(model, RunSettings(tmp_path, "x"), Accelerator(cpu=True)).fit([stage])
    assert model.eval().trace(batch()["images"])[1].keep_ratio.mean().item() < before - 0.3
    logs = stage.task(batch())
    assert logs["loss"].item() == pytest.approx((logs["error"] + 20 * logs["keep_ratio"]).item(), rel=1e-5)


def test_gumbel_wants_what_its_mask_stands_for() -> None:
    with pytest.raises(ValueError, match=r"got 'gumbel' with on_drop='merge'.*set on_drop=discard"):
        tiny_run.tiny_recipe(interpreter_method="gumbel", on_drop="merge")


@pytest.mark.parametrize("baseline", ["greedy", "leave_one_out"])
def test_samples_share_one_prefix_and_leave_one_out_needs_no_greedy_pass(baseline: str) -> None:
    model = reduce(tiny_run.tiny_backbone(), 2)
    task = InterpreterTask(model, 1, RewardConfig(), estimator=EstimatorConfig(samples=3, baseline=baseline))
    task.begin()
    calls = {"embed": 0, "head": 0}
    for name in calls:
        original = getattr(model.adapter, name)
        setattr(model.adapter, name, lambda x, n=name, f=original: (calls.__setitem__(n, calls[n] + 1), f(x))[1])
    logs = task(batch())
    assert calls == {"embed": 1, "head": 4 if baseline == "greedy" else 3}
    assert ("baseline" in logs) == (baseline == "greedy")


def test_without_a_classifier_the_reward_is_the_cosine_to_the_own_embedding() -> None:
    model = reduce(tiny_run.tiny_backbone(num_classes=0), (2,)).eval()
    task, examples = InterpreterTask(model, 0, RewardConfig(target="dense", error_penalty=2.0)), batch()
    state = task.frozen_prefix(examples)
    with torch.no_grad():
        keep_BN = torch.rand(8, 16) < 0.4
        score_T = torch.rand(len(state.tokens.x_TD))
        reduction = task.reducer.apply_rule(Given(keep_BN), state.tokens, Judged(score_T, score_T))
        got = task._reward(state, reduction, task.dense_log_p(examples))
        cosine = F.cosine_similarity(task.finish(state, reduction), model.backbone(examples["images"]), dim=1)
    assert cosine.std() > 1e-4
    wanted = cosine * (1 - keep_BN.float().mean(1) ** 2) - 2 * (1 - cosine)
    assert torch.allclose(got, wanted, atol=1e-5)


def test_labels_asked_of_an_embedding_are_refused_in_one_line(tmp_path: Path) -> None:
    model = reduce(tiny_run.tiny_backbone(num_classes=0), 2)
    for build in (
        lambda: InterpreterTask(model, 0, RewardConfig()),
        lambda: BlocksTask(model, 0, train_head=False),
        lambda: GumbelTask(model, 0, GumbelSettings()),
    ):
        with pytest.raises(ConfigError, match=r"got label, but this model has no classifier; set \w") as caught:
            build()
        assert "\n" not in str(caught.value)
    weights = tmp_path / "weights.safetensors"
    save_file(timm.create_model("iared2_mini_patch8_64", num_classes=0).state_dict(), weights)
    chosen = {"model": "iared2_mini_patch8_64", "arguments": {"num_classes": 0}, "weights": str(weights)}
    with pytest.raises(ConfigError, match=r"data.labels: got true, but this backbone has no classifier"):
        train(Recipe.model_validate(tiny_run.tiny_recipe().model_dump() | {"backbone": chosen}), RunOptions(tmp_path, "cpu"))


def test_every_stage_trains_an_embedding(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    model = reduce(tiny_run.tiny_backbone(num_classes=0), 2)
    teacher = tiny_run.tiny_backbone(num_classes=0).eval().requires_grad_(False)
    settings = tiny_run.tiny_recipe(reward={"target": "dense"}, block_target="dense").reduction
    plans = [StagePlan(kind, 1, 1) for kind in ("warm_start", "interpreter", "blocks")]
    stages = [build_stage(plan, model, settings, tiny_run.tiny_feeds(), accelerator, teacher) for plan in plans]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Trainer(model, RunSettings(tmp_path, "x"), accelerator).fit(stages)
    assert any(not torch.equal(before[name], value) for name, value in model.state_dict().items() if name.startswith("reducers.1"))
    assert 0.5 < stages[-1].evaluate()["cosine"] <= 1.0001
