"""All interpreters at once, along one walk: imitation of the dense model's evidence, then REINFORCE on whole walks.

The paper's curriculum (`tasks`) trains one interpreter after the other. With many small reductions that takes as many
stages; here every reduction of a walk is a decision of one policy, rewarded by where the walk ends.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from iared2 import cost
from iared2.errors import ConfigError
from iared2.evaluate.calibrate import Calibrator
from iared2.keep import Sampled
from iared2.model import ReducedTransformer
from iared2.reward import EstimatorConfig, advantages, entropy, log_probability
from iared2.runtime import mean_of_all, mean_over_ranks
from iared2.tokens.grid import smoothed
from iared2.tokens.packed import scatter_places, sum_of_patches
from iared2.train.evidence import dense_evidence
from iared2.train.tasks import GroupTask, distance, join_states, split_state
from iared2.train.together_settings import WalkSettings
from iared2.train.trainer import Batches, Task
from iared2.walk import State

FIRST_PICTURES = 256  # that chances are set by before the first step
FOLLOWING = 0.5  # how far an offset moves for a share that is off by one

_LEAST = 1e-8


@dataclass
class Memory:
    """What was computed once for a picture and holds for the whole run: evidence per group, and the dense model's output."""

    evidence: dict[int, Tensor] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)

    def outputs_of(self, indices: Sequence[int]) -> Tensor | None:
        """The dense model's outputs for these pictures, if all of them are known."""
        known = all(index in self.outputs for index in indices)
        return torch.stack([self.outputs[index].float() for index in indices]) if known else None


class TogetherTask(Task):
    """What the stages share: which parameters learn, and what the dense model says of a picture.

    Args:
        memory: shared by the stages of a run; None where pictures are augmented, and so never the same.
        against: how much evidence against the predicted class counts.
        blur: a patch counts by the evidence around it as well: standard deviation in patches of a Gaussian blur.
    """

    def __init__(self, model: ReducedTransformer, memory: Memory | None, against: float = 0.3, blur: float = 0.0) -> None:
        super().__init__()
        self.model, self.against, self.blur = model, against, blur
        self._memory = memory

    def begin(self) -> None:
        self.model.requires_grad_(False).eval()
        self.model.reducers.requires_grad_(True)

    @property
    def remembers(self) -> bool:
        return self._memory is not None

    def look_back(self, batch: dict[str, Tensor]) -> None:
        self.dense(batch)

    def shared(self) -> list[object]:
        return [self._memory]

    def output(self, batch: dict[str, Tensor]) -> Float[Tensor, "B C"]:
        """The dense model's output alone; where it is not remembered, one forward pass."""
        if self._memory is not None:
            return self.dense(batch)[1]
        with torch.no_grad():
            return self.model.backbone(batch["images"]).float()

    def dense(self, batch: dict[str, Tensor]) -> tuple[Float[Tensor, "G B N"], Float[Tensor, "B C"]]:
        """Evidence for each group on the grid, and the dense model's output."""
        indices, memory = batch["indices"].tolist(), self._memory
        if memory is not None and (known := memory.outputs_of(indices)) is not None:
            return torch.stack([memory.evidence[index].float() for index in indices], dim=1), known
        evidence, output = dense_evidence(self.model, batch["images"])
        first = 1 if self.model.config.place == "between" else 0  # the block's own attention has run by then
        blocks = [min(block + first, self.model.adapter.depth - 1) for block in self.model.config.first_blocks]
        grid = self.model.adapter.grid(batch["images"].shape[-2], batch["images"].shape[-1])
        found = torch.stack([smoothed(evidence.from_block(block, self.against), grid, self.blur) for block in blocks])
        if memory is not None:
            # bfloat16 has the range of evidence; outputs are rewarded by their last digits.
            memory.evidence.update(zip(indices, found.bfloat16().unbind(1), strict=True))
            memory.outputs.update(zip(indices, output.unbind(0), strict=True))
        return found, output


