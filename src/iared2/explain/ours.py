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
from iared2.reducers.iared2 import InterpreterReducer
from iared2.tokens.packed import scatter_places
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
        head_GHN: each head's score, whose mean over heads is the trace's score; None where a reducer has no interpreter.
        macs_G: multiply-adds from the pixels to the end of each group; the last also has the head and a second look, so it is the trace's.
    """

    predictions: tuple[Prediction, ...]
    trace: Trace
    head_GHN: Float[Tensor, "G H N"] | None
    macs_G: tuple[int, ...]


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
        _, trace = model.trace(images, second_look=False)
    return torch.stack([trace.heatmap(group) for group in range(trace.groups)], dim=1)


def explain(model: ReducedTransformer, images: Float[Tensor, "B C height width"], top: int = 5) -> list[Explanation]:
    """Predictions and traces of a batch, in one forward pass of the reduced model (and a second look, where it is set to one).

    Raises:
        ConfigError: the batch does not fit into memory, or the model's answer is not finite.
    """
    try:
        with torch.inference_mode():
            logits, trace, head_GBHN = trace_with_heads(model, images)
    except torch.OutOfMemoryError:
        raise ConfigError(f"a batch of {len(images)} images does not fit into the device's memory; use a smaller --batch-size") from None
    logits = logits.float().cpu()
    trace, names = trace.cpu(), class_names(model)
    if not (torch.isfinite(logits).all() and torch.isfinite(trace.score_GBN).all()):
        raise ConfigError("the model's answer is not finite; try --dtype float32, and check its weights")
    heads = [None] * len(logits) if head_GBHN is None else [head_GHN.clone() for head_GHN in head_GBHN.float().cpu().unbind(1)]
    chosen = [_best(row, names, top) if model.num_classes else () for row in logits]
    traces = [trace.image(index) for index in range(len(logits))]
    return [
        Explanation(best, one, head_GHN, macs_by_group(model, one, (images.shape[-2], images.shape[-1])))
        for best, one, head_GHN in zip(chosen, traces, heads, strict=True)
    ]


def trace_with_heads(
    model: ReducedTransformer, images: Float[Tensor, "B C height width"]
) -> tuple[Tensor, Trace, Float[Tensor, "G B H N"] | None]:
    """As `model.trace`, and with it every head's score, zero where the patch was gone; None where a reducer has no interpreter.

    The walk pauses in front of each reducer and asks its interpreter once more, about the very tokens that the reducer gets. So
    nothing has to be recorded, and passes that nobody explains pay nothing.
    """
    ahead = state = model.walk_to(model.start(images), 0, reduce=())
    found = []
    for group, reducer in enumerate(model.reducers):
        state = model.walk_to(state, group, reduce=range(group))
        if isinstance(reducer, InterpreterReducer):
            head_TH = reducer.interpreter.logits(state.tokens, state.class_TH).sigmoid()
            found.append(scatter_places(head_TH, state.tokens.layout).transpose(1, 2))
    state = model.finish(state)
    answer = model.conclude(ahead, state)
    trace = model.make_trace(state.reductions, (images.shape[-2], images.shape[-1]), answer.again_B)
    return answer.logits, trace, torch.stack(found) if len(found) == trace.groups else None


def macs_by_group(model: ReducedTransformer, trace: Trace, size: tuple[int, int]) -> tuple[int, ...]:
    """Multiply-adds from the pixels to the end of each group's last block; with the last group's come the head and a second look.

    Args:
        trace: of one image.
        size: its input's height and width in pixels.
    """
    kept = trace.keep_GBN[:, 0].sum(-1).tolist()
    ends = (*trace.first_blocks[1:], None)
    patches = trace.keep_GBN.shape[-1]
    macs = [model.macs(size, patches, kept, until=end) for end in ends]
    macs[-1] += model.second_look_macs(size, patches) if any(trace.again) else 0
    return tuple(macs)


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
