"""Warm start: an interpreter first imitates the dense model's own evidence, then REINFORCE takes over.

The paper starts REINFORCE from scratch, which takes millions of images. The evidence here is exact and cheap:
in every later block a token of mass m counts m times in attention, so d log p(c) / d m_i at m = 1 is, to first
order, what class c gains or loses if patch i leaves that block. One backward pass gives it for all patches
and blocks.
"""

from dataclasses import replace
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from iared2.keep import share_of
from iared2.model import ReducedTransformer
from iared2.runtime import mean_of_all, mean_over_ranks
from iared2.tokens.grid import smoothed
from iared2.tokens.packed import join, scatter_places
from iared2.train.evidence import gain_of
from iared2.train.tasks import GroupTask, ScoringTask
from iared2.train.trainer import Batches
from iared2.walk import State

_STEEP = 20.0  # slope of the smooth step at one half by which a share of scores is steered


class WarmStartTask(ScoringTask):
    """Binary cross-entropy towards the patches with the most evidence: the best `ratio` of the grid, per image.

    Args:
        ratio: share of the grid that counts as wanted.
        sharpness: scores are this many times as steep as the chance that a patch is wanted. At 1 a score is that
            chance; most patches are hard to call, so scores then crowd around the threshold. If it is above 1,
            the share of scores above one half is pulled to `ratio`, which chances alone would not reach.
        blur: a patch counts by the evidence around it as well: standard deviation in patches of a Gaussian blur, which
            finds no evidence outside of the picture. Evidence is noisy, objects are of one piece.
    """

    def __init__(
        self, model: ReducedTransformer, group: int, ratio: float, sharpness: float = 1.0, blur: float = 0.0, cache: bool = False
    ) -> None:
        super().__init__(model, group, cache)
        self.ratio, self.sharpness, self.blur = ratio, sharpness, blur
        self._evidence: dict[int, Tensor] = {}

    def first_look(self, batches: Batches) -> None:
        """Interpreters that start as class attention are brought to the wanted share on the first pictures."""
        interpreter = self.reducer.interpreter
        if interpreter.config.start == "attention":
            device = next(interpreter.parameters()).device
            first = islice(batches.epoch(0), max(1, 256 // batches.batch_size))
            # Not through the cache: a resumed run does not come by here, and must compute the same in the loop's precision.
            states = [self.compute_prefix(batch["images"].to(device)) for batch in first]
            interpreter.sharpen(self.sharpness)
            interpreter.shift_to(self.ratio, join([state.tokens for state in states]))

    def shared(self) -> list[object]:
        return [*super().shared(), self._evidence]

    def look_back(self, batch: dict[str, Tensor]) -> None:
        self.evidence(batch, self.frozen_prefix(batch))

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        state = self.frozen_prefix(batch)
        layout = state.tokens.layout
        evidence_BN = self.evidence(batch, state)
        here_BN = scatter_places(torch.ones_like(layout.origin_T), layout) > 0
        count = share_of(self.ratio, layout.places)
        best = evidence_BN.masked_fill(~here_BN, float("-inf")).topk(count, dim=1).indices
        wanted_BN = torch.zeros_like(evidence_BN).scatter_(1, best, 1.0)
        logit_TH = self.reducer.interpreter.logits(state.tokens, state.class_TH)
        score_BN = scatter_places(self.finite(logit_TH.sigmoid().mean(-1)), layout)
        chance_BN = scatter_places((logit_TH / self.sharpness).sigmoid().mean(-1), layout)
        loss = mean_of_all(F.binary_cross_entropy(chance_BN[here_BN], wanted_BN[here_BN], reduction="none"))
        if self.sharpness > 1:
            above_BN = torch.where(here_BN, ((score_BN - 0.5) * _STEEP).sigmoid(), 0.0)  # a step with a slope
            share = above_BN.mean()
            gap = mean_over_ranks(share.detach()) - self.ratio
            loss = loss + gap.square() + 2 * gap * (share - share.detach())  # the gradient, on average over ranks, of the whole batch's gap
        agree = ((score_BN > 0.5) == (wanted_BN > 0.5))[here_BN].float().mean()
        keep_ratio = ((score_BN > 0.5) & here_BN).float().mean()
        return {"loss": loss, "agreement": agree, "keep_ratio": keep_ratio}

    def evidence(self, batch: dict[str, Tensor], state: State) -> Float[Tensor, "B N"]:
        """Evidence on the grid, computed once per picture where states are cached."""
        indices = batch["indices"].tolist()
        if self._states is not None and all(index in self._evidence for index in indices):
            return torch.stack([self._evidence[index] for index in indices])
        layout = state.tokens.layout
        found_BN = smoothed(scatter_places(mass_evidence(self, state), layout), layout.grid, self.blur)
        if self._states is not None:
            self._evidence.update(zip(indices, found_BN, strict=True))
        return found_BN


def mass_evidence(task: GroupTask, state: State) -> Float[Tensor, " T"]:
    """Sum over later blocks of |d log p(predicted class) / d mass in that block|, for every row.

    Taken block by block, because effects of opposite sign in different blocks would cancel.
    """
    model, leaves = task.model, []
    with torch.enable_grad():
        for block in range(state.block, model.adapter.depth):
            mass_T = state.tokens.mass_T
            base_T = torch.ones_like(state.tokens.x_TD[:, 0]) if mass_T is None else mass_T
            leaves.append(base_T.detach().float().requires_grad_())
            weighted = replace(state, tokens=replace(state.tokens, mass_T=leaves[-1]))
            state = model.run_block(weighted, block)
            state = replace(state, tokens=replace(state.tokens, mass_T=mass_T))
        gain = gain_of(model.adapter.head(state.tokens).float(), model.num_classes).sum()
        return torch.stack([g.abs() for g in torch.autograd.grad(gain, leaves)]).sum(0)
