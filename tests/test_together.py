"""Interpreters trained together: evidence against finite differences, estimators against enumeration, stages that train what they say."""

import copy
import itertools
from dataclasses import dataclass

import pytest
import torch
from torch.nn import functional as F

import iared2
from families import FAMILIES
from iared2.errors import ConfigError
from iared2.interpreter import InterpreterConfig
from iared2.keep import Given, TopK
from iared2.reducers.baselines import AttentionReducer, RandomReducer, ToMeReducer, with_reducers
from iared2.seeds import draws_of_batch
from iared2.train.budget import _stages
from iared2.train.evidence import dense_evidence
from iared2.train.feeds import Feeds
from iared2.train.together import FineTuneTask, ImitationTask, Memory, WalkTask, repeat, share_loss
from iared2.train.together_settings import TogetherSettings, WalkSettings
from iared2.worth import WorthConfig


def model(blocks=(1, 2, 3), **settings) -> iared2.ReducedTransformer:
    torch.manual_seed(0)
    interpreter = InterpreterConfig(policy="class", context=True, init_score=0.3)
    parts = {"place": "between", "worth": WorthConfig(), "on_drop": "merge"} | settings
    reduced = iared2.reduce(FAMILIES["deit"].build(), blocks, interpreter=interpreter, **parts).eval()
    for reducer in reduced.reducers:
        if reducer.worth is not None:
            reducer.worth.offset.data.fill_(-0.7)
    return reduced


def batch(count: int = 4, labels: bool = False) -> dict[str, torch.Tensor]:
    images = FAMILIES["deit"].images(count)
    return {"images": images, "labels": torch.arange(count) % 5 if labels else torch.full((count,), -1), "indices": torch.arange(count)}


@dataclass(frozen=True)
class SameBatch:
    """Batches of one and the same batch."""

    data: dict[str, torch.Tensor]
    batch_size: int = 16

    def steps(self, world: int = 1) -> int:
        return 1

    def epoch(self, epoch: int, start: int = 0, rank: int = 0, world: int = 1):
        yield self.data


def test_evidence_is_what_the_answer_loses_to_first_order():
    """Taking a little mass from one patch in one block, by hand, through timm's own masks."""
    backbone, images = FAMILIES["deit"].build().double(), FAMILIES["deit"].images(1).double()
    reduced = iared2.reduce(backbone, (1,)).double().eval()
    evidence, output = dense_evidence(reduced, images)
    predicted = int(output.argmax())

    def answer(block: int, patch: int, mass: float) -> float:
        bias = torch.zeros(17, dtype=torch.float64)
        bias[1 + patch] = torch.tensor(mass, dtype=torch.float64).log()
        x = backbone.norm_pre(backbone._pos_embed(backbone.patch_embed(images)))
        for number, module in enumerate(backbone.blocks):
            x = module(x, attn_mask=bias.expand(1, 1, 17, 17)) if number == block else module(x)
        return float(backbone.forward_head(backbone.norm(x)).log_softmax(1)[0, predicted])

    with torch.no_grad():
        for block, patch in ((0, 3), (2, 7), (3, 11)):
            slope = (answer(block, patch, 1 + 1e-4) - answer(block, patch, 1 - 1e-4)) / 2e-4
            found = evidence.for_FBN[block, 0, patch] - evidence.against_FBN[block, 0, patch]
            assert float(found) == pytest.approx(slope, rel=1e-3, abs=1e-6)
    assert torch.equal(evidence.from_block(2, 0.5), (evidence.for_FBN[2:] + 0.5 * evidence.against_FBN[2:]).sum(0))


