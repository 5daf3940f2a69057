"""Eq. 2 and Eq. 3 as pure functions.

Eq. 2:  R(u) = 1 - (|u|_0 / N)^p if the prediction is correct, else -tau      (p = 2 in the paper; 1 in Table 8)
Eq. 3:  grad J = E_u[ A grad sum_i log(I_i u_i + (1 - I_i)(1 - u_i)) ],  A = R(u) - R(u_greedy)
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from iared2.settings import Settings


class RewardConfig(Settings):
    """What an interpreter is rewarded for. Table 8 varies `error_penalty` (tau) and `shape`."""

    error_penalty: float = Field(1.5, description="tau of Eq. 2")
    shape: Literal["square", "linear"] = Field("square", description="power of the kept share in Eq. 2")
    target: Literal["label", "dense"] = Field("label", description="correct = the label, or the dense model's prediction")
    soft: bool = Field(False, description="with target=dense: correct to the degree exp(-KL to the dense model), not yes or no")
    patches: Literal["input", "group"] = Field("input", description="N of Eq. 2: the image's patches, or those entering the group")

    @model_validator(mode="after")
    def _degrees_need_the_dense_model(self) -> "RewardConfig":
        if self.soft and self.target != "dense":
            raise ValueError("soft: a degree of agreement needs the dense model; set target=dense")
        return self


class EstimatorConfig(Settings):
    """How the gradient of the expected reward is estimated. The defaults are the paper's: one draw against the greedy choice."""

    samples: int = Field(1, ge=1, description="draws per image, K")
    baseline: Literal["greedy", "leave_one_out"] = Field("greedy", description="the greedy choice's reward, or the mean of the other draws")
    normalise_advantage: bool = Field(False, description="divide advantages by their standard deviation over the batch")

    @model_validator(mode="after")
    def _others_are_needed(self) -> "EstimatorConfig":
        if self.baseline == "leave_one_out" and self.samples < 2:
            raise ValueError(f"baseline: leave_one_out compares a draw with the others; got samples={self.samples}, wanted 2 or more")
        return self


def advantages(reward_KB: Float[Tensor, "K B"], greedy_B: Float[Tensor, " B"] | None, config: EstimatorConfig) -> Float[Tensor, "K B"]:
    """R(u) minus a baseline that does not depend on u, for K draws of each of B images.

    Args:
        greedy_B: the rewards of the greedy choices; None with leave-one-out.
    """
    if config.baseline == "leave_one_out" or greedy_B is None:
        draws = len(reward_KB)
        found_KB = (reward_KB - reward_KB.mean(0)) * draws / (draws - 1)  # R_k minus the mean of the others
    else:
        found_KB = reward_KB - greedy_B
    return found_KB / found_KB.std().clamp(min=1e-6) if config.normalise_advantage and found_KB.numel() > 1 else found_KB


def reward(
    correct_B: Bool[Tensor, " B"] | Float[Tensor, " B"], kept_B: Int[Tensor, " B"], patches_B: Int[Tensor, " B"], config: RewardConfig
) -> Float[Tensor, " B"]:
    """Eq. 2 for each image.

    Args:
        correct_B: true or 1 where the prediction is correct, 0 where not; a degree in between gives the mean of the two cases.
        kept_B: |u|_0, the patches that the interpreter keeps.
        patches_B: N.
    """
    share = kept_B / patches_B.clamp(min=1)
    cost = share.square() if config.shape == "square" else share
    degree = correct_B.to(cost.dtype)
    return degree * (1 - cost) - (1 - degree) * config.error_penalty


def log_probability(score_T: Float[Tensor, " T"], keep_T: Bool[Tensor, " T"]) -> Float[Tensor, " T"]:
    """log of the Bernoulli probability of each decision: the bracket of Eq. 3 for u in {0, 1}.

    Written as a binary cross-entropy, whose logarithms are clamped: a score of exactly 0 or 1 stays finite.
    """
    exact_T = score_T.to(torch.promote_types(score_T.dtype, torch.float32))
    return -F.binary_cross_entropy(exact_T, keep_T.to(exact_T.dtype), reduction="none")


def policy_gradient_loss(log_probability_B: Float[Tensor, " B"], advantage_B: Float[Tensor, " B"]) -> Float[Tensor, ""]:
    """A loss whose gradient is minus the estimator of Eq. 3, averaged over images.

    Args:
        log_probability_B: summed over the image's decisions.
        advantage_B: R(u) minus a baseline that does not depend on u; treated as a constant.
    """
    return -(advantage_B.detach() * log_probability_B).mean()


def entropy(score_T: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
    """Entropy of each decision in nats."""
    p = score_T.float().clamp(1e-6, 1 - 1e-6)
    return -(p * p.log() + (1 - p) * (1 - p).log())
