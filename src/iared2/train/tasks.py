"""The stages of Algorithm 1 as tasks: REINFORCE for one interpreter, cross-entropy for the blocks behind it."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from iared2.errors import ConfigError
from iared2.handover import Judged
from iared2.keep import Sampled, Threshold
from iared2.model import ReducedTransformer
from iared2.reducers.base import Reduction
from iared2.reducers.iared2 import InterpreterReducer
from iared2.reward import EstimatorConfig, RewardConfig, advantages, entropy, log_probability, policy_gradient_loss, reward
from iared2.runtime import mean_of_all
from iared2.tokens.packed import join, split, sum_of_patches
from iared2.train.trainer import Task
from iared2.walk import State


class GroupTask(Task):
    """What the stages of one group share: the model, the group, and forward passes that stop or go on there."""

    def __init__(self, model: ReducedTransformer, group: int, cache: bool = False) -> None:
        super().__init__()
        self.model, self.group = model, group
        self.first_block = model.config.first_blocks[group]
        self._states: dict[int, State] | None = {} if cache else None
        self._goals: dict[int, Tensor] = {}

    @property
    def reducer(self) -> InterpreterReducer:
        return self.model.reducers[self.group]

    @property
    def remembers(self) -> bool:
        return self._states is not None

    def look_back(self, batch: dict[str, Tensor]) -> None:
        self.frozen_prefix(batch)

    def shared(self) -> list[object]:
        return [self._states, self._goals]

    def frozen_prefix(self, batch: dict[str, Tensor]) -> State:
        """The state in front of the group's reducer; earlier interpreters decide greedily. Stores no gradient.

        With `cache`, each picture's state is computed once: right only where pictures are not augmented.
        """
        indices = batch["indices"].tolist()
        if self._states is not None and all(index in self._states for index in indices):
            return join_states([self._states[index] for index in indices])
        state = self.compute_prefix(batch["images"])
        if self._states is not None:
            self._states.update(zip(indices, split_state(state), strict=True))
        return state

    @torch.no_grad()
    def compute_prefix(self, images: Float[Tensor, "B C height width"]) -> State:
        """The state in front of the group's reducer, computed anew."""
        state = self.model.walk_to(self.model.start(images), self.group, reduce=range(self.group))
        for reduction in state.reductions:
            self.finite(reduction.score_T)
        return state

    def dense_log_p(self, batch: dict[str, Tensor]) -> Float[Tensor, "B classes"]:
        """The dense model's log-probabilities for each picture (its embedding, without a classifier), remembered where states are."""
        indices = batch["indices"].tolist()
        if self._states is not None and all(index in self._goals for index in indices):
            return torch.stack([self._goals[index] for index in indices])
        found = self.dense_logits(batch["images"])
        found = found.log_softmax(1) if self.model.num_classes else found
        if self._states is not None:
            self._goals.update(zip(indices, found, strict=True))
        return found

    def needs_classifier(self, setting: str) -> None:
        """Says in one line that labels cannot be asked of an embedding.

        Raises:
            ConfigError: the model has no classifier.
        """
        if not self.model.num_classes:
            raise ConfigError(f"{setting}: got label, but this model has no classifier; set {setting}=dense")

    @staticmethod
    def finite(score_T: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """An interpreter's scores as they are.

        Raises:
            FloatingPointError: one is not finite; drawing from them or a threshold would fail or, worse, drop everything.
        """
        if not score_T.isfinite().all():
            raise FloatingPointError("the interpreter's scores are not finite")
        return score_T

    def judge(self, state: State) -> Judged:
        """What the group's rule acts on in front of its reducer, with gradients.

        Raises:
            FloatingPointError: chances are not finite.
        """
        score_T = self.reducer.interpreter(state.tokens, state.class_TH)
        judged = self.reducer.judge(score_T, state.tokens, state.key_THK)
        self.finite(judged.chance_T)
        return judged

    def finish(self, state: State, reduction: Reduction) -> Float[Tensor, "B classes"]:
        """Logits after a reduction; later groups keep everything, as the curriculum has it."""
        state = self.model.finish(self.model.after_reduction(state, reduction), reduce=(), skip_unread=True)
        return self.model.adapter.head(state.tokens).float()

    @torch.no_grad()
    def dense_logits(self, images: Float[Tensor, "B C height width"]) -> Float[Tensor, "B classes"]:
        """Logits of the backbone with nothing dropped."""
        state = self.model.finish(self.model.start(images), reduce=(), skip_unread=True)
        return self.model.adapter.head(state.tokens).float()


class ScoringTask(GroupTask):
    """A stage that trains the group's interpreter alone."""

    def begin(self) -> None:
        self.model.requires_grad_(False).eval()
        self.reducer.requires_grad_(True)


class InterpreterTask(ScoringTask):
    """REINFORCE for interpreter j (Eq. 2 and 3); everything else is frozen.

    The sampled and the greedy pass share one frozen prefix, and no gradient is stored for the backbone: the
    only differentiable part is the score. Decisions already taken by earlier interpreters are greedy.

    Args:
        estimator: how many masks are drawn per image, and what their rewards are compared with; None is the paper's.

    Raises:
        ConfigError: labels are asked for, but the model has no classifier.
    """

    def __init__(
        self,
        model: ReducedTransformer,
        group: int,
        config: RewardConfig,
        entropy_bonus: float = 0.0,
        cache: bool = False,
        estimator: EstimatorConfig | None = None,
    ) -> None:
        super().__init__(model, group, cache)
        if config.target == "label":
            self.needs_classifier("reward.target")
        self.config, self.entropy_bonus, self.estimator = config, entropy_bonus, estimator or EstimatorConfig()

    def look_back(self, batch: dict[str, Tensor]) -> None:
        super().look_back(batch)
        if self.config.target == "dense":
            self.dense_log_p(batch)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        state = self.frozen_prefix(batch)
        layout = state.tokens.layout
        goal = batch["labels"] if self.config.target == "label" else self.dense_log_p(batch)
        judged = self.judge(state)
        chance_T = judged.chance_T
        rule, times = Sampled(self.model.adapter.needs_patch), self.estimator.samples
        with torch.no_grad():
            draws = [self.reducer.apply_rule(rule, state.tokens, judged.detach()) for _ in range(times)]
            reward_KB = torch.stack([self._reward(state, draw, goal) for draw in draws])
            logs = self._greedy(state, judged.detach(), goal) if self.estimator.baseline == "greedy" else {}
        keeps = [torch.zeros_like(layout.is_patch_T).index_fill(0, draw.chosen.index_S, True) for draw in draws]
        log_p_KB = torch.stack([sum_of_patches(log_probability(chance_T, keep_T), layout) for keep_T in keeps])
        entropy_T = entropy(chance_T)[layout.is_patch_T]
        advantage_KB = advantages(reward_KB, logs.pop("greedy_B", None), self.estimator)
        loss = policy_gradient_loss(log_p_KB.flatten(), advantage_KB.flatten()) - self.entropy_bonus * mean_of_all(entropy_T)
        kept = torch.stack([draw.kept_B for draw in draws]).float().mean()
        return {"loss": loss, "reward": reward_KB.mean(), "keep_ratio": kept / layout.places, **logs, "entropy": entropy_T.mean()}

    def _greedy(self, state: State, judged: Judged, goal: Tensor) -> dict[str, Tensor]:
        """The greedy choice's rewards, and what to log of it."""
        rule = Threshold(0.5, self.model.adapter.needs_patch)
        greedy = self.reducer.apply_rule(rule, state.tokens, judged)
        reward_B = self._reward(state, greedy, goal)
        share = greedy.kept_B.float().mean() / greedy.before.places
        return {"greedy_B": reward_B, "baseline": reward_B.mean(), "greedy_keep_ratio": share}

    def _reward(self, state: State, reduction: Reduction, goal: Tensor) -> Float[Tensor, " B"]:
        layout = reduction.before
        entering_B = reduction.entering_B
        patches_B = torch.full_like(entering_B, layout.places) if self.config.patches == "input" else entering_B
        return reward(self._correct(self.finish(state, reduction), goal), reduction.kept_B, patches_B, self.config)

    def _correct(self, logits: Float[Tensor, "B classes"], goal: Tensor) -> Float[Tensor, " B"]:
        """Whether, or to which degree, a reduced answer is right. The goal is labels, or the dense model's answer."""
        if not self.model.num_classes:
            return F.cosine_similarity(logits, goal, dim=1)
        if self.config.soft:
            return (-F.kl_div(logits.log_softmax(1), goal, reduction="none", log_target=True).sum(1)).exp()
        return (logits.argmax(1) == (goal if goal.ndim == 1 else goal.argmax(1))).float()


class BlocksTask(GroupTask):
    """Cross-entropy for the blocks of groups j..D with interpreters 1..j frozen and greedy.

    With a `teacher` (the dense model as it was), distillation from its answers takes the place of labels.
    Patch embedding, positions and prefix tokens stay fixed (section 3.2). The final norm and the head are
    trained too if `train_head` (Algorithm 1 leaves them alone).
    """

    def __init__(self, model: ReducedTransformer, group: int, train_head: bool, teacher: nn.Module | None = None) -> None:
        super().__init__(model, group)
        if teacher is None:
            self.needs_classifier("block_target")
        self.train_head = train_head
        self._teacher = (teacher,)  # in a tuple: no part of this module, and so neither trained nor saved

    def shared(self) -> list[object]:
        return [*super().shared(), self._teacher]

    def trainable(self) -> set[str]:
        """Names of the backbone's parameters that this stage trains."""
        fixed = self.model.adapter.frozen_parameters()
        names = {name for name, _ in self.model.backbone.named_parameters()} - fixed
        blocks = {n for n in names if n.startswith("blocks.") and int(n.split(".")[1]) >= self.first_block}
        return blocks | ({n for n in names if not n.startswith("blocks.")} if self.train_head else set())

    def begin(self) -> None:
        self.model.requires_grad_(False).eval()
        chosen = self.trainable()
        for name, parameter in self.model.backbone.named_parameters():
            parameter.requires_grad_(name in chosen)
        self.model.backbone.train()

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        state = self.frozen_prefix(batch)
        with torch.no_grad():
            reduction = self.reducer(state.tokens, state.key_THK, state.class_TH)
            self.finite(reduction.score_T)
        logits = self.finish(state, reduction)
        (dense,) = self._teacher
        if dense is None:
            loss = F.cross_entropy(logits, batch["labels"])
        else:
            with torch.no_grad():
                goal = dense(batch["images"]).float()
            loss = distance(logits, goal, self.model.num_classes)
        logs = {"loss": loss, "keep_ratio": reduction.kept_B.float().mean() / reduction.before.places}
        if self.model.num_classes:
            logs["accuracy"] = (logits.argmax(1) == batch["labels"]).float().mean()
        return logs


def distance(logits: Float[Tensor, "B classes"], goal: Float[Tensor, "B classes"], classes: int) -> Float[Tensor, ""]:
    """How far answers are from another model's: KL(goal || logits) in nats, mean over images; 1 - cosine without a classifier."""
    if not classes:
        return 1 - F.cosine_similarity(logits, goal, dim=1).mean()
    return F.kl_div(logits.log_softmax(1), goal.log_softmax(1), reduction="batchmean", log_target=True)


def split_state(state: State) -> list[State]:
    """One paused state per image; what earlier groups decided is no longer in it."""
    offsets = state.tokens.layout.offsets
    bounds = list(zip(offsets[:-1], offsets[1:], strict=True))
    keys, logits = ([None if x is None else x[a:b] for a, b in bounds] for x in (state.key_THK, state.class_TH))
    packs = split(state.tokens)
    return [replace(state, tokens=t, key_THK=k, class_TH=c, reductions=()) for t, k, c in zip(packs, keys, logits, strict=True)]


def join_states(states: list[State]) -> State:
    """The reverse of `split_state`."""
    keys, logits = ([x for x in values if x is not None] for values in zip(*((s.key_THK, s.class_TH) for s in states), strict=True))
    tokens, key_THK, class_TH = join([s.tokens for s in states]), torch.cat(keys) if keys else None, torch.cat(logits) if logits else None
    return replace(states[0], tokens=tokens, key_THK=key_THK, class_TH=class_TH, reductions=())
