"""Running figures of a reduced model against its dense backbone, on torchmetrics."""

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanMetric, Metric, SumMetric
from torchmetrics.classification import MulticlassAccuracy


@dataclass(frozen=True)
class Outcome:
    """One batch through both models.

    Attributes:
        dense, reduced: logits in float32.
        keep_ratio: per image and group.
        share: multiply-adds of each image as a share of the dense backbone's.
        linear_share: the same without the two N^2 products.
        again: 1 for each image that was passed a second time, else 0.
    """

    labels: Int[Tensor, " B"]
    dense: Float[Tensor, "B classes"]
    reduced: Float[Tensor, "B classes"]
    keep_ratio: Float[Tensor, "B G"]
    share: Float[Tensor, " B"]
    linear_share: Float[Tensor, " B"]
    again: Float[Tensor, " B"]

    def rows(self, chosen: Int[Tensor, " b"]) -> "Outcome":
        """The images at `chosen`."""
        return Outcome(**{name: value[chosen] for name, value in vars(self).items()})


class Tally:
    """Accumulates outcomes. Accuracies are in percent, differences in points."""

    def __init__(self, classes: int, groups: int) -> None:
        accuracy = partial(MulticlassAccuracy, num_classes=classes, average="micro")
        self.accuracy: dict[str, Metric] = {name: accuracy() for name in ("dense_top1", "reduced_top1", "agreement")}
        self.accuracy |= {name: accuracy(top_k=min(5, classes)) for name in ("dense_top5", "reduced_top5")}
        self.means: dict[str, Metric] = {name: MeanMetric().set_dtype(torch.float64) for name in ("kl", "share", "linear_share", "again")}
        self.keep: list[Metric] = [MeanMetric().set_dtype(torch.float64) for _ in range(groups)]
        self.sums: dict[str, Metric] = {name: SumMetric().set_dtype(torch.float64) for name in ("images", "gained", "lost")}

    def update(self, batch: Outcome) -> None:
        """Adds a batch."""
        for model, logits in (("dense", batch.dense), ("reduced", batch.reduced)):
            self.accuracy[f"{model}_top1"].update(logits, batch.labels)
            self.accuracy[f"{model}_top5"].update(logits, batch.labels)
        dense, reduced = batch.dense.argmax(1), batch.reduced.argmax(1)
        self.accuracy["agreement"].update(reduced, dense)
        divergence = F.kl_div(batch.reduced.log_softmax(1), batch.dense.log_softmax(1), reduction="none", log_target=True)
        self.means["kl"].update(divergence.sum(1))
        self.means["share"].update(batch.share)
        self.means["linear_share"].update(batch.linear_share)
        self.means["again"].update(batch.again)
        self.sums["images"].update(len(batch.labels))
        self.sums["gained"].update(((reduced == batch.labels) & (dense != batch.labels)).sum())
        self.sums["lost"].update(((reduced != batch.labels) & (dense == batch.labels)).sum())
        for metric, ratio in zip(self.keep, batch.keep_ratio.unbind(1), strict=True):
            metric.update(ratio)

    def percent(self, name: str) -> float:
        """An accuracy or the agreement, in percent."""
        return round(100 * float(self.accuracy[name].compute()), 4)

    def mean(self, name: str) -> float:
        """The mean of `kl`, `share`, `linear_share` or `again` over images."""
        return float(self.means[name].compute())

    def keep_ratio(self) -> tuple[float, ...]:
        """Mean keep ratio of each group."""
        return tuple(float(metric.compute()) for metric in self.keep)

    @property
    def count(self) -> int:
        """Images so far."""
        return round(float(self.sums["images"].compute()))

    def difference(self) -> tuple[float, float]:
        """Top-1 of the reduced minus the dense model in points, and its standard error.

        Paired: per image the difference is 1, 0 or -1, so the error counts only images that changed sides.
        """
        gained, lost = (float(self.sums[name].compute()) for name in ("gained", "lost"))
        mean = (gained - lost) / self.count
        variance = ((gained + lost) / self.count - mean**2) / max(1, self.count - 1)
        return 100 * mean, 100 * max(0.0, variance) ** 0.5
