"""Every explainer by name, with one signature: (images, target) -> maps.

Ours explain the reduced model and cost less than one dense pass; all others explain the dense backbone inside it.
"""

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from iared2 import cost
from iared2.errors import ConfigError
from iared2.explain import attention as seen
from iared2.explain import perturbing, propagation
from iared2.explain.combined import combined_map, gradient_map, scores_on_grid
from iared2.explain.dense import check_target, dense_pass
from iared2.explain.memorability import load_memnet, memorability
from iared2.model import ReducedTransformer
from iared2.seeds import generator
from iared2.tokens.grid import gaussian, to_map

Maps = Float[Tensor, "B h w"]
Target = Int[Tensor, " B"] | None
Run = Callable[[Tensor, Target], Maps]

BACKWARD = 1.5  # what a backward pass without gradients of weights costs, in forward passes


@dataclass
class Explainer:
    """One method on one model.

    Attributes:
        name: its id.
        slow: whether tables run it on a subset.
        cost: what a map costs, in passes of the dense backbone, where that does not depend on the picture.
    """

    name: str
    cost: float
    slow: bool
    model: ReducedTransformer
    run: Run

    @property
    def forwards(self) -> float:
        """What a map costs, in passes of the dense backbone; where that depends on the picture, the mean over the last batch."""
        return self.run.forwards if isinstance(self.run, Counted) else self.cost

    def __call__(self, images: Float[Tensor, "B C height width"], target_B: Target = None) -> Maps:
        """Maps of a batch, one value per patch or per pixel; larger means more important.

        Raises:
            ConfigError: a target outside of the head, or an answer that is not finite.
        """
        if target_B is not None:
            if not self.model.num_classes:
                raise ConfigError("target: this model has no classifier, so there is no class to ask for")
            check_target(target_B, self.model.num_classes)
        with torch.inference_mode(False), torch.enable_grad(), _at_rest(self.model):
            maps = self.run(images.clone() if images.is_inference() else images, target_B).float()
        if not maps.isfinite().all():
            raise ConfigError(f"{self.name}: the map is not finite; try --dtype float32, and check the model's weights")
        return maps


@contextmanager
def _at_rest(model: ReducedTransformer) -> Iterator[None]:
    """Has a model in eval mode and without gradients of weights, which would cost half as much again; puts back what was."""
    frozen = [p for p in model.parameters() if p.requires_grad]
    training = [module for module in model.modules() if module.training]
    model.eval()
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True


@dataclass(frozen=True)
class Method:
    """How an explainer is made.

    Attributes:
        about: one line for people.
        make: (model, what follows the colon in the name, seed) -> the function from images and target to maps.
        forwards: cost, in passes of the dense backbone.
        detail: what may follow a colon.
        needs: what a model must have: "attention" (plain softmax attention at the answer), or "linear" (rules for all its layers).
    """

    about: str
    make: Callable[[ReducedTransformer, str, int], Run]
    forwards: float = 1.0
    detail: str = ""
    slow: bool = False
    needs: str = ""


def find_explainer(name: str, model: ReducedTransformer, seed: int = 0) -> Explainer:
    """The explainer of that name on a model.

    Args:
        name: an id of `method_names`; some take a detail behind a colon, such as attention:11.

    Raises:
        ConfigError: an unknown name (answered with the nearest right one), or a method that this model does not allow.
    """
    check_names([name])
    stem, _, detail = name.partition(":")
    method = METHODS[stem]
    if detail and not method.detail:
        raise ConfigError(f"{name}: {stem} takes nothing behind a colon")
    if method.needs and (why := _lacks(model, method.needs)):
        raise ConfigError(f"{stem}: {why}")
    return Explainer(name, method.forwards, method.slow, model, method.make(model, detail, seed))


def check_names(names: Sequence[str], option: str = "method") -> tuple[str, ...]:
    """The names, each once, before a model is there to try them on; details behind colons are checked where it is.

    Raises:
        ConfigError: one is unknown (answered with the nearest right one).
    """
    for name in names:
        stem, colon, detail = name.partition(":")
        if colon and not detail:
            raise ConfigError(f"{option}: got {name!r}, with nothing behind the colon; leave the colon out, or say what of {stem}")
        if stem not in METHODS:
            near = difflib.get_close_matches(stem, METHODS, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}? Known" if near else "known"
            raise ConfigError(f"{option}: got {name!r}, which is no method; {hint}: {', '.join(METHODS)}")
    return tuple(dict.fromkeys(names))


def method_names() -> list[str]:
    """The ids, in the order of tables."""
    return list(METHODS)


