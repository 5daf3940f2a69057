"""What a token is worth: its score, the patches it stands for, and what no better token says. Not in the paper.

A patch may go because it is no evidence, or because a kept token says the same. The score of Eq. 1 knows the first
alone. With s_i the cosine of token i's key to the most similar token of more relevance in its image:

    relevance_i = I_i m_i                            (m_i: mass, the patches that token i stands for)
    z_i = log(relevance_i / mean_j relevance_j) + redundancy * log(1 - s_i)
    chance_i = sigmoid(steepness * (z_i - offset))

The mean is over the image's patch tokens, so a chance compares a token with its neighbours and lies in [0, 1] whatever
the scale of the scores. `redundancy` and `offset` are learned by the same reward as the interpreter.
"""

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from iared2.settings import Settings
from iared2.tokens.packed import Layout, PackedTokens, sum_of_patches

_LEAST = 1e-6  # of a relevance or a distance, so that logarithms stay finite


class WorthConfig(Settings):
    """How keep rules weigh a score. Without it (the paper) they act on the score itself."""

    redundancy: float = Field(1.0, ge=0, description="first weight of the distance to the nearest better token; 0 leaves similarity out")
    steepness: float = Field(4.0, gt=0, description="slope of chances: how fast a token's fate is settled around the threshold")


class Worth(nn.Module):
    """Chances to be kept, from scores."""

    def __init__(self, config: WorthConfig) -> None:
        super().__init__()
        self.config = config
        self.redundancy = nn.Parameter(torch.tensor(config.redundancy))
        self.offset = nn.Parameter(torch.tensor(0.0))

    @property
    def compares(self) -> bool:
        """Whether similarities are looked at."""
        return self.config.redundancy > 0

    def forward(self, score_T: Float[Tensor, " T"], tokens: PackedTokens, features_TF: Float[Tensor, "T F"] | None) -> Float[Tensor, " T"]:
        """The chance of every row (of prefix rows it means nothing).

        Args:
            features_TF: what similarity is measured on; None means the tokens themselves.
        """
        z_T = self.logits(score_T, tokens, features_TF)
        return (self.config.steepness * (z_T - self.offset)).sigmoid()

    def logits(self, score_T: Float[Tensor, " T"], tokens: PackedTokens, features_TF: Float[Tensor, "T F"] | None) -> Float[Tensor, " T"]:
        """z of every row."""
        layout = tokens.layout
        relevance_T = score_T if tokens.mass_T is None else score_T * tokens.mass_T
        patches_B = (layout.length_B - layout.prefix).clamp(min=1)
        mean_B = sum_of_patches(relevance_T, layout) / patches_B
        z_T = (relevance_T.clamp(min=_LEAST) / mean_B.clamp(min=_LEAST)[layout.image_T]).log()
        if not self.compares:
            return z_T
        features_TF = tokens.x_TD if features_TF is None else features_TF
        similar_T = nearest_better(features_TF.detach(), relevance_T.detach(), layout)
        return z_T + self.redundancy * (1 - similar_T).clamp(min=_LEAST).log()

    def macs(self, entering: int, features: int) -> int:
        """Multiply-adds of comparing the patches of one image with one another, and of the norms."""
        return entering * (entering + 1) * features if self.compares else 0


def nearest_better(features_TF: Float[Tensor, "T F"], relevance_T: Float[Tensor, " T"], layout: Layout) -> Float[Tensor, " T"]:
    """Each patch row's largest cosine to a patch of more relevance in its image; -1 where there is none, and for prefix rows."""
    if layout.uniform is not None:
        images, length, prefix = layout.images, layout.uniform, layout.prefix
        patch_BPF = features_TF.view(images, length, -1)[:, prefix:]
        found_BP = _nearest(F.normalize(patch_BPF, dim=-1), relevance_T.view(images, length)[:, prefix:])
        return F.pad(found_BP, (prefix, 0), value=-1.0).reshape(-1)
    if torch.compiler.is_compiling():
        return torch.ops.iared2.nearest_better(features_TF, relevance_T, layout.cu_B1, layout.prefix, layout.longest)
    offsets = layout.offsets if features_TF.device.type == "cpu" else None  # elsewhere the host would have to wait for them
    return _nearest_ragged(features_TF, relevance_T, layout.cu_B1, layout.prefix, layout.longest, offsets)


def _nearest(unit_PF: Float[Tensor, "*B P F"], relevance_P: Float[Tensor, "*B P"]) -> Float[Tensor, "*B P"]:
    """Of two equally relevant patches the earlier one counts as better, so that copies do not vouch for each other."""
    similar_PP = unit_PF @ unit_PF.transpose(-1, -2)
    row_P = torch.arange(relevance_P.shape[-1], device=relevance_P.device)
    mine, other = relevance_P[..., :, None], relevance_P[..., None, :]
    better_PP = (other > mine) | ((other == mine) & (row_P[None, :] < row_P[:, None]))
    found_P = similar_PP.to(relevance_P.dtype).masked_fill(~better_PP, -1.0).amax(-1)
    return found_P.clamp(-1.0, 1.0)


def _nearest_ragged(
    features_TF: Tensor, relevance_T: Tensor, cu_B1: Tensor, prefix: int, longest: int, offsets: list[int] | None = None
) -> Tensor:
    if features_TF.device.type != "cpu":
        return _nearest_padded(F.normalize(features_TF, dim=-1), relevance_T, cu_B1, prefix, longest)
    found_T = relevance_T.new_full(relevance_T.shape, -1.0)
    bounds = cu_B1.tolist() if offsets is None else offsets
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        rows = slice(start + prefix, stop)
        if stop - start > prefix:
            found_T[rows] = _nearest(F.normalize(features_TF[rows], dim=-1), relevance_T[rows])
    return found_T


def _nearest_padded(unit_TF: Tensor, relevance_T: Tensor, cu_B1: Tensor, prefix: int, longest: int) -> Tensor:
    """One batched product on accelerators, where a loop over images would wait B times. Only this comparison is padded."""
    images, rows = len(cu_B1) - 1, unit_TF.shape[0]
    start_B = cu_B1[:-1].long()
    row_T = torch.arange(rows, device=unit_TF.device)
    image_T = torch.bucketize(row_T, cu_B1[1:].long(), right=True)
    within_T = row_T - start_B[image_T]
    flat_T = image_T * longest + within_T
    padded = unit_TF.new_zeros(images * longest, unit_TF.shape[1]).index_copy(0, flat_T, unit_TF).view(images, longest, -1)
    # Prefix rows and padding are never better than anybody.
    own_T = relevance_T.masked_fill(within_T < prefix, float("-inf"))
    relevance = relevance_T.new_full((images * longest,), float("-inf")).index_copy(0, flat_T, own_T).view(images, longest)
    found_T = _nearest(padded, relevance).view(-1)[flat_T]
    return torch.where(within_T < prefix, -1.0, found_T)


@torch.library.custom_op("iared2::nearest_better", mutates_args=())
def _nearest_op(features_TF: Tensor, relevance_T: Tensor, cu_B1: Tensor, prefix: int, longest: int) -> Tensor:
    """`nearest_better` as one opaque operator, so that compiled graphs need not know the lengths."""
    return _nearest_ragged(features_TF, relevance_T, cu_B1, prefix, longest)


@_nearest_op.register_fake
def _nearest_shape(features_TF: Tensor, relevance_T: Tensor, cu_B1: Tensor, prefix: int, longest: int) -> Tensor:
    return torch.empty_like(relevance_T)
