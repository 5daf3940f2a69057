"""How much of a map lies inside ground-truth boxes, against maps that know nothing: uniform and a centred Gaussian."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from iared2.data.arrays import ImageArrays, Preprocess, plain_batch
from iared2.errors import DataError
from iared2.model import ReducedTransformer
from iared2.tokens.grid import gaussian, to_pixels


@dataclass(frozen=True)
class BoxReport:
    """Mean shares inside the boxes, and paired differences with their 95 % half-widths.

    Attributes:
        share: of the model's map, uniform and Gaussian, in percent.
        ahead: of uniform and Gaussian: (mean difference, half-width of its 95 % interval), in points.
        pictures: how many counted (those with a box and a map that is not all zero).
    """

    share: dict[str, float]
    ahead: dict[str, tuple[float, float]]
    pictures: int


def inside(map_Bhw: Float[Tensor, "B h w"], box_B4: Int[Tensor, "B 4"]) -> Float[Tensor, " B"]:
    """The share of each map's sum within its box (x0, y0, x1, y1, inclusive pixels)."""
    height, width = map_Bhw.shape[1:]
    x, y = torch.arange(width), torch.arange(height)
    across_BW = (x >= box_B4[:, :1]) & (x <= box_B4[:, 2:3])
    down_BH = (y >= box_B4[:, 1:2]) & (y <= box_B4[:, 3:])
    kept = map_Bhw * (down_BH[:, :, None] & across_BW[:, None, :])
    return kept.sum((1, 2)) / map_Bhw.sum((1, 2)).clamp(min=1e-9)


@torch.inference_mode()
def score_boxes(
    model: ReducedTransformer, arrays: ImageArrays, how: Preprocess, group: int = 1, progress: Callable[[int], None] | None = None
) -> BoxReport:
    """Measures a group's heatmap on pictures with boxes; maps are up-sampled to the pictures' pixels."""
    if arrays.boxes is None:
        raise DataError("boxes: these pictures have none; the validation part of a Tiny-ImageNet folder has")
    model.eval()
    height, width = arrays.pixels.shape[1:3]
    shares: dict[str, list[Tensor]] = {"model": [], "uniform": [], "gaussian": []}
    for start in range(0, len(arrays), 100):
        rows = slice(start, start + 100)
        _, trace = model.trace(plain_batch(arrays.pixels[rows], how))
        boxes = arrays.boxes[rows]
        maps = to_pixels(trace.heatmap(group), (height, width))
        shares["model"].append(inside(maps, boxes))
        shares["uniform"].append(inside(torch.ones_like(maps), boxes))
        shares["gaussian"].append(inside(gaussian(height, width).expand_as(maps), boxes))
        if progress is not None:
            progress(len(maps))
    found = {name: torch.cat(parts).double() for name, parts in shares.items()}
    ahead = {}
    for name in ("uniform", "gaussian"):
        difference = found["model"] - found[name]
        ahead[name] = (100 * float(difference.mean()), 196 * float(difference.std()) / len(difference) ** 0.5)
    return BoxReport({name: 100 * float(value.mean()) for name, value in found.items()}, ahead, len(arrays))