def method_list() -> list[tuple[str, str]]:
    """Ids and what they are, for people."""
    return [(stem + (f"[:{method.detail}]" if method.detail else ""), method.about) for stem, method in METHODS.items()]


def _lacks(model: ReducedTransformer, needs: str) -> str:
    """What a model lacks for a method; empty if nothing."""
    backbone = model.backbone
    if getattr(backbone, "attn_pool", None) is not None:
        return "this model pools its tokens with an attention of its own, so no token's row or layer rule is its answer"
    plain = all(model.adapter.splits)
    if needs == "linear" and not plain:
        return "this model's blocks run attention and feed-forward layers side by side, for which there is no rule here"
    return ""


# ---- makers ------------------------------------------------------------------------------------------------------------------


def _looking(read: Callable[[seen.DensePass], Maps]) -> Callable[[ReducedTransformer, str, int], Run]:
    """Methods that read a dense pass without gradients."""

    def make(model: ReducedTransformer, detail: str, seed: int) -> Run:
        def run(images: Tensor, target_B: Target) -> Maps:
            with torch.no_grad():
                return read(dense_pass(model, images))

        return run

    return make


def _slopes(read: Callable[[seen.DensePass, Target, int], Maps]) -> Callable[[ReducedTransformer, str, int], Run]:
    """Methods that read a dense pass and its gradients."""

    def make(model: ReducedTransformer, detail: str, seed: int) -> Run:
        def run(images: Tensor, target_B: Target) -> Maps:
            with torch.enable_grad():
                return read(dense_pass(model, images), target_B, model.num_classes).detach()

        return run

    return make


def _whole(read: Callable[[ReducedTransformer, Tensor, Target], Maps]) -> Callable[[ReducedTransformer, str, int], Run]:
    """Methods that take the model as it is."""

    def make(model: ReducedTransformer, detail: str, seed: int) -> Run:
        return lambda images, target_B: read(model, images, target_B)

    return make


def _drawn(read: Callable[..., Maps]) -> Callable[[ReducedTransformer, str, int], Run]:
    """Methods that take the model as it is, and draw."""

    def make(model: ReducedTransformer, detail: str, seed: int) -> Run:
        return lambda images, target_B: read(model, images, target_B, seed=seed)

    return make


def _occlusion(model: ReducedTransformer, detail: str, seed: int) -> Run:
    """occlusion: one pass per window, one for the class and one for the answer without a window."""

    def read(images: Tensor, target_B: Target) -> tuple[Maps, float]:
        rows, columns = model.adapter.grid(images.shape[-2], images.shape[-1])
        return perturbing.occlusion(model, images, target_B), 2.0 + max(1, rows - 1) * max(1, columns - 1)

    return Counted(read)


def _attention(model: ReducedTransformer, detail: str, seed: int) -> Run:
    """attention:BLOCK, attention:BLOCK:HEAD or attention:BLOCK:max; the last block without a detail."""
    block, _, rest = detail.partition(":")
    depth = model.adapter.depth
    number = _number(f"attention:{detail}", block, depth, "block") if block else depth - 1
    head = None if rest in ("", "max", "mean") else _number(f"attention:{detail}", rest, model.adapter.heads, "head")

    def run(images: Tensor, target_B: Target) -> Maps:
        with torch.no_grad():
            return seen.raw_attention(dense_pass(model, images), number, head, "max" if rest == "max" else "mean")

    return run


def _number(name: str, text: str, count: int, what: str) -> int:
    if not text.isdecimal() or int(text) >= count:
        raise ConfigError(f"{name}: got {what} {text!r}, wanted one of 0 to {count - 1}")
    return int(text)


@dataclass
class Counted:
    """A method whose cost is known when it has run: of ours it depends on how many patches stay, of others on the size of the picture.

    Attributes:
        read: images and target to maps and their mean cost.
        forwards: the cost of the last batch.
    """

    read: Callable[[Tensor, Target], tuple[Maps, float]]
    forwards: float = 1.0

    def __call__(self, images: Tensor, target_B: Target) -> Maps:
        maps, self.forwards = self.read(images, target_B)
        return maps


def _ours(model: ReducedTransformer, detail: str, seed: int) -> Run:
    """ours, or ours:GROUP."""
    group = _number(f"ours:{detail}", detail, len(model.reducers), "group") if detail else None

    def read(images: Tensor, target_B: Target) -> tuple[Maps, float]:
        if group is None:
            return combined_map(model, images)
        with torch.no_grad():
            _, trace = model.trace(images, second_look=False)
        return to_map(scores_on_grid(trace)[group], trace.grid), trace.share_of_dense()

    return Counted(read)