class ImitationTask(TogetherTask):
    """Each interpreter learns how the dense model's evidence is shared among the tokens it sees.

    Along the walk the share I_i m_i / sum_j I_j m_j of a token should be its share of the evidence on all patches that it
    carries: the Kullback-Leibler divergence between the two is the loss. `ratios` says how much each group leaves meanwhile, on
    average over pictures; chances are moved so that their threshold leaves that much (without a worth there is nothing to move, and
    thresholds stay where the first pictures put them).
    """

    def __init__(
        self, model: ReducedTransformer, ratios: Sequence[float], memory: Memory | None, against: float = 0.3, blur: float = 0.0
    ) -> None:
        super().__init__(model, memory, against, blur)
        self.ratios = tuple(ratios)

    def begin(self) -> None:
        super().begin()
        for reducer in self.model.reducers:
            if reducer.worth is not None:
                reducer.worth.requires_grad_(False)

    def first_look(self, batches: Batches) -> None:
        """Chances are moved once to where the first pictures leave the wanted shares; which process reads them does not matter."""
        device = next(self.model.parameters()).device
        pictures: list[Tensor] = []
        for batch in batches.epoch(0):
            pictures.append(batch["images"].to(device))
            if sum(map(len, pictures)) >= FIRST_PICTURES:
                break
        calibrator = Calibrator(self.model, pictures)
        calibrator.thresholds_for(self.ratios)
        calibrator.settle()

    @torch.no_grad()
    def _reduce(self, state: State, group: int, score_T: Tensor) -> tuple[State, Tensor]:
        """Keeps what the threshold keeps, and moves chances towards the wanted share, which a batch as a whole should leave."""
        reducer, score_T = self.model.reducers[group], score_T.detach()
        judged = reducer.judge(score_T, state.tokens, state.key_THK)
        reduction = reducer.apply_rule(reducer.rule, state.tokens, judged)
        left = mean_over_ranks(reduction.kept_B.float().mean() / reduction.before.places)
        if reducer.worth is not None:  # no parameter that gradients keep equal between ranks
            reducer.worth.offset.add_(FOLLOWING * (left - self.ratios[group]))
        return self.model.after_reduction(state, reduction), left

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        evidence_GBN, _ = self.dense(batch)
        with torch.no_grad():
            state = self.model.start(batch["images"])
        losses, kept = [], []
        for group, reducer in enumerate(self.model.reducers):
            with torch.no_grad():
                state = self.model.walk_to(state, group, reduce=())
            score_T = GroupTask.finite(reducer.interpreter(state.tokens, state.class_TH))
            losses.append(share_loss(score_T, state, evidence_GBN[group]))
            state, left = self._reduce(state, group, score_T)
            kept.append(left)
        return {
            "loss": torch.stack(losses).sum(),
            "divergence": torch.stack(losses).mean().detach(),
            "keep_ratio": torch.stack(kept).mean(),
        }


def share_loss(score_T: Float[Tensor, " T"], state: State, evidence_BN: Float[Tensor, "B N"]) -> Float[Tensor, ""]:
    """KL from the tokens' shares of relevance to their shares of the evidence, mean over images."""
    tokens, layout = state.tokens, state.tokens.layout
    relevance_T = score_T if tokens.mass_T is None else score_T * tokens.mass_T
    carrier_BN = tokens.carrier_BN
    spare = layout.places
    carried_BN = evidence_BN.new_zeros(len(evidence_BN), spare + 1).scatter_add(
        1, torch.where(carrier_BN >= 0, carrier_BN, spare), evidence_BN
    )
    wanted_BN = carried_BN[:, :spare] + 1e-3 * carried_BN[:, :spare].mean(1, keepdim=True)
    here_BN = scatter_places(torch.ones_like(score_T), layout) > 0
    wanted_BN = torch.where(here_BN, wanted_BN, 0.0)
    wanted_BN = wanted_BN / wanted_BN.sum(1, keepdim=True).clamp(min=_LEAST)
    found_BN = scatter_places(relevance_T, layout)
    found_BN = found_BN / found_BN.sum(1, keepdim=True).clamp(min=_LEAST)
    return F.kl_div((found_BN + _LEAST).log(), wanted_BN, reduction="batchmean")


@dataclass
class Drawn:
    """A walk in which every reduction drew: where it ended, and what led there. B images, G groups."""

    state: State
    log_p_B: Float[Tensor, " B"]
    kept_GB: list[Tensor]
    entropy: list[Tensor]