def test_the_share_loss_by_hand():
    """Two images, one merged token: its share is that of all patches it carries, and it stands for two."""
    reduced = model((1,))
    keep = torch.ones(2, 16, dtype=torch.bool)
    keep[1, 5] = False
    reduced.reducers[0].rule = Given(keep)
    with torch.no_grad():
        state = reduced.walk(reduced.start(batch(2)["images"]), 2)
    carrier = int(state.tokens.carrier_BN[1, 5])
    evidence_BN = torch.rand(2, 16, generator=torch.Generator().manual_seed(0))
    score_T = torch.rand(len(state.tokens.x_TD), generator=torch.Generator().manual_seed(1)) * 0.8 + 0.1
    total = 0.0
    for image, rows in enumerate((range(1, 17), range(18, 33))):
        origins = state.tokens.layout.origin_T[list(rows)].tolist()
        wanted = {o: float(evidence_BN[image, o]) for o in origins}
        found = {o: float(score_T[row]) for o, row in zip(origins, rows, strict=True)}
        if image == 1:
            wanted[carrier] += float(evidence_BN[1, 5])
            found[carrier] *= 2
        floor = 1e-3 * float(evidence_BN[image].sum()) / 16
        q = torch.tensor([wanted[o] + floor for o in origins])
        p = torch.tensor([found[o] for o in origins])
        total += F.kl_div((p / p.sum()).log(), q / q.sum(), reduction="sum").item()
    assert share_loss(score_T, state, evidence_BN).item() == pytest.approx(total / 2, rel=1e-4)


def test_imitation_learns_the_evidence_and_keeps_the_schedule():
    reduced, data = model(), batch(16)
    task = ImitationTask(reduced, (0.8, 0.5, 0.3), Memory())
    task.begin()
    task.first_look(SameBatch(data))
    assert reduced.trace(data["images"])[1].keep_ratio.mean(0).tolist() == pytest.approx([0.8, 0.5, 0.3], abs=0.01)
    before = {name: value.clone() for name, value in reduced.named_parameters()}
    optimizer = torch.optim.Adam([p for p in reduced.parameters() if p.requires_grad], lr=3e-3)
    logs = []
    for _ in range(60):
        found = task(data)
        optimizer.zero_grad()
        found["loss"].backward()
        optimizer.step()
        logs.append(found)
    assert logs[-1]["loss"] < 0.7 * logs[0]["loss"]
    assert logs[-1]["keep_ratio"].item() == pytest.approx((0.8 + 0.5 + 0.3) / 3, abs=0.03)
    changed = {name for name, value in reduced.named_parameters() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith("reducers.") for name in changed)
    _, trace = reduced.trace(data["images"])  # the threshold of one half has come to where the schedule is
    assert trace.keep_ratio.mean(0).tolist() == pytest.approx([0.8, 0.5, 0.3], abs=0.12)


def test_memory_holds_what_is_computed_anew():
    reduced, data = model(), batch()
    fresh, remembering = ImitationTask(reduced, (0.5,) * 3, None), ImitationTask(reduced, (0.5,) * 3, Memory())
    wanted = fresh.dense(data)
    remembering.look_back(data)
    data = data | {"images": torch.full_like(data["images"], float("nan"))}  # not looked at again
    found = remembering.dense(data)
    assert remembering.remembers and not fresh.remembers
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-2, atol=1e-3)
    assert torch.equal(found[1], wanted[1])


