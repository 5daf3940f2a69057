"""What each group keeps, against object masks: the numbers behind the paper's Figure 4, which it shows in pictures only.

The paper says that the first group keeps nearly all, the second the object, the third its parts, and that pictures with more background
have more redundancy. Per picture and group:

| figure | what it is |
|---|---|
| kept | the keep ratio: patches with a token of their own after the group / all patches |
| inside | share of what is kept that lies on the object |
| of_object | share of the object that is kept |
| of_rest | share of the background that is kept |

Beside them the object's share of the picture: chance keeps as much of the object as that. A patch counts by its pixels, those on the object
and those off it; pixels to ignore do not count. A token counts once, at its own place, however many patches it carries: a patch that was
merged into another place is not kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from iared2.data.arrays import normalise
from iared2.data.masks import MaskedBatch, MaskedImages
from iared2.errors import DataError
from iared2.evaluate.bootstrap import drawn, interval, means, resamples
from iared2.evaluate.randomised import rank_correlation
from iared2.evaluate.removal import on_grid
from iared2.evaluate.segment import SegmentOptions
from iared2.evaluate.shards import Explainer, Shard, ShardedMethods
from iared2.model import ReducedTransformer
from iared2.trace import Trace

PARTS = ("kept", "inside", "of_object", "of_rest")
OURS = "ours"


@dataclass(frozen=True)
class KeptRow:
    """What one model kept of n pictures, or why there is nothing to say.

    Attributes:
        area_N: the object's share of each picture, in [0, 1].
        part_NG: by the names in `PARTS`, per picture and group, in [0, 1]; NaN where a picture has none (no object, or nothing kept).
        seed: of the bootstrap.
    """

    method: str
    area_N: Float[Tensor, " N"] = field(default_factory=lambda: torch.zeros(0), repr=False)
    part_NG: dict[str, Float[Tensor, "N G"]] = field(default_factory=dict, repr=False)
    seed: int = 0
    why: str | None = None

    @property
    def images(self) -> int:
        return len(self.area_N)

    @property
    def groups(self) -> int:
        return self.part_NG["kept"].shape[1]

    def means(self) -> dict[str, list[float]]:
        """The mean over pictures of each part, per group, in percent."""
        everyone = torch.ones(1, self.images, dtype=torch.float64)
        return {name: (100 * means(value_NG, everyone)[0]).tolist() for name, value_NG in self.part_NG.items()}

    def intervals(self) -> dict[str, list[tuple[float, float]]]:
        """95 % intervals of the same (bootstrap over pictures)."""
        weight_DN = resamples(self.images, self.seed)
        return {
            name: [interval(column_D) for column_D in (100 * means(value_NG, weight_DN)).unbind(1)]
            for name, value_NG in self.part_NG.items()
        }

    def correlations(self) -> Float[Tensor, " G"]:
        """Spearman's rank correlation of keep ratio and object's area, per group; NaN where either is the same for all pictures."""
        return self._correlations(torch.arange(self.images)[None])[:, 0]

    def drawn_correlations(self) -> Float[Tensor, "G D"]:
        """The same of every resample of the pictures; one seed draws the same pictures for every model that saw as many."""
        return self._correlations(drawn(self.images, self.seed))

    def _correlations(self, rows_DN: Int[Tensor, "D N"]) -> Float[Tensor, "G D"]:
        area_D1N = self.area_N[rows_DN][:, None]
        return torch.stack([rank_correlation(area_D1N, kept_N[rows_DN][:, None]) for kept_N in self.part_NG["kept"].unbind(1)])


class Kept(ShardedMethods[MaskedImages, MaskedBatch, KeptRow]):
    """One model and one set of pictures with masks. `run([OURS])` gives its row.

    Args:
        records: folder for finished shards; None keeps them for as long as this object lives.

    Raises:
        DataError: no pictures, or masks without a single object.
    """

    def __init__(
        self, model: ReducedTransformer, data: MaskedImages, options: SegmentOptions | None = None, records: Path | None = None
    ) -> None:
        self.options = options or SegmentOptions()
        super().__init__(model, data, _itself, self.options, records)
        if not len(data):
            raise DataError("masks: there are no pictures")
        data.require_foreground(self.how.size)

    def deciding(self) -> tuple[Any, ...]:
        return ("what groups keep",)

    def read(self, data: MaskedImages, rows: range) -> MaskedBatch | None:
        return data.batch(rows, self.how.size, self.options.workers)

    def score(self, name: str, batch: MaskedBatch, seed: int) -> tuple[dict[str, list[Any]], float]:
        del name, seed
        parameter = next(self.model.parameters())
        images = normalise(batch.pixels_BHW3, self.how.mean, self.how.std).to(parameter.device, parameter.dtype)
        with torch.inference_mode():
            trace = self.model.trace(images)[1].cpu()
        area_B, part_BG = kept_on_objects(trace, batch.mask_BHW, batch.ignore_BHW)
        return {"area": area_B.tolist(), **{part: value_BG.tolist() for part, value_BG in part_BG.items()}}, 0.0

    def row(self, explainer: Explainer, name: str, shards: list[Shard]) -> KeptRow:
        del explainer
        joined = {key: torch.tensor(_joined(shards, key), dtype=torch.float64) for key in ("area", *PARTS)}
        return KeptRow(name, joined.pop("area"), joined, self.options.seed)

    def no_row(self, name: str, slow: bool, why: str) -> KeptRow:
        del slow
        return KeptRow(name, why=why)


def kept_on_objects(
    trace: Trace, mask_BHW: Bool[Tensor, "B H W"], ignore_BHW: Bool[Tensor, "B H W"]
) -> tuple[Float[Tensor, " B"], dict[str, Float[Tensor, "B G"]]]:
    """The object's share of each picture, and `PARTS` per picture and group, all in [0, 1].

    Args:
        mask_BHW, ignore_BHW: at the size of the model's input.
    """
    grid = (trace.grid[0], trace.grid[1])
    on_BN = on_grid((mask_BHW & ~ignore_BHW).double(), grid).flatten(1)
    off_BN = on_grid((~mask_BHW & ~ignore_BHW).double(), grid).flatten(1)
    keep_BGN = trace.keep_GBN.transpose(0, 1).double()
    on_BG, off_BG = (keep_BGN @ part_BN[:, :, None] for part_BN in (on_BN, off_BN))
    on_BG, off_BG = on_BG[..., 0], off_BG[..., 0]
    on_B1, off_B1 = on_BN.sum(1, keepdim=True), off_BN.sum(1, keepdim=True)
    parts = {"kept": keep_BGN.mean(-1), "inside": on_BG / (on_BG + off_BG), "of_object": on_BG / on_B1, "of_rest": off_BG / off_B1}
    return (on_B1 / (on_B1 + off_B1))[:, 0], parts  # 0 / 0 is NaN, which takes no part in means


def _joined(shards: Sequence[Shard], key: str) -> list[Any]:
    return [one for shard in shards for one in shard.found[key]]


@dataclass
class _Itself:
    """The model as its own explainer: how many groups kept each patch."""

    model: ReducedTransformer
    name: str = OURS
    forwards: float = 1.0
    slow: bool = False

    def __call__(self, images: Tensor, target: Tensor | None = None, /) -> Tensor:
        del target
        _, trace = self.model.trace(images)
        return trace.keep_GBN.sum(0).view(-1, *trace.grid)


def _itself(name: str, model: ReducedTransformer, seed: int) -> _Itself:
    del seed
    return _Itself(model, name)