class WalkTask(TogetherTask):
    """REINFORCE on whole walks: every reduction draws, and the image's reward is known at the end.

    The reward of a walk is its agreement with the dense model (exp(-KL), or the cosine of embeddings; with `labels` the
    probability of the right class) minus `price` times its share of the dense multiply-adds. K walks share the part in front of
    the first reduction; each is compared with the others of its image (leave-one-out, an unbiased baseline). The price rises
    while walks cost more than `share` and falls while they cost less, so that the budget is met without a penalty to tune.
    """

    def __init__(self, model: ReducedTransformer, settings: WalkSettings, memory: Memory | None, share: float) -> None:
        super().__init__(model, memory)
        self.settings, self.share = settings, share
        self.estimator = EstimatorConfig(
            samples=settings.samples, baseline="leave_one_out", normalise_advantage=settings.normalise_advantage
        )
        # In the model, so that checkpoints hold it.
        model.reducers.register_buffer("price", torch.tensor(settings.price))

    @property
    def price(self) -> Tensor:
        return self.model.reducers.price

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        output = self.output(batch)
        size, times = (batch["images"].shape[-2], batch["images"].shape[-1]), self.settings.samples
        with torch.no_grad():
            start = self.model.walk_to(self.model.start(batch["images"]), 0, reduce=())
        drawn = self._draw(repeat(start, times))
        with torch.no_grad():
            degree = self._degree(drawn.state, output, batch["labels"])
            share = self._shares(drawn.kept_GB, size).to(degree)
            reward_KB = (degree - self.price * share).view(times, -1)
            advantage_KB = advantages(reward_KB, None, self.estimator)
            self._steer(share.mean())
        entropy_mean = torch.stack(drawn.entropy).mean()
        loss = -(advantage_KB.flatten() * drawn.log_p_B).mean() - self.settings.entropy_bonus * entropy_mean
        return {
            "loss": loss,
            "reward": reward_KB.mean(),
            "agreement": degree.mean(),
            "macs_share": share.mean(),
            "price": self.price.clone(),
            "entropy": entropy_mean.detach(),
        }

    def _draw(self, state: State) -> Drawn:
        rule, log_p, entropies, kept = Sampled(self.model.adapter.needs_patch), [], [], []
        for group, reducer in enumerate(self.model.reducers):
            with torch.no_grad():
                state = self.model.walk_to(state, group, reduce=())
            layout = state.tokens.layout
            score_T = GroupTask.finite(reducer.interpreter(state.tokens, state.class_TH))
            judged = reducer.judge(score_T, state.tokens, state.key_THK)
            with torch.no_grad():
                reduction = reducer.apply_rule(rule, state.tokens, judged.detach())
                keep_T = torch.zeros_like(layout.is_patch_T).index_fill(0, reduction.chosen.index_S, True)
                state = self.model.after_reduction(state, reduction)
            log_p.append(sum_of_patches(log_probability(judged.chance_T, keep_T), layout))
            entropies.append(mean_of_all(entropy(judged.chance_T)[layout.is_patch_T]))
            kept.append(reduction.kept_B)
        return Drawn(state, torch.stack(log_p).sum(0), kept, entropies)

    def _degree(self, state: State, output: Float[Tensor, "B C"], label_B: Tensor) -> Float[Tensor, " KB"]:
        state = self.model.finish(state, reduce=())
        found = self.model.adapter.head(state.tokens).float()
        if self.settings.labels:
            return found.softmax(1).gather(1, label_B.repeat(self.settings.samples)[:, None]).squeeze(1)
        return agreement(found, output.repeat(self.settings.samples, 1), self.model.num_classes)

    def _shares(self, kept_GB: Sequence[Tensor], size: tuple[int, int]) -> Float[Tensor, " KB"]:
        rows, columns = self.model.adapter.grid(*size)
        dense = cost.dense_macs(self.model.adapter, *size)

        @cache
        def share(lengths: tuple[int, ...]) -> float:
            return self.model.macs(size, rows * columns, lengths) / dense

        return torch.tensor([share(tuple(row)) for row in torch.stack(list(kept_GB), dim=1).tolist()])

    def _steer(self, share: Float[Tensor, ""]) -> None:
        """One step of the price towards the budget, at most a tenth, the same on every rank."""
        self.price.mul_((self.settings.steering * (mean_over_ranks(share) - self.share)).clamp(-0.1, 0.1).exp())