def test_blurred_evidence_is_imitated_where_asked_for():
    reduced, data = model(), batch()
    plain, _ = ImitationTask(reduced, (0.5,) * 3, None).dense(data)
    found, _ = ImitationTask(reduced, (0.5,) * 3, None, blur=1.0).dense(data)
    grid = reduced.adapter.grid(*data["images"].shape[-2:])
    middle = (grid[0] // 2, grid[1] // 2)
    # A Gaussian of one patch: a patch's own weight is 0.399 squared, a neighbour's 0.399 x 0.242, by definition.
    weights = torch.exp(-torch.arange(-3.0, 4).square() / 2)
    weights = (weights / weights.sum()).tolist()
    slow = torch.zeros(found.shape[:2])
    for down in range(-3, 4):
        for across in range(-3, 4):
            row, column = middle[0] + down, middle[1] + across
            if 0 <= row < grid[0] and 0 <= column < grid[1]:
                slow += weights[down + 3] * weights[across + 3] * plain.view(*plain.shape[:2], *grid)[:, :, row, column]
    torch.testing.assert_close(found.view(*found.shape[:2], *grid)[:, :, middle[0], middle[1]], slow)
    stages = _stages(TogetherSettings(blur=1.5), reduced, Feeds(SameBatch(data), None), 0.5, (0.5,) * 3)
    assert stages[0].task.blur == 1.5


def test_walks_are_an_unbiased_estimate_of_the_rewards_gradient(monkeypatch):
    """Two groups over few patches, every walk enumerated: the mean of leave-one-out gradients is the exact gradient.

    With K = 2 walks a and b drawn with probability p_a p_b, each pair's loss gradient is what the task returns for it.
    """
    torch.manual_seed(0)
    backbone = FAMILIES["deit"].build(img_size=16, patch_size=8).double()  # four patches
    interpreter = InterpreterConfig(policy="class", context=True, init_score=0.6)
    reduced = iared2.reduce(backbone, (2,), interpreter=interpreter, place="between", worth=WorthConfig(steepness=1.0), on_drop="merge")
    reduced = reduced.double().eval()
    data = {"images": torch.randn(1, 3, 16, 16).double(), "labels": torch.tensor([0]), "indices": torch.tensor([0])}
    task = WalkTask(reduced, WalkSettings(samples=2, price=0.4, steering=0.0), None, 0.7)
    task.begin()
    parameters = [p for p in reduced.reducers.parameters() if p.requires_grad]
    masks = [torch.tensor(bits) for bits in itertools.product([False, True], repeat=4)]

    def forced(*chosen):
        class Forced:
            def __init__(self, _spare):
                self.rule = Given(torch.stack(chosen))

            def __call__(self, score_T, layout):
                return self.rule(score_T, layout)

        monkeypatch.setattr("iared2.train.together.Sampled", Forced)

    with torch.no_grad():
        state = reduced.walk_to(reduced.start(data["images"]), 0, ())
    reducer = reduced.reducers[0]
    chance_N = reducer.judge(reducer.interpreter(state.tokens, state.class_TH), state.tokens, state.key_THK).chance_T[1:]
    p = [torch.where(mask, chance_N, 1 - chance_N).prod() for mask in masks]
    reward = []
    for mask in masks:
        forced(mask, mask)
        reward.append(task(data)["reward"].detach())
    exact = torch.autograd.grad(sum(a * r for a, r in zip(p, reward, strict=True)), parameters, allow_unused=True)
    mean = [torch.zeros_like(q) for q in parameters]
    for (i, a), (j, b) in itertools.product(enumerate(masks), repeat=2):
        forced(a, b)
        found = torch.autograd.grad(-task(data)["loss"], parameters, allow_unused=True)
        weight = p[i].detach() * p[j].detach()
        mean = [total if one is None else total + weight * one for total, one in zip(mean, found, strict=True)]
    for total, one in zip(mean, exact, strict=True):
        torch.testing.assert_close(total, torch.zeros_like(total) if one is None else one, rtol=1e-5, atol=1e-7)
    assert any(one is not None and one.abs().max() > 1e-4 for one in exact)


def test_the_price_rises_while_walks_cost_too_much_and_falls_when_they_cost_too_little():
    for share, grows in ((0.3, True), (0.99, False)):
        task = WalkTask(model(), WalkSettings(samples=2, price=0.5, steering=1.0), None, share)
        task.begin()
        task(batch())
        assert (task.price.item() > 0.5) == grows


def test_labels_are_rewarded_where_asked_for():
    reduced, data = model(), batch(labels=True)
    task = WalkTask(reduced, WalkSettings(samples=2, labels=True), None, 0.7)
    task.begin()
    for reducer in reduced.reducers:
        reducer.worth.offset.data.fill_(-50)  # nothing is dropped
    found = task(data)
    wanted = reduced.backbone(data["images"]).softmax(1).gather(1, data["labels"][:, None]).mean()
    assert found["agreement"].item() == pytest.approx(wanted.item(), rel=1e-4)


def test_repeated_states_end_where_the_single_one_does():
    reduced, data = model(), batch(3)
    with torch.no_grad():
        state = reduced.walk_to(reduced.start(data["images"]), 1, reduce=(0,))
        once = reduced.adapter.head(reduced.walk(state, 4).tokens)
        twice = reduced.adapter.head(reduced.walk(repeat(state, 2), 4, reduce=(1, 2)).tokens)
    torch.testing.assert_close(twice, torch.cat([once, once]))


def test_distilling_trains_blocks_from_the_first_reduction_on_towards_the_dense_answers():
    reduced, data = model(), batch(8)
    teacher = copy.deepcopy(reduced.backbone)
    task = FineTuneTask(reduced, teacher)
    task.begin()
    before = {name: value.clone() for name, value in reduced.named_parameters()}
    optimizer = torch.optim.Adam([p for p in reduced.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(15):
        loss = task(data)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    changed = {name for name, value in reduced.named_parameters() if not torch.equal(value, before[name])}
    later = ("blocks.1", "blocks.2", "blocks.3", "norm", "head")
    assert all(name.removeprefix("backbone.").startswith(later) for name in changed)
    assert any(name.startswith("backbone.blocks.1") for name in changed)
    assert torch.equal(teacher.head.weight, before["backbone.head.weight"])


def test_distilling_asks_the_dense_model_once_per_picture():
    reduced, data, asked = model(), batch(4), []
    teacher = copy.deepcopy(reduced.backbone).eval()
    teacher.register_forward_hook(lambda _module, images, _output: asked.append(len(images[0])))
    task = FineTuneTask(reduced, teacher, Memory())
    task.begin()
    first = task(data)["loss"]
    swapped = {name: value.flip(0) for name, value in data.items()}
    torch.testing.assert_close(task(swapped)["loss"], first)
    assert asked == [4] and task.remembers
    again = FineTuneTask(reduced, teacher, Memory())
    again.look_back(data)
    torch.testing.assert_close(again(data)["loss"], first)
    assert asked == [4, 4]


@pytest.mark.parametrize(("first", "head"), [(None, False), (3, False), (4, True), (0, True)])
def test_fine_tuning_trains_the_blocks_and_the_head_that_were_named(first, head):
    reduced = model()
    task = FineTuneTask(reduced, copy.deepcopy(reduced.backbone), None, first, head)
    task.begin()
    learns = {name for name, value in reduced.named_parameters() if value.requires_grad}
    begins = 1 if first is None else first
    wanted = [f"backbone.blocks.{block}." for block in range(begins, 4)] + ["backbone.norm.", "backbone.head."] * head
    assert all(name.startswith(tuple(wanted)) for name in learns)
    assert all(any(name.startswith(one) for name in learns) for one in wanted)


@pytest.mark.parametrize(("first", "head"), [(5, True), (4, False), (-1, True)])
def test_fine_tuning_refuses_blocks_that_are_not_there(first, head):
    with pytest.raises(ConfigError, match=f"block_first: got {first}, .* has 4 blocks; give 0 to 3"):
        FineTuneTask(model(), None, None, first, head)


def test_fine_tuning_by_labels_needs_a_classifier():
    reduced = model()
    reduced.backbone.reset_classifier(0)
    with pytest.raises(ConfigError, match=r"no classifier; set together\.block_target=dense"):
        FineTuneTask(reduced, None)


def test_fine_tuning_by_labels_is_cross_entropy_of_the_reduced_answers():
    reduced, data = model(), batch(6, labels=True)
    task = FineTuneTask(reduced, None, Memory())
    task.begin()
    assert not task.remembers
    task.look_back(data)  # nobody is asked
    with torch.no_grad():
        log_p = reduced(data["images"]).double().log_softmax(1)
    found = task(data)
    wanted = -log_p.gather(1, data["labels"][:, None]).mean()
    assert found["loss"].item() == pytest.approx(wanted.item(), rel=1e-5)
    assert found["accuracy"].item() == pytest.approx((log_p.argmax(1) == data["labels"]).double().mean().item())


# ---- baselines ------------------------------------------------------------------------------------------------


def tome_by_hand(backbone, pixels: torch.Tensor, r: int) -> torch.Tensor:
    """ToMe for one image with loops, in the block's own parts."""
    x = backbone.norm_pre(backbone._pos_embed(backbone.patch_embed(pixels[None])))[0]
    mass = [1.0] * len(x)
    for block in backbone.blocks:
        attention, y = block.attn, block.norm1(x)
        q, k, v = attention.qkv(y).view(len(x), 3, attention.num_heads, -1).unbind(1)
        weights = (torch.einsum("thk,shk->hts", q, k) * attention.scale + torch.tensor(mass).to(x).log()).softmax(-1)
        x = x + attention.proj(torch.einsum("hts,shk->thk", weights, v).flatten(1))
        metric = F.normalize(k.mean(1), dim=-1)
        even, odd = list(range(1, len(x), 2)), list(range(2, len(x), 2))
        best = sorted(((max((float(metric[a] @ metric[b]), b) for b in odd)), a) for a in even)[::-1][: min(r, len(odd))]
        rows, masses = list(x), list(mass)
        for (_, b), a in best:
            rows[b] = (rows[b] * masses[b] + x[a] * mass[a]) / (masses[b] + mass[a])
            masses[b] += mass[a]
        gone = {a for _, a in best}
        x = torch.stack([row for i, row in enumerate(rows) if i not in gone])
        mass = [m for i, m in enumerate(masses) if i not in gone]
        x = x + block.mlp(block.norm2(x))
    return backbone.forward_head(backbone.norm(x[None]))[0]


@pytest.mark.parametrize("r", [1, 3, 9])
def test_tome_is_tome(r):
    backbone, images = FAMILIES["deit"].build().double(), FAMILIES["deit"].images(3).double()
    reduced = iared2.reduce(backbone, range(4), place="between", on_drop="merge").eval()
    with_reducers(reduced, [ToMeReducer(r, 8) for _ in range(4)])
    with torch.no_grad():
        logits, trace = reduced.trace(images)
        for image, found in zip(images, logits, strict=True):
            torch.testing.assert_close(found, tome_by_hand(backbone, image, r))
    left = 16
    for ratio in trace.keep_ratio[0].tolist():
        left -= min(r, left // 2)
        assert round(16 * ratio) == left


def test_class_attention_keeps_what_the_class_token_looks_at():
    backbone, images = FAMILIES["deit"].build(), FAMILIES["deit"].images(2)
    reduced = iared2.reduce(backbone, (2,)).eval()
    with_reducers(reduced, [AttentionReducer(TopK(0.25), "discard", 32)])
    found = []
    backbone.blocks[1].attn.fused_attn = False
    backbone.blocks[1].attn.attn_drop.register_forward_hook(lambda _m, x, _y: found.append(x[0]))
    with torch.no_grad():
        backbone(images)
        _, trace = reduced.trace(images)
    best = found[0][:, :, 0, 1:]
    share = (best / best.sum(-1, keepdim=True)).mean(1).topk(4).indices.sort().values
    assert torch.equal(trace.keep_GBN[0].nonzero()[:, 1].view(2, 4), share)


def test_chance_keeps_the_share_and_differs_between_images():
    reduced = iared2.reduce(FAMILIES["deit"].build(), (0,)).eval()
    with_reducers(reduced, [RandomReducer(0.5)])
    _, trace = reduced.trace(FAMILIES["deit"].images(4))
    assert trace.keep_GBN.sum(-1).eq(8).all()
    assert len({tuple(row.tolist()) for row in trace.keep_GBN[0]}) > 1


def test_chance_is_drawn_again_alike_when_a_training_step_is_repeated():
    reduced, images = iared2.reduce(FAMILIES["deit"].build(), (0,)).eval(), FAMILIES["deit"].images(4)
    with_reducers(reduced, [RandomReducer(0.5)])

    def kept(step: int) -> torch.Tensor:
        with draws_of_batch(0, 0, step, rank=0, world=1, device=torch.device("cpu")):
            return reduced.trace(images)[1].keep_GBN

    first, other = kept(7), kept(8)
    reduced.trace(images)  # whatever was drawn in between
    assert torch.equal(kept(7), first) and not torch.equal(other, first)
