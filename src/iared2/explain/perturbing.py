"""Explainers that only ask for answers: occlusion, RISE, LIME; and those that ask for gradients of pixels: IG, SmoothGrad.

| here | source | by |
|---|---|---|
| `integrated_gradients` | Sundararajan et al. 2017; from black, 16 steps; absolute sum over channels | captum |
| `smoothgrad` | Smilkov et al. 2017; 16 draws at a tenth of the pixels' range | captum |
| `occlusion` | Zeiler and Fergus 2014; a window of two by two patches, by one patch, mean colour | captum |
| `lime` | Ribeiro et al. 2016; 7 x 7 cells, 200 draws | captum |
| `rise` | Petsiuk et al. 2018; 200 masks of 7 x 7 cells, half of them open | here: captum has none |

The answer that is explained is the target's logit, as everywhere in this package.
"""

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from iared2.data.views import seeded
from iared2.errors import ConfigError
from iared2.explain.attention import Maps, Target
from iared2.explain.dense import explained_class, gain
from iared2.model import ReducedTransformer
from iared2.seeds import generator

Answer = Callable[[Float[Tensor, "B C height width"]], Float[Tensor, " B"]]
CELLS = 7


def captum() -> Any:
    """captum's attribution module.

    Raises:
        ConfigError: it is not installed.
    """
    if importlib.util.find_spec("captum") is None:
        raise ConfigError("ig, smoothgrad, occlusion, lime: captum computes them and is not installed; run pip install 'iared2[explain]'")
    import captum.attr

    return captum.attr


def answers(model: ReducedTransformer, images: Tensor, target_B: Target) -> tuple[Answer, Tensor | None]:
    """A function from images to what is explained of each, and the targets that it holds fast."""
    classes, backbone = model.num_classes, model.backbone
    with torch.no_grad():
        output_BC = backbone(images).float()
    chosen_B = explained_class(output_BC, target_B, classes)

    def answer(changed: Tensor) -> Tensor:
        output = backbone(changed.to(images)).float()
        times = len(changed) // len(images)  # captum repeats a batch as a whole
        if classes:
            return gain(output, None if chosen_B is None else chosen_B.repeat(times), classes)
        return (output * F.normalize(output_BC, dim=1).repeat(times, 1)).sum(1)

    return answer, chosen_B


def integrated_gradients(model: ReducedTransformer, images: Tensor, target_B: Target, steps: int = 16) -> Maps:
    """Integrated gradients from a black image."""
    answer, _ = answers(model, images, target_B)
    with torch.enable_grad():
        found = (
            captum()
            .IntegratedGradients(answer)
            .attribute(images, baselines=_black(model, images), n_steps=steps, internal_batch_size=len(images))
        )
    return found.detach().sum(1).abs()


def smoothgrad(model: ReducedTransformer, images: Tensor, target_B: Target, draws: int = 16, seed: int = 0) -> Maps:
    """Gradients of noisy copies, averaged. Every image gets the same noise, in units of its own range."""
    attr, maps = captum(), []
    for one, wanted_B in _one_by_one(images, target_B):
        answer, _ = answers(model, one, wanted_B)
        spread = 0.1 * float(one.amax() - one.amin())
        with torch.enable_grad(), seeded(seed):
            tunnel = attr.NoiseTunnel(attr.Saliency(answer))
            found = tunnel.attribute(one, nt_type="smoothgrad", nt_samples=draws, nt_samples_batch_size=4, stdevs=spread, abs=False)
        maps.append(found[0].detach().abs().sum(0))
    return torch.stack(maps)


def _one_by_one(images: Tensor, target_B: Target) -> Iterator[tuple[Tensor, Target]]:
    """Batches of one, so that what is drawn for an image does not depend on its neighbours."""
    for index in range(len(images)):
        yield images[index : index + 1], None if target_B is None else target_B[index : index + 1]


def occlusion(model: ReducedTransformer, images: Tensor, target_B: Target) -> Maps:
    """What the answer loses when a window is covered with the mean colour, mean over the windows that cover a pixel."""
    answer, _ = answers(model, images, target_B)
    rows, columns = model.adapter.grid(images.shape[-2], images.shape[-1])
    patch = images.shape[-2] // rows, images.shape[-1] // columns
    windows = (images.shape[1], min(2, rows) * patch[0], min(2, columns) * patch[1])
    with torch.no_grad():
        found = captum().Occlusion(answer).attribute(images, windows, strides=(images.shape[1], *patch), baselines=0.0)
    return found.mean(1)


def lime(model: ReducedTransformer, images: Tensor, target_B: Target, draws: int = 200, seed: int = 0) -> Maps:
    """Weights of a linear model of the answer over cells that are there or covered with the mean colour."""
    maps = []
    for one, wanted_B in _one_by_one(images, target_B):
        answer, _ = answers(model, one, wanted_B)
        with torch.no_grad(), seeded(seed):
            found = (
                captum().Lime(answer).attribute(one, feature_mask=_cells(one), baselines=0.0, n_samples=draws, perturbations_per_eval=20)
            )
        maps.append(found[0].mean(0))
    return torch.stack(maps)


def rise(model: ReducedTransformer, images: Tensor, target_B: Target, draws: int = 200, seed: int = 0) -> Maps:
    """Random smooth masks, averaged by the probability that the target keeps under each."""
    backbone = model.backbone
    answer, chosen_B = answers(model, images, target_B)
    draw, (height, width) = generator(seed), images.shape[-2:]
    total, weight_B = torch.zeros(len(images), height, width, device=images.device), torch.zeros(len(images), device=images.device)
    with torch.no_grad():
        for _ in range(draws):
            mask = _smooth_mask(height, width, draw).to(images)
            if chosen_B is not None:
                value_B = backbone(images * mask).float().softmax(1).gather(1, chosen_B[:, None]).squeeze(1)
            else:
                value_B = answer(images * mask)
            total, weight_B = total + value_B[:, None, None] * mask, weight_B + value_B
    return total / draws / 0.5


def _smooth_mask(height: int, width: int, draw: torch.Generator) -> Float[Tensor, "height width"]:
    """A coarse random grid, enlarged and shifted by less than a cell."""
    cell = -(-height // CELLS), -(-width // CELLS)
    coarse = (torch.rand(1, 1, CELLS + 1, CELLS + 1, generator=draw) < 0.5).float()
    fine = F.interpolate(coarse, size=((CELLS + 1) * cell[0], (CELLS + 1) * cell[1]), mode="bilinear", align_corners=False)[0, 0]
    top, left = (int(torch.randint(size, (1,), generator=draw)) for size in cell)
    return fine[top : top + height, left : left + width]


def _cells(image: Tensor) -> Tensor:
    """The number of each pixel's cell."""
    rows = torch.arange(image.shape[-2], device=image.device) * CELLS // image.shape[-2]
    columns = torch.arange(image.shape[-1], device=image.device) * CELLS // image.shape[-1]
    return (rows[:, None] * CELLS + columns).expand(1, 1, -1, -1)


def _black(model: ReducedTransformer, images: Tensor) -> Tensor:
    """A black image as the model sees it."""
    settings = getattr(model.backbone, "pretrained_cfg", None) or {}
    mean, std = settings.get("mean", (0.5,) * images.shape[1]), settings.get("std", (0.5,) * images.shape[1])
    black_C = -torch.tensor(mean).to(images) / torch.tensor(std).to(images)
    return black_C[None, :, None, None].expand_as(images)