def agreement(found: Float[Tensor, "B C"], dense: Float[Tensor, "B C"], classes: int) -> Float[Tensor, " B"]:
    """exp(-KL) to the dense model's answer; without a classifier, the cosine of the embeddings."""
    if not classes:
        return F.cosine_similarity(found, dense, dim=1)
    return (-F.kl_div(found.log_softmax(1), dense.log_softmax(1), reduction="none", log_target=True).sum(1)).exp()


def repeat(state: State, times: int) -> State:
    """The same paused state `times` times behind one another."""
    return state if times == 1 else join_states([one for _ in range(times) for one in split_state(state)])


class FineTuneTask(Task):
    """The blocks learn to do with fewer tokens; interpreters are frozen and greedy.

    With a `teacher` (the dense model as it was) they learn its answers: KL, or 1 - cosine without a classifier. Without one
    they learn labels: cross-entropy, as in the paper. Patch embedding, positions and prefix tokens stay fixed (section 3.2);
    blocks before the first reduction see what they always saw, and stay too.

    Args:
        memory: keeps the teacher's answers; None where pictures are augmented, and so never the same.
        first_block: the first block that learns, from 0; None is the first that reduces, the number of blocks leaves all as they are.
        train_head: final norm and head learn too (Algorithm 1 leaves them alone).

    Raises:
        ConfigError: no such block, nothing is left to learn, or labels are to be learnt without a classifier.
    """

    def __init__(
        self,
        model: ReducedTransformer,
        teacher: nn.Module | None,
        memory: Memory | None = None,
        first_block: int | None = None,
        train_head: bool = True,
    ) -> None:
        super().__init__()
        if teacher is None and not model.num_classes:
            raise ConfigError("together.block_target: got label, but this model has no classifier; set together.block_target=dense")
        self.model, self._memory = model, None if teacher is None else memory
        self._teacher = (teacher,)  # in a tuple: no part of this module, and so neither trained nor saved
        self.first_block = model.config.first_blocks[0] if first_block is None else first_block
        self.train_head = train_head
        depth = model.adapter.depth
        if not 0 <= self.first_block <= depth or not self.trainable():
            raise ConfigError(
                f"together.block_first: got {self.first_block}, with together.train_head={str(train_head).lower()}, but this backbone has "
                f"{depth} blocks; give 0 to {depth - 1}" + (f", or {depth} for norm and head alone" if train_head else "")
            )

    def trainable(self) -> set[str]:
        """Names of the backbone's parameters that learn."""
        names = {name for name, _ in self.model.backbone.named_parameters()} - self.model.adapter.frozen_parameters()
        blocks = {name for name in names if name.startswith("blocks.")}
        later = {name for name in blocks if int(name.split(".")[1]) >= self.first_block}
        return later | (names - blocks if self.train_head else set())

    def begin(self) -> None:
        self.model.requires_grad_(False).eval()
        chosen = self.trainable()
        for name, parameter in self.model.backbone.named_parameters():
            parameter.requires_grad_(name in chosen)

    @property
    def remembers(self) -> bool:
        return self._memory is not None

    def look_back(self, batch: dict[str, Tensor]) -> None:
        (teacher,) = self._teacher
        if teacher is not None:
            self._wanted(batch, teacher)

    def shared(self) -> list[object]:
        return [self._memory, self._teacher]

    @torch.no_grad()
    def _wanted(self, batch: dict[str, Tensor], teacher: nn.Module) -> Float[Tensor, "B C"]:
        """The dense model's output."""
        indices = batch["indices"].tolist()
        if self._memory is not None and (known := self._memory.outputs_of(indices)) is not None:
            return known
        output = teacher(batch["images"]).float()
        if self._memory is not None:
            self._memory.outputs.update(zip(indices, output.unbind(0), strict=True))
        return output

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        (teacher,) = self._teacher
        if teacher is None:
            found = self.model.logits(batch["images"]).float()
            accuracy = (found.argmax(1) == batch["labels"]).float().mean()
            return {"loss": F.cross_entropy(found, batch["labels"]), "accuracy": accuracy}
        output = self._wanted(batch, teacher)
        found = self.model.logits(batch["images"]).float()
        loss = distance(found, output, self.model.num_classes)
        return {"loss": loss, "agreement": agreement(found.detach(), output, self.model.num_classes).mean()}
