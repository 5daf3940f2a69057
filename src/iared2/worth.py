"""What a token is worth: its score, the patches it stands for, and what no better token says. Not in the paper.

A patch may go because it is no evidence, or because a kept token says the same. The score of Eq. 1 knows the first
alone. With s_i the cosine (of keys, or of tokens as the next half of the block reads them) to the most similar token of more
relevance in its image:

    relevance_i = I_i m_i                            (m_i: mass, the patches that token i stands for; 1 with mass=False)
    z_i = log(relevance_i / mean_j relevance_j) + redundancy * log(1 - s_i)
    chance_i = sigmoid(steepness * (z_i - offset))

The mean is over the image's patch tokens, so a chance compares a token with its neighbours and lies in [0, 1] whatever
the scale of the scores. `redundancy` and `offset` are learned by the same reward as the interpreter.

A patch and its most similar better one are tied. With `pairs` a tie counts only if no other tie at either of its ends is as close
(`similarity.nearest_better`), else s_i = -1: then every patch is in one pair at most, and at most half of a crowd is redundant at a
time. Attention is a vote, and where nobody counts for what is gone (discard), a crowd of which one patch is left has lost its votes.
Where tokens are merged their carrier votes for all, and pairs say no more. With `comparing` only the first few reductions look at s_i at
all, so that crowds are thinned once and their votes stay in proportion. Which of two ties is the closer a few bits do not tell, so for
pairs tokens are compared in 32 bits at least.
"""

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from iared2.settings import Settings
from iared2.similarity import Cosines, nearest_better
from iared2.tokens.packed import PackedTokens, sum_of_patches

# Where nothing is handed over crowds are thinned by pairs, and in the first two reductions alone: what is left of a crowd after these
# says by its number how much of it there is.
OF_THE_GONE = {"pairs": True, "comparing": 2}

_LEAST = 1e-6  # of a relevance or a distance, so that logarithms stay finite


class WorthConfig(Settings):
    """How keep rules weigh a score. Without it (the paper) they act on the score itself."""

    redundancy: float = Field(1.0, ge=0, description="first weight of the distance to the nearest better token; 0 leaves similarity out")
    mass: bool = Field(True, description="count a token by the patches it stands for; without, what is left follows the scores' shape")
    pairs: bool | None = Field(
        None,
        description="similarity counts within pairs alone, so that at most half of a crowd is redundant at a time; None: no, but a "
        "training from scratch says yes where what is dropped is gone",
    )
    comparing: int | None = Field(
        None,
        ge=1,
        strict=True,  # else `true` would count as 1
        description="how many reductions, from the first, look at similarity, if there are as many; the others go by relevance alone. "
        "None: all, but a training from scratch says two where what is dropped is gone and pairs are not refused",
    )
    steepness: float = Field(4.0, gt=0, description="slope of chances: how fast a token's fate is settled around the threshold")

    @model_validator(mode="after")
    def _what_is_set_is_done(self) -> "WorthConfig":
        named = [f"{name}: got {str(value).lower()}" for name, value in (("pairs", self.pairs), ("comparing", self.comparing)) if value]
        if named and not self.redundancy:
            out = ", ".join(named)
            raise ValueError(f"{out}, but with redundancy=0 nothing is compared; leave that out, or raise redundancy")
        return self

    def for_training(self, gone: bool) -> "WorthConfig":
        """These settings, with what nobody has set chosen for patches that are gone for good when they are dropped, if they are."""
        if not gone or self.pairs is False or not self.redundancy:
            return self
        return self.model_copy(update={name: value for name, value in OF_THE_GONE.items() if getattr(self, name) is None})

    def of_group(self, group: int) -> "WorthConfig":
        """The settings of one reduction, counted from 0."""
        compares = self.comparing is None or group < self.comparing
        return self if compares else self.model_copy(update={"redundancy": 0.0, "pairs": False})


def thins(worth: WorthConfig | None, gone: bool) -> bool:
    """Whether crowds are thinned: their patches are redundant in pairs, and those that are dropped are `gone`, counted for by nobody."""
    return gone and worth is not None and bool(worth.pairs)


class Worth(nn.Module):
    """Chances to be kept, from scores."""

    def __init__(self, config: WorthConfig) -> None:
        super().__init__()
        self.config = config
        # One element each, not none: FSDP divides no parameters without dimensions.
        self.redundancy = nn.Parameter(torch.tensor([config.redundancy]))
        self.offset = nn.Parameter(torch.zeros(1))

    @property
    def compares(self) -> bool:
        """Whether similarities are looked at."""
        return self.config.redundancy > 0

    def relevance(self, score_T: Float[Tensor, " T"], tokens: PackedTokens) -> Float[Tensor, " T"]:
        """A token's score times the patches that it stands for; the score alone with `mass=False`."""
        return score_T if tokens.mass_T is None or not self.config.mass else score_T * tokens.mass_T

    def forward(self, score_T: Float[Tensor, " T"], tokens: PackedTokens, cosines: Cosines | None) -> Float[Tensor, " T"]:
        """The chance of every row (of prefix rows it means nothing).

        Args:
            cosines: similarities, ordered by `relevance`; unused without redundancy.
        """
        z_T = self.logits(score_T, tokens, cosines)
        return (self.config.steepness * (z_T - self.offset)).sigmoid()

    def logits(self, score_T: Float[Tensor, " T"], tokens: PackedTokens, cosines: Cosines | None) -> Float[Tensor, " T"]:
        """z of every row."""
        layout, relevance_T = tokens.layout, self.relevance(score_T, tokens)
        patches_B = (layout.length_B - layout.prefix).clamp(min=1)
        mean_B = sum_of_patches(relevance_T, layout) / patches_B
        z_T = (relevance_T.clamp(min=_LEAST) / mean_B.clamp(min=_LEAST)[layout.image_T]).log()
        if not self.compares or cosines is None:
            return z_T
        similar_T = nearest_better(cosines, bool(self.config.pairs)).to(z_T.dtype)
        return z_T + self.redundancy * (1 - similar_T).clamp(min=_LEAST).log()
