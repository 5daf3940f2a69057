"""Any methods on any model, judged by `iared2.evaluate.faithfulness`, in shards that are recorded; `iared2.evaluate.shards` says how."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from iared2.data.labels import check_labels
from iared2.data.raw import RawBatch, RawImages
from iared2.errors import ConfigError
from iared2.evaluate.bootstrap import interval, means, resamples
from iared2.evaluate.faithfulness import ALL, FIGURES, TESTS, faithfulness
from iared2.evaluate.judge import Judge
from iared2.evaluate.randomised import randomised, rank_correlation, steps_of
from iared2.evaluate.removal import on_grid
from iared2.evaluate.shards import (
    FORWARDS,
    Explainer,
    Find,
    MethodRow,
    Shard,
    ShardedMethods,
    check_class,
    mean_forwards,
    plain,
    plain_by_name,
    plain_pairs,
    timed,
)
from iared2.model import ReducedTransformer
from iared2.seeds import derive_seed

PREDICTED, LABEL = "predicted", "label"


@dataclass(frozen=True)
class FaithOptions:
    """How to run.

    Attributes:
        batch_size: images per call of a method, and per shard: what is lost at most when a run is killed.
        workers: threads that decode.
        seed: of what methods draw, of random weights, of subsets, and of intervals.
        target: the class to explain: "predicted" by the dense backbone, "label", or a number.
        dtype: precision of matrix products.
        slow_limit: images for methods that are slow.
        tests: which of `iared2.evaluate.faithfulness.TESTS`.
    """

    batch_size: int = 16
    workers: int = 0
    seed: int = 0
    target: str | int = PREDICTED
    dtype: str = "float32"
    slow_limit: int = 20
    tests: tuple[str, ...] = tuple(TESTS)


@dataclass(frozen=True)
class FaithRow(MethodRow):
    """One method's figures, or why there are none.

    Attributes:
        figures: means over images, by the names in `iared2.evaluate.faithfulness.FIGURES`.
        intervals: 95 % intervals of the same.
        curves: by name, "share" and the means of "top1" and "chance" there, from 0 to 1; "randomised" has "blocks" and "correlation".
    """

    figures: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    curves: dict[str, dict[str, list[float | None]]] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """For JSON; what has no value is null."""
        return {
            "method": self.method,
            **plain_by_name(self.figures, FIGURES),
            **self.spent(),
            "intervals": plain_pairs(self.intervals, FIGURES),
        }


class FaithfulnessRun(ShardedMethods[RawImages, RawBatch, FaithRow]):
    """Methods on one model and one set of labelled pictures.

    Args:
        find: gives an explainer by name, or raises ConfigError where this model cannot have it.
        records: folder for finished shards; None keeps them for as long as this object lives.

    Raises:
        ConfigError: a model without a classifier, a class that its head does not have, or a test that does not exist.
        DataError: labels to explain that the head does not have.
    """

    def __init__(
        self, model: ReducedTransformer, data: RawImages, find: Find, options: FaithOptions | None = None, records: Path | None = None
    ) -> None:
        self.options = options or FaithOptions()
        super().__init__(model, data, find, self.options, records)
        self.judge = Judge(model, self.how.mean, self.how.std)
        target = self.options.target
        if isinstance(target, int):
            check_class(target, model.num_classes)
        elif target not in (PREDICTED, LABEL):
            raise ConfigError(f"--target: got {target!r}, wanted {PREDICTED}, {LABEL} or the number of a class")
        elif target == LABEL:
            check_labels(data.data.labels, model.num_classes, "data")
        for name in self.options.tests or ("",):
            if name not in TESTS:
                raise ConfigError(f"--tests: got {name!r}, wanted names separated by commas, of {', '.join(TESTS)}")

    def deciding(self) -> tuple[Any, ...]:
        return self.options.target, tuple(name for name in TESTS if name in self.options.tests)

    def read(self, data: RawImages, rows: range) -> RawBatch | None:
        return data.batch(rows, self.how, self.options.workers)

    def score(self, name: str, batch: RawBatch, seed: int) -> tuple[dict[str, list[Any]], float]:
        images = batch.image_BCHW.to(next(self.model.parameters()).device)
        class_B = self._asked(images, batch.label_B)
        explainer = self.find(name, self.model, seed)
        map_Bhw, seconds = timed(explainer, self.judge.normalised(images), class_B)
        found = faithfulness(map_Bhw, images, self.judge, class_B, self.options.tests)
        kept: dict[str, list[Any]] = {figure: value_B.tolist() for figure, value_B in found.value.items()}
        kept[FORWARDS] = [explainer.forwards] * len(map_Bhw)
        for curve, value in found.curve.items():
            kept[f"curve {curve}"] = torch.stack([value.hit_BS.double(), value.chance_BS], dim=1).tolist()
        if "randomised" in self.options.tests:
            kept["curve randomised"] = self._randomised(explainer, map_Bhw, (images, class_B, seed)).tolist()
        return kept, seconds

    def _asked(self, images: Float[Tensor, "B C H W"], label_B: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
        """The class to explain of each picture."""
        if self.options.target == PREDICTED:
            return self.judge(images).argmax(1)
        label_B = label_B.to(images.device)
        return label_B if isinstance(self.options.target, str) else torch.full_like(label_B, self.options.target)

    def _blocks(self, slow: bool) -> tuple[int, ...]:
        """How many of the last blocks are made random; of slow methods the last and all."""
        steps = steps_of(self.model.adapter.depth)
        return tuple(dict.fromkeys((steps[0], steps[-1]))) if slow else steps

    def _randomised(self, explainer: Explainer, map_Bhw: Float[Tensor, "B h w"], where: tuple[Tensor, Tensor, int]) -> Float[Tensor, "B R"]:
        """Rank correlations, on the patch grid, with maps of the model with random blocks. What a method draws is drawn anew."""
        images, class_B, seed = where
        grid, columns = self.judge.grid(images), []
        whole_Bhw = on_grid(map_Bhw, grid)  # a copy: a map may be a view of weights, which change below
        for blocks in self._blocks(explainer.slow):
            with randomised(self.model, blocks, self.options.seed) as other:
                again = self.find(explainer.name, other, derive_seed(seed, blocks) % 2**31)
                other_Bhw = on_grid(again(self.judge.normalised(images), class_B).detach().float(), grid)
            columns.append(rank_correlation(whole_Bhw, other_Bhw).cpu())
        return torch.stack(columns, dim=1)

    def row(self, explainer: Explainer, name: str, shards: list[Shard]) -> FaithRow:
        joined: dict[str, list[Any]] = {
            key: [one for shard in shards for one in shard.found[key]] for key in shards[0].found if key != FORWARDS
        }
        curves = {key.removeprefix("curve "): torch.tensor(value, dtype=torch.float64) for key, value in joined.items() if " " in key}
        each = {figure: torch.tensor(joined[figure], dtype=torch.float64) for figure in FIGURES if figure in joined}
        if "randomised" in curves:
            each |= {"randomised_1": curves["randomised"][:, 0], "randomised_all": curves["randomised"][:, -1]}
        value_NK = torch.stack(list(each.values()), dim=1)
        images = len(value_NK)
        drawn_DK = means(value_NK, resamples(images, self.options.seed))
        mean_K = means(value_NK, torch.ones(1, images, dtype=torch.float64))[0]
        return FaithRow(
            method=name,
            images=images,
            figures=dict(zip(each, mean_K.tolist(), strict=True)),
            intervals={figure: interval(drawn_DK[:, column]) for column, figure in enumerate(each)},
            curves={key: self._curve(key, value, explainer.slow) for key, value in curves.items()},
            forwards=mean_forwards(explainer, shards),
            milliseconds=statistics.median(1000 * shard.seconds / len(next(iter(shard.found.values()))) for shard in shards),
            slow=explainer.slow,
        )

    def _curve(self, name: str, value: Tensor, slow: bool) -> dict[str, list[float | None]]:
        mean = value.nanmean(0)
        if name == "randomised":
            return {"blocks": [float(blocks) for blocks in self._blocks(slow)], "correlation": _plain(mean.tolist())}
        return {"share": list(ALL[: mean.shape[1]]), "top1": _plain(mean[0].tolist()), "chance": _plain(mean[1].tolist())}

    def no_row(self, name: str, slow: bool, why: str) -> FaithRow:
        return FaithRow(name, slow=slow, why=why)


def _plain(values: Sequence[float]) -> list[float | None]:
    return [plain(value) for value in values]
