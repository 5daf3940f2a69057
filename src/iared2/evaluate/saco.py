"""SaCo (Wu et al., CVPR 2024, "On the Faithfulness of Vision Transformer Explanations"): does what matters more cost more?"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from iared2.evaluate.judge import Answers
from iared2.evaluate.removal import rank_of, zero
from iared2.tokens.grid import to_pixels

GROUPS = 10


def saco(
    map_Bhw: Float[Tensor, "B h w"],
    images: Float[Tensor, "B C H W"],
    model: Answers,
    class_B: Int[Tensor, " B"] | None = None,
    groups: int = GROUPS,
) -> Float[Tensor, " B"]:
    """Salience-guided faithfulness coefficient of each map, in [-1, 1].

    Pixels are ordered by the map and cut into K groups of equal size. One group at a time is replaced by the picture's mean colour; of
    every pair of groups the more salient one should cost the class at least as much probability. Pairs are weighted by the difference of
    their salience, signed by whether they keep this order, and divided by the sum of the weights. Salience of a group is its mean and not
    its sum, which is the same but for groups that differ by one pixel.

    Args:
        images: raw, pixels in [0, 1].
        class_B: the explained class; None: the one that the model names.

    Returns:
        One value per map; 0 for a map that is the same everywhere, whose pairs have no weight.
    """
    rank_BHW = rank_of(map_Bhw, (images.shape[2], images.shape[3]))
    logit_BK = model(images)
    class_B1 = (logit_BK.argmax(1) if class_B is None else class_B.to(logit_BK.device))[:, None]
    whole_B = logit_BK.softmax(1).gather(1, class_B1)[:, 0]
    value_BHW = to_pixels(map_Bhw.double(), (images.shape[2], images.shape[3])).to(rank_BHW.device)
    mean = images.mean((2, 3), keepdim=True)
    pixels = rank_BHW[0].numel()
    salience, cost = [], []
    for group in range(groups):
        inside_BHW = (rank_BHW >= group * pixels // groups) & (rank_BHW < (group + 1) * pixels // groups)
        salience.append((value_BHW * inside_BHW).sum((1, 2)) / inside_BHW.sum((1, 2)))
        inside_BHW = inside_BHW.to(images.device)
        left_B = model(zero(images, inside_BHW) + mean * inside_BHW[:, None]).softmax(1).gather(1, class_B1)[:, 0]
        cost.append((whole_B - left_B).double().cpu())
    return coefficient(torch.stack(salience, dim=1).cpu(), torch.stack(cost, dim=1))


def coefficient(salience_BG: Float[Tensor, "B G"], cost_BG: Float[Tensor, "B G"]) -> Float[Tensor, " B"]:
    """The coefficient from groups in order of salience, most first, and what removing each costs."""
    weight_BGG = (salience_BG[:, :, None] - salience_BG[:, None, :]).triu(1)
    right_BGG = cost_BG[:, :, None] >= cost_BG[:, None, :]
    total_B = weight_BGG.abs().sum((1, 2))
    signed_B = torch.where(right_BGG, weight_BGG, -weight_BGG).sum((1, 2))
    # Rounding may leave differences in a map that is the same everywhere: they weigh nothing.
    some_B = total_B > 1e-9 * salience_BG.abs().amax(1)
    return torch.where(some_B, signed_B / torch.where(some_B, total_B, 1.0), 0.0)