def _ours_gradient(model: ReducedTransformer, detail: str, seed: int) -> Run:
    """ours_gradient."""

    def read(images: Tensor, target_B: Target) -> tuple[Maps, float]:
        maps, forwards = gradient_map(model, images, target_B)
        return maps, forwards + BACKWARD

    return Counted(read)


def _random(model: ReducedTransformer, detail: str, seed: int) -> Run:
    draw = generator(seed)
    return lambda images, target_B: torch.rand(len(images), *model.adapter.grid(*images.shape[-2:]), generator=draw)


def _constant(value: Callable[[int, int], Tensor]) -> Callable[[ReducedTransformer, str, int], Run]:
    def make(model: ReducedTransformer, detail: str, seed: int) -> Run:
        return lambda images, target_B: value(*images.shape[-2:]).expand(len(images), -1, -1).to(images.device)

    return make


def _memorability(model: ReducedTransformer, detail: str, seed: int) -> Run:
    net = load_memnet(detail)

    def read(images: Tensor, target_B: Target) -> tuple[Maps, float]:
        with FlopCounterMode(display=False) as counter:
            maps = memorability(net.to(images.device), images)
        macs = counter.get_total_flops() / 2 / max(1, len(images))
        return maps, macs / cost.dense_macs(model.adapter, images.shape[-2], images.shape[-1])

    return Counted(read)


_ROW = "attention"
METHODS: dict[str, Method] = {
    "ours": Method("our best map without a gradient: all groups' scores together, or one group's", _ours, detail="GROUP"),
    "ours_gradient": Method("our best map with one backward pass", _ours_gradient),
    "attention": Method(
        "class attention of a block: mean or max over heads, or one head", _attention, 1.0, "BLOCK[:HEAD|:max]", needs=_ROW
    ),
    "rollout": Method("attention rollout (Abnar and Zuidema 2020)", _looking(seen.rollout), needs=_ROW),
    "grad_rollout": Method("rollout of gradient times attention", _slopes(seen.gradient_rollout), 1 + BACKWARD, needs=_ROW),
    "gradcam": Method("GradCAM on the last block's tokens (Selvaraju et al. 2017)", _slopes(seen.gradcam), 1 + BACKWARD),
    "gradcam_attention": Method("GradCAM on the last attention", _slopes(seen.gradcam_attention), 1 + BACKWARD, needs=_ROW),
    "chefer": Method("generic attribution (Chefer et al. 2021)", _slopes(seen.generic_attribution), 1 + BACKWARD, needs=_ROW),
    "transformer_attribution": Method(
        "relevance times gradient (Chefer et al. 2021)", _whole(propagation.transformer_attribution), 2 + 3 * BACKWARD, needs="linear"
    ),
    "lrp": Method(
        "layer-wise relevance propagation to the patches; in deep models its quotients magnify rounding",
        _whole(propagation.lrp),
        1 + 2 * BACKWARD,
        needs="linear",
    ),
    "partial_lrp": Method("relevance at the last attention", _whole(propagation.partial_lrp), 1 + BACKWARD, needs="linear"),
    "attnlrp": Method("AttnLRP (Achtibat et al. 2024)", _whole(propagation.attnlrp), 1 + 2 * BACKWARD, needs="linear"),
    "legrad": Method("LeGrad (Bousselham et al. 2024)", _slopes(seen.legrad), 1 + BACKWARD),
    "ig": Method("integrated gradients, 16 steps (captum)", _whole(perturbing.integrated_gradients), 1 + 16 * (1 + BACKWARD), slow=True),
    "smoothgrad": Method("SmoothGrad, 16 draws (captum)", _drawn(perturbing.smoothgrad), 1 + 16 * (1 + BACKWARD), slow=True),
    "occlusion": Method("occlusion, window of 2 x 2 patches (captum)", _occlusion, slow=True),
    "rise": Method("RISE, 200 masks (Petsiuk et al. 2018)", _drawn(perturbing.rise), 201.0, slow=True),
    "lime": Method("LIME, 200 draws over 7 x 7 cells (captum)", _drawn(perturbing.lime), 201.0, slow=True),
    "memorability": Method("MemNet's memorability; weights not included", _memorability, detail="FILE"),
    "random": Method("chance", _random, 0.0),
    "gaussian": Method("a centred Gaussian, a quarter of the side wide", _constant(gaussian), 0.0),
    "background": Method("a map that is the same everywhere", _constant(torch.ones), 0.0),
}
