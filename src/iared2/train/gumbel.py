"""Straight-through Gumbel (appendix D): the interpreter is trained by the loss's own gradient instead of REINFORCE.

This is the one place in the library where a mask stands for dropping. The gradient of a decision that was "drop" asks what the
patch would have given, so the patch must still be there: the pass is dense, and a dropped patch is one of nearly no mass. Mass
enters attention as log(mass) (`tokens/attention.py`), so a weight is m_i e^(s_i) / sum_j m_j e^(s_j): at m_i -> 0 it is the weight of
the really shortened sequence, while its derivative by m_i stays finite. Costs, held-out figures and every later stage come from
passes that really drop.

On the paper's sign. Appendix D discards the patches of *higher* softmax value, "due to the fact that, in Gumbel method, the background
region tends to have higher softmax value". Eq. 1 is closed under I -> 1 - I (turn the sign of F_q), so to discard the higher values of
one interpreter is to discard the lower ones of its mirror image. Here a score is always the chance to be *kept*, the loss settles
which patches get high ones, and a map of scores reads as everywhere else: high is kept. A map made from the paper's raw values
is 1 minus ours; read without turning it over, it highlights what the model threw away, which is what the paper saw.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from iared2.model import ReducedTransformer
from iared2.seeds import uniform_per_image
from iared2.tokens.packed import Layout, sum_of_patches
from iared2.train.gumbel_settings import GumbelSettings
from iared2.train.tasks import ScoringTask, distance
from iared2.walk import State

NOTHING = 1e-12  # the mass of a dropped patch: a weight that fp32 still carries, and that no logit brings back


class GumbelTask(ScoringTask):
    """Trains one group's interpreter through a masked dense pass; everything else is frozen.

    The loss is the cross-entropy of the masked answer, or its distance to the dense model's, plus `settings.kept_weight` times
    the share of patches kept (of all patches of the image, as N in Eq. 2).

    Args:
        target: "label" or "dense".

    Raises:
        ConfigError: the target is labels, and the backbone has no classifier.
    """

    def __init__(self, model: ReducedTransformer, group: int, settings: GumbelSettings, target: str = "label", cache: bool = False) -> None:
        super().__init__(model, group, cache)
        if target == "label":
            self.needs_classifier("reward.target")
        self.settings, self.target = settings, target

    def look_back(self, batch: dict[str, Tensor]) -> None:
        super().look_back(batch)
        if self.target == "dense":
            self.dense_log_p(batch)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        state = self.frozen_prefix(batch)
        layout = state.tokens.layout
        score_T = self.judge(state).chance_T
        keep_T = straight_through(score_T, layout, self.settings.temperature)
        logits = self.masked(state, keep_T)
        if self.target == "label":
            error = F.cross_entropy(logits, batch["labels"])
        else:
            error = distance(logits, self.dense_log_p(batch), self.model.num_classes)
        kept = sum_of_patches(keep_T, layout).mean() / layout.places
        greedy = sum_of_patches((score_T > 0.5).float(), layout).mean() / layout.places
        loss = error + self.settings.kept_weight * kept
        return {"loss": loss, "error": error.detach(), "keep_ratio": kept.detach(), "greedy_keep_ratio": greedy}

    def masked(self, state: State, keep_T: Float[Tensor, " T"]) -> Float[Tensor, "B classes"]:
        """Logits where row i counts `keep_T[i]` times as a key; prefix rows count once. Later groups keep everything."""
        tokens = state.tokens
        mass_T = torch.where(tokens.layout.is_patch_T, keep_T, 1.0)
        mass_T = mass_T if tokens.mass_T is None else mass_T * tokens.mass_T
        masked = replace(state, tokens=replace(tokens, mass_T=mass_T), key_THK=None, class_TH=None)
        end = self.model.walk(masked, self.model.adapter.depth, reduce=())
        return self.model.adapter.head(end.tokens).float()


def straight_through(score_T: Float[Tensor, " T"], layout: Layout, temperature: float) -> Float[Tensor, " T"]:
    """Decisions drawn with chance `score_T`: 1 or `NOTHING` going forward, the relaxed decision's gradient going back.

    The difference of two Gumbel draws is logistic, so one logistic draw per patch decides between keeping and dropping
    (Jang et al. 2017, "Categorical Reparameterization with Gumbel-Softmax", for two classes).

    Args:
        temperature: of the relaxed decision; lower is nearer to the hard one and noisier in its gradient.
    """
    chance_T = score_T.clamp(1e-6, 1 - 1e-6)
    uniform_BN = uniform_per_image(layout.images, layout.places, chance_T.device)  # so that the number of ranks changes nothing
    draw_T = (
        torch.rand_like(chance_T) if uniform_BN is None else uniform_BN[layout.image_T, layout.origin_T.clamp(min=0)].to(chance_T.dtype)
    )
    draw_T = draw_T.clamp(1e-6, 1 - 1e-6)
    logit_T = chance_T.log() - (-chance_T).log1p() + draw_T.log() - (-draw_T).log1p()
    relaxed_T = (logit_T / temperature).sigmoid()
    hard_T = torch.where(logit_T > 0, 1.0, NOTHING).to(score_T.dtype)
    return hard_T + (relaxed_T - relaxed_T.detach())  # the bracket is exactly 0, so that NOTHING is not rounded away
