"""The interpreters' own explanation (section 3.2, "Emergence of Interpretability"): it comes with the forward pass."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from iared2.errors import ConfigError
from iared2.explain.labels import class_names
from iared2.model import ReducedTransformer
from iared2.trace import Trace


@dataclass(frozen=True)
class Prediction:
    """One class of a prediction."""

    index: int
    label: str
    probability: float


@dataclass(frozen=True)
class Explanation:
    """What a reduced model said about one image, and what it looked at.

    Attributes:
        predictions: the likeliest classes, best first; empty for a model without a classifier.
        trace: scores, kept places and cost of this image, on the host.
    """

    predictions: tuple[Prediction, ...]
    trace: Trace


@dataclass(frozen=True)
class Speed:
    """Milliseconds per image of the reduced model and of its dense backbone, run in turn on the same images."""

    reduced_ms: float
    dense_ms: float
    images: int


def interpreter_maps(
    model: ReducedTransformer, images: Float[Tensor, "B C height width"], target: object = None
) -> Float[Tensor, "B G h w"]:
    """The scores of every group on the patch grid; patches that were gone before a group count as zero.

    Args:
        target: ignored. The interpreters score what matters to the model, not to one class.
    """
    del target
    with torch.inference_mode():
        _, trace = model.trace(images)
    return torch.stack([trace.heatmap(group) for group in range(trace.groups)], dim=1)


def explain(model: ReducedTransformer, images: Float[Tensor, "B C height width"], top: int = 5) -> list[Explanation]:
    """Predictions and traces of a batch, in one forward pass of the reduced model.

    Raises:
        ConfigError: the batch does not fit into memory, or the model's answer is not finite.
    """
    try:
        with torch.inference_mode():
            logits, trace = model.trace(images)
    except torch.OutOfMemoryError:
        raise ConfigError(f"a batch of {len(images)} images does not fit into the device's memory; use a smaller --batch-size") from None
    logits = logits.float().cpu()
    trace, names = trace.cpu(), class_names(model)
    if not (torch.isfinite(logits).all() and torch.isfinite(trace.score_GBN).all()):
        raise ConfigError("the model's answer is not finite; try --dtype float32, and check its weights")
    return [Explanation(_best(row, names, top), trace.image(i)) for i, row in enumerate(logits)]


def _best(logits: Float[Tensor, " classes"], names: Sequence[str] | None, top: int) -> tuple[Prediction, ...]:
    if logits.ndim != 1 or not len(logits):
        return ()
    best = logits.softmax(0).topk(min(top, len(logits)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return tuple(Prediction(index, names[index] if names else f"class {index}", chance) for index, chance in pairs)


def measure(model: ReducedTransformer, images: Float[Tensor, "B C height width"], rounds: int = 3) -> Speed:
    """Times the reduced model and its dense backbone alternately on one batch, after a warm-up of each.

    Returns:
        Medians over `rounds`, divided by the number of images.
    """
    dense = model.unload()
    times: dict[str, list[float]] = {"reduced": [], "dense": []}
    with torch.inference_mode():
        for turn in range(rounds + 1):
            reduced_s, dense_s = _seconds(model, images), _seconds(dense, images)
            if turn:
                times["reduced"].append(reduced_s)
                times["dense"].append(dense_s)
    per_image = 1000 / len(images)
    return Speed(statistics.median(times["reduced"]) * per_image, statistics.median(times["dense"]) * per_image, len(images))


def _seconds(run: Callable[[Tensor], object], images: Tensor) -> float:
    _wait(images)
    start = time.perf_counter()
    run(images)
    _wait(images)
    return time.perf_counter() - start


def _wait(images: Tensor) -> None:
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
